"""The structs that the C kernels read, as src/abi.h declares them; a test compares every offset and size."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_ubyte, c_uint64, c_void_p

MAX_PARTS = 16  # formats of a matrix with formats by row

Pair = c_int64 * 2
Table = c_ubyte * 256


class Weight(ctypes.Structure):
    """A weight's metadata, independent of its values."""

    _fields_ = [
        *[(name, c_int64) for name in ("rows", "cols", "panel_bytes")],
        *[(name, c_int32) for name in (
            "bits", "kind", "offset", "group", "segment", "segments", "tiles", "scale_kind", "scale_bytes",
            "row_scales", "zeros", "bf16_terms",
        )],
        ("factor", c_float), ("low", Table), ("high", Table), ("low_matrix", c_uint64), ("high_matrix", c_uint64),
        ("high_flip", c_int32), ("normal_mask", c_int32),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """One product, y = x W^T + bias. Addresses; 0 or None for what is left out."""

    _fields_ = [
        ("panels", c_void_p), ("tensor_scale", c_void_p), ("x", c_void_p), ("tokens", c_int64), ("stride", c_int64),
        ("bias", c_void_p), ("out", c_void_p), ("out_stride", c_int64), ("places", c_void_p),
        *[(name, c_int32) for name in ("x_is_bf16", "bias_is_bf16", "out_is_bf16", "planes", "threads", "level")],
        ("skipped", c_void_p), ("parallel", c_void_p),
    ]  # fmt: skip


class Images(ctypes.Structure):
    """The input of a convolution; pairs are (height, width), steps between images, channels, rows and columns."""

    _fields_ = [
        ("channels", c_int64),
        *[(name, Pair) for name in ("size", "kernel", "out", "stride", "padding", "dilation")],
        ("steps", c_int64 * 4),
    ]


class Part(ctypes.Structure):
    """Rows of a decoder's linear layer that have one format."""

    _fields_ = [
        ("weight", POINTER(Weight)), ("panels", c_void_p), ("tensor_scale", c_void_p), ("places", c_void_p),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    """A linear layer of a decoder; without parts, the preceding layer's include its rows."""

    _fields_ = [
        ("parts", POINTER(Part)), ("bias", c_void_p),
        *[(name, c_int32) for name in ("count", "bias_is_bf16", "planes")],
    ]  # fmt: skip


class Block(ctypes.Structure):
    """A decoder's block."""

    _fields_ = [
        *[(name, Layer) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        ("attention_norm", c_void_p), ("mlp_norm", c_void_p),
    ]  # fmt: skip


class Decoder(ctypes.Structure):
    """A LLaMA-style decoder."""

    _fields_ = [
        ("blocks", POINTER(Block)),
        *[(name, c_int64) for name in ("count", "width", "hidden", "heads", "key_heads", "head_width")],
        ("epsilon", c_float), ("is_bf16", c_int32), ("level", c_int32), ("parallel", c_void_p), ("head", Layer),
        ("norm", c_void_p),
    ]  # fmt: skip


class Vectors(ctypes.Structure):
    """Storage of a cache's vectors of keys or values; without a weight they are floats."""

    _fields_ = [
        ("weight", POINTER(Weight)), ("width", c_int64),
        *[(name, c_int32) for name in (
            "element", "element_bytes", "group", "scale_kind", "scale_bytes", "has_minimum", "by_column",
            "newest",
        )],
    ]  # fmt: skip


class Slab(ctypes.Structure):
    """Memory for some blocks of every key head."""

    _fields_ = [("data", c_void_p), ("blocks", c_int64), ("head_bytes", c_int64)]


class Sequence(ctypes.Structure):
    """One sequence's newest token and its cache."""

    _fields_ = [
        ("q", c_void_p), ("out", c_void_p), ("keys", POINTER(Slab)), ("values", POINTER(Slab)), ("length", c_int64),
    ]  # fmt: skip


class Attention(ctypes.Structure):
    """Attention of the newest token of each sequence."""

    _fields_ = [
        ("keys", POINTER(Vectors)), ("values", POINTER(Vectors)), ("sequences", POINTER(Sequence)),
        *[(name, c_int64) for name in ("count", "heads", "key_heads", "window")],
        ("sinks", c_void_p), ("scale", c_float), ("planes", c_int32), ("threads", c_int32), ("level", c_int32),
        ("parallel", c_void_p),
    ]  # fmt: skip


class Append(ctypes.Structure):
    """Tokens that follow those in a cache."""

    _fields_ = [
        ("vectors", POINTER(Vectors)), ("slabs", POINTER(Slab)), ("x", c_void_p),
        *[(name, c_int64) for name in ("head_stride", "token_stride", "heads", "tokens", "position")],
        ("values", c_int32), ("threads", c_int32), ("parallel", c_void_p),
    ]  # fmt: skip


class BlockCache(ctypes.Structure):
    """The cache of a decoder's block."""

    _fields_ = [
        ("keys", POINTER(Vectors)), ("values", POINTER(Vectors)),
        ("key_slabs", POINTER(Slab)), ("value_slabs", POINTER(Slab)),
    ]  # fmt: skip


class Token(ctypes.Structure):
    """One token and the decoder's cache."""

    _fields_ = [
        *[(name, c_void_p) for name in ("x", "cos", "sin", "logits")], ("caches", POINTER(BlockCache)),
        *[(name, c_int64) for name in ("position", "threads")],
    ]  # fmt: skip


class Field(ctypes.Structure):
    """An entry of the library's own table of its structs."""

    _fields_ = [("name", ctypes.c_char_p), ("offset", c_int64), ("size", c_int64)]


def declare(library: ctypes.CDLL) -> None:
    """Argument and result types of the library's functions."""
    pointers = [c_void_p] * 4
    library.mpq_linear.restype, library.mpq_linear.argtypes = c_int64, [POINTER(Weight), POINTER(Call)]
    library.mpq_linear_parts.restype = c_int64
    library.mpq_linear_parts.argtypes = [POINTER(POINTER(Weight)), POINTER(Call), c_int64]
    library.mpq_conv.restype = c_int64
    library.mpq_conv.argtypes = [POINTER(Weight), POINTER(Call), POINTER(Images)]
    library.mpq_embedding.argtypes = [POINTER(Weight), *pointers, c_int64, c_void_p]
    library.mpq_step.restype, library.mpq_step.argtypes = c_int64, [POINTER(Decoder), POINTER(Token)]
    library.mpq_attend.restype, library.mpq_attend.argtypes = c_int64, [POINTER(Attention)]
    library.mpq_append_tokens.restype, library.mpq_append_tokens.argtypes = None, [POINTER(Append), c_int64]
    library.mpq_dequantize.restype = None
    library.mpq_dequantize.argtypes = [POINTER(Weight), *pointers, ctypes.c_int, c_void_p]
    library.mpq_read.argtypes = [c_void_p, c_int64, ctypes.c_int, c_void_p]
    library.mpq_know.restype, library.mpq_know.argtypes = None, [ctypes.c_char_p, POINTER(Weight)]
