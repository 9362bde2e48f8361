"""One product for layers that read the same input: q, k and v, or gate and up.

Their panels share one buffer, of which each layer's weight is a view; nothing else about the layers changes. The first
layer called with an input computes all outputs; the others return their slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpq.kernels.cpu.pages import empty_on_large_pages
from mpq.kernels.cpu.panels import NAME, ROWS


@dataclass
class Pass:
    """The last input, outputs split by member, and the members that have taken theirs."""

    input: Tensor
    version: int
    outputs: tuple[Tensor, ...]
    taken: set[int] = field(default_factory=set)


class Stack:
    """Packed linear layers of one scheme and input width, their rows one below the other."""

    def __init__(self, members: Sequence[Any]) -> None:
        weights = [member.weight for member in members]
        first = weights[0]
        parts = [weight.tensors[0] for weight in weights]
        whole = empty_on_large_pages((sum(map(len, parts)), parts[0].shape[1]), torch.uint8)
        torch.cat(parts, out=whole)
        start = 0
        for weight in weights:
            count = len(weight.tensors[0])
            weight._buffers["panels"] = whole[start : start + count]
            start += count
        self.members, self.tensors = list(members), [whole, *first.tensors[1:]]
        self.views = [weight.tensors[0] for weight in weights]
        self.sizes = [weight.rows for weight in weights]
        self.signature = (first.format.name, sum(self.sizes), first.cols, NAME)
        self.last: Pass | None = None

    def output(self, member: Any, input: Tensor) -> Tensor | None:
        """The member's output, or None when it must compute alone.

        That is under torch.compile, when the input requires gradients, and after a member's weight was replaced. A
        change of the input in place between two members' calls is detected outside of inference mode only.
        """
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and input.requires_grad) or not self.intact():
            return None
        index = next(index for index, other in enumerate(self.members) if other is member)
        version = -1 if input.is_inference() else input._version
        last = self.last
        if last is None or last.input is not input or last.version != version or index in last.taken:
            bias = None if member.bias is None else torch.cat([one.bias for one in self.members])
            whole = torch.ops.mpq.linear.default(input, self.tensors, bias, *self.signature, member.activation)
            self.last = last = Pass(input, version, whole.split(self.sizes, -1))
        last.taken.add(index)
        if len(last.taken) == len(self.members):
            self.last = None
        return last.outputs[index]

    def intact(self) -> bool:
        """Whether the members' weights are still the stack's."""
        pairs = zip(self.members, self.views, strict=True)
        return all(member.weight._buffers.get("panels") is view for member, view in pairs)


def stackable(members: Sequence[Any]) -> bool:
    """Whether packed linear layers fit one stack.

    They need the same format, activation format, width and kind of bias, in panels, with whole panels in all but the
    last; formats with a tensor scale need the same one.
    """
    first = members[0]
    if len(members) < 2 or first.weight.layout != NAME or first.weight.format.granularity == "tensor":
        return False
    kinds = {
        (one.weight.format, one.weight.cols, one.weight.layout, one.weight.device, one.activation, one.bias is None)
        for one in members
    }
    rest = first.weight.tensors[1:]
    return (
        len(kinds) == 1
        and len({id(one.weight) for one in members}) == len(members)
        and all(one.weight.rows % ROWS == 0 for one in members[:-1])
        and all(torch.equal(*pair) for one in members for pair in zip(one.weight.tensors[1:], rest, strict=True))
    )
