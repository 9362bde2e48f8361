"""Checks of budgets, targets and devices by a model's structure, before its weights are read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from mpq.core.cache import cache_name, parse_cache_format
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.registry import Target
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.exporters.holding import Held, check_model, restrict, unscored
from mpq.exporters.targets import formats_of
from mpq.kernels.cpu.attention import rounds, vectors_of
from mpq.network.layers import find_layers
from mpq.network.storage import other_bytes
from mpq.rounding.codes import COPY_DTYPES
from mpq.sources.structure import structure_of

INT8_TOKEN = parse_scheme("int8-channel+a:int8-token").activation  # what the kernels of layers round themselves
SAMPLE = (1, 8)  # texts and tokens with which a structure is called to see its cache


@dataclass(frozen=True)
class Wanted:
    """A request: budgets, formats and layers, as in `mpq.pipeline.quantize_model`.

    Raises:
        MpqError: no budget, or several that exclude each other.
    """

    bits: float | None = None
    size: float | str | None = None
    max_kl: float | None = None
    memory: float | str | None = None
    context: int | None = None
    batch: int = 1
    kv_bits: float | None = None
    kv_formats: Sequence[str] | None = None
    formats: Sequence[str] | None = None
    metric: str = ""
    include: str | Iterable[str] = ("*",)
    exclude: str | Iterable[str] = ()
    pin: Mapping[str, str] | None = None
    ties: bool = True
    table: SensitivityTable | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given = sum(budget is not None for budget in (self.bits, self.size, self.max_kl))
        nothing = not given and self.memory is None and self.kv_bits is None
        if given > 1 or nothing or (self.max_kl is not None and self.memory is not None):
            raise MpqError(
                "name one budget: bits, size or max_kl; memory goes alone or with bits or size, kv_bits with all"
            )

    @property
    def keeps_weights(self) -> bool:
        """Whether the cache alone has a budget: weights stay as they are."""
        return self.memory is None and self.bits is None and self.size is None and self.max_kl is None


def check_structure(name: str, target: Target, wanted: Wanted) -> None:
    """Refuse a request that the model of this name cannot meet; no check if its structure cannot be built alone.

    Raises:
        MpqError: an unknown model, one that the target does not know, a budget that nothing fits, with what would.
    """
    model = structure_of(name)
    if model is None:
        return
    _, held = held_layers(model, target, wanted)
    if wanted.memory is not None or wanted.kv_bits is not None or wanted.context is not None:
        _check_cache(name, model, target, wanted, held)


def without_kernels(schemes: Iterable[str], cached: Iterable[str], entries: Sequence[Layer]) -> list[str]:
    """Sentences on the schemes and cache formats for which there are no compiled kernels."""
    named = [name for name in schemes if parse_scheme(name).activation is not None]
    slow = [name for name in named if parse_scheme(name).activation != INT8_TOKEN]
    widths = sorted({entry.cols for entry in entries})
    floats = [
        name for name in cached if not all(rounds(vectors_of(cache_name(parse_cache_format(name)), w)) for w in widths)
    ]
    sentences = []
    if slow:
        sentences.append(
            f"no compiled kernel multiplies the activations of {', '.join(slow)}: they are rounded separately and take "
            "several times as long as a:int8-token ('mpq bench --formats' times them)"
        )
    if floats:
        sentences.append(
            f"compiled attention does not read or write {', '.join(floats)} in heads of {', '.join(map(str, widths))}: "
            "'mpq generate' is slow with them, or stores them as floats, in more memory than predicted"
        )
    return sentences


def held_layers(model: nn.Module, target: Target, wanted: Wanted) -> tuple[tuple[Layer, ...], Held]:
    """The model's layers and the requested formats that they can have, without scores if there is no table.

    Raises:
        MpqError: a model that the target does not know, or a budget of weights that nothing fits.
    """
    check_model(target, model)
    formats, bits = wanted.formats or formats_of(target), wanted.bits
    if wanted.keeps_weights:
        formats, bits = own_format(model)
    table = wanted.table
    layers = table.weights().layers if table else find_layers(model, wanted.include, wanted.exclude)
    held = restrict(table or unscored(layers, formats, other_bytes(model, layers)), target)
    if wanted.max_kl is None:
        held.check_budget(bits=bits, size=wanted.size, pin=wanted.pin, ties=wanted.ties)
    return layers, held


def own_format(model: nn.Module) -> tuple[tuple[str], float]:
    """The format that weights have in a model, and its bits."""
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    name = next(name for name, known in COPY_DTYPES.items() if known == dtype)
    return (name,), 8.0 * dtype.itemsize


def _check_cache(name: str, model: nn.Module, target: Target, wanted: Wanted, held: Held) -> None:
    from mpq.memory import candidates, check_memory, serving_of
    from mpq.network.calibration import next_token_loss
    from mpq.sources import Source

    tokens = torch.zeros(SAMPLE, dtype=torch.long, device="meta")
    source = Source(name, model, (tokens,), (), next_token_loss, "perplexity")
    serving = serving_of(source, wanted.memory, wanted.kv_bits, wanted.context, wanted.batch)
    if serving is None:
        return
    try:
        entries, cached = candidates(source, target, wanted.table, wanted.kv_formats, wanted.metric)
    except MpqError:
        raise
    except Exception:  # a model whose forward depends on values
        return
    check_memory(serving, entries, cached, held.least(pin=wanted.pin, ties=wanted.ties))
