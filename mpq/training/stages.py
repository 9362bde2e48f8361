"""HAWQ's staged fine-tuning (arXiv 1905.03696): quantize some layers, train, then the next ones."""

from collections.abc import Collection, Sequence
from itertools import pairwise

from torch import nn

from mpq.core.errors import MpqError
from mpq.quantized import InputRounding, WeightRounding, rounding_of


def stages(order: Sequence[str], count: int) -> tuple[tuple[str, ...], ...]:
    """Split the layers into `count` runs of nearly equal length.

    >>> stages(("a", "b", "c", "d", "e"), 2)
    (('a', 'b', 'c'), ('d', 'e'))
    """
    if not 1 <= count <= len(order):
        raise MpqError(f"invalid number of stages {count}: expected 1 to {len(order)}, the number of layers")
    ends = [-(-len(order) * stage // count) for stage in range(count + 1)]
    return tuple(tuple(order[start:end]) for start, end in pairwise(ends))


def quantize_only(student: nn.Module, names: Collection[str] | None) -> None:
    """Make these layers of a simulation compute in their schemes, the others in floating point; None: all layers.

    A layer that shares its weight is named by any of its names.
    """
    names_of: dict[WeightRounding, set[str]] = {}
    for name, module in student.named_modules(remove_duplicate=False):
        if (rounding := rounding_of(module)) is not None:
            names_of.setdefault(rounding, set()).add(name)
    for rounding, own in names_of.items():
        rounding.active = names is None or not own.isdisjoint(names)
        for name in own:
            for hook in student.get_submodule(name)._forward_pre_hooks.values():
                if isinstance(hook, InputRounding):
                    hook.active = rounding.active
