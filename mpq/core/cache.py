"""Formats of cached keys and values: one vector for each head and token, rounded as it arrives.

Each vector is stored with its own scales and zeros. A scale of a whole tensor would have to be known before its tokens
arrive, so it is 1: fp8-e4m3 is a cast, and nvfp4 has only its group scales. In `TokenBlocks`, blocks of tokens share
scales and zeros.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from mpq.core.errors import MpqError
from mpq.core.formats import Format, parse_format
from mpq.core.grids import int_grid
from mpq.core.mix import is_mix

# Candidates of a search, by rising bytes of a head of 64: what the compiled attention reads.
CACHE_FORMATS = (
    "int2-asym", "int2-t64-asym", "int2-g16-se4m3", "int2-g32-asym", "int3-asym", "int3-t64-asym", "int3-g16-se4m3",
    "int3-g32-asym", "int4-asym", "int4-t64-asym", "int4-g32-asym", "int5-asym", "int6-asym", "int8-token", "fp16",
)  # fmt: skip
FLOAT_CACHE = "fp16"  # what a cache holds that is not quantized
EVERY = ("*",)  # for targets that support all cache formats
ZERO = "fp16"  # number format of the zero, the value of code 0
BLOCKS = re.compile(r"(u?int[2-8])-t([1-9]\d*)(-asym)?")  # names of `TokenBlocks`


@dataclass(frozen=True)
class TokenBlocks(Format):
    """Blocks of tokens in which each column of a head has its own scale, as KIVI's keys have (arXiv 2402.02750).

    The newest tokens, which fill no block yet, stay in floating point. `group_size` is the one column of a scale.
    """

    tokens: int = 0  # tokens per block; 0: scales by vector

    @property
    def name(self) -> str:
        """INTEGER-tN or INTEGER-tN-asym."""
        inner, _, asym = cache_name(self.within).partition("-token")
        return f"{inner}-t{self.tokens}{asym}"

    @property
    def within(self) -> Format:
        """The format of a column's numbers in a block."""
        return Format(self.grid, "channel", scale=self.scale, minimum=self.minimum)

    def groups(self, cols: int) -> int:
        """Scales of a block."""
        return cols

    def block_bytes(self, width: int) -> int:
        """Stored bytes of a head's block."""
        return self.within.nbytes(width, self.tokens)

    def nbytes(self, rows: int, cols: int) -> int:
        """Stored bytes of so many vectors in blocks, each with its share of a block, rounded up."""
        return rows * -(-self.block_bytes(cols) // self.tokens)


@lru_cache(maxsize=256)
def parse_cache_format(name: str) -> Format:
    """The format of cached vectors called `name`.

    Names are those of `mpq.core.formats`, where "token" is the granularity "channel", and the one of integers and
    codebooks when there is none. With -asym a scale has a float16 zero beside it, as in TurboMind (arXiv 2508.15601),
    which becomes the format's minimum: a number is code * scale + zero. -tN makes blocks of N tokens of integers.

    Raises:
        MpqError: an unknown name, or a format with super-blocks or of mixed rows.

    >>> parse_cache_format("int4-g32-asym").minimum, parse_cache_format("int3").granularity
    ('fp16', 'channel')
    """
    if is_mix(name):
        raise MpqError(f"a cache cannot have the mix {name!r}: name one format, such as int4-g32-asym")
    blocks = BLOCKS.fullmatch(name)
    if blocks is not None:
        within = parse_cache_format(blocks[1] + (blocks[3] or ""))
        tokens = int(blocks[2])
        if within.grid.family != "int" or within.granularity != "channel" or tokens % 8:
            raise MpqError(
                f"invalid blocks of tokens {name!r}: expected integers and a multiple of 8, as int3-t64-asym"
            )
        return TokenBlocks(within.grid, "tokens", 1, within.scale, minimum=within.minimum, tokens=tokens)
    format = parse_format(name.replace("-token", "-channel"))
    if format.super_group:
        raise MpqError(f"a cache cannot have the super-blocks of {name!r}: name another format, such as int4-g32-asym")
    if format.granularity == "tensor" and format.grid.family != "float":
        format = replace(format, granularity="channel", scale="fp16")
    if format.zero_point:
        format = replace(format, zero_point=False, minimum=ZERO)
    return format


def cache_name(format: Format) -> str:
    """The canonical name: `parse_cache_format(cache_name(format)) == format`."""
    if isinstance(format, TokenBlocks):
        return format.name
    if format.minimum == ZERO and format.grid == int_grid(format.grid.bits, signed=False):
        signed = int_grid(format.grid.bits)
        return cache_name(replace(format, grid=signed, minimum="")) + "-asym"
    return format.name.replace("-channel", "-token")


def affine(bits: int) -> Format:
    """Integers with a float16 scale and zero for each vector: TurboMind's formats of 1 to 8 bits."""
    return Format(int_grid(bits, signed=False), "channel", scale="fp16", minimum=ZERO)


def stored_bytes(format: Format, width: int, tokens: int) -> int:
    """Bytes that a head's vectors of so many tokens take; for blocks of tokens with the floats of one block."""
    if isinstance(format, TokenBlocks):
        newest = min(tokens, format.tokens) * head_bytes(parse_cache_format(FLOAT_CACHE), width)
        return tokens // format.tokens * format.block_bytes(width) + newest
    return tokens * head_bytes(format, width)


def head_bytes(format: Format, width: int) -> int:
    """Stored bytes of one vector.

    >>> [head_bytes(parse_cache_format(name), 64) for name in ("fp16", "fp8-e4m3", "int4-asym", "nvfp4")]
    [128, 64, 36, 36]
    """
    whole = 4 * format.tensor_scale + 4 * (format.granularity == "tensor")
    return format.nbytes(1, width) - whole
