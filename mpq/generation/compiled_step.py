"""A decoding step of a packed LLaMA-style model in one call of compiled code, on a CPU: `decoder.step` in C.

In the Python loop, small models spend their time in Python, in about thirty small operations a block, and in starting
threads for every product. src/decoder.c computes a whole token instead: float32 between the packed products, keys and
values in the loop's cache, logits in the model's type.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules import module as everywhere

from mpq.generation.decoder import Block, Decoder, grow
from mpq.generation.memory import Memory, names_of
from mpq.kernels import blocks
from mpq.kernels.cpu import abi, panels
from mpq.kernels.cpu import attention as cached
from mpq.kernels.cpu import native as cpu
from mpq.kernels.mixed import MixedWeight
from mpq.kernels.modules import PackedLinear
from mpq.kernels.stacked import Stack
from mpq.kernels.weight import PackedWeight

_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class CompiledStep:
    """A decoder as passed to the library; `kept` owns what its pointers refer to."""

    decoder: Decoder
    library: ctypes.CDLL
    described: abi.Decoder
    vocabulary: int
    dtype: torch.dtype
    kept: Sequence[object]

    def __call__(self, token: Tensor, memory: Memory) -> Tensor | None:  # int (1, 1)
        """As `decoder.step` for one token; None, with the cache unchanged, where `decoder.step` has to compute it."""
        x = self.decoder.embed(token)
        if memory.length == memory.capacity:
            grow(self.decoder, memory, 2 * memory.length + 2, x)
        if len(memory.keys) != len(self.decoder.blocks) or torch.is_autocast_enabled("cpu"):
            return None
        if any(tensor.dtype != self.dtype or not tensor.is_contiguous() for tensor in (x, *memory.rotations)):
            return None
        if memory.described is None:
            memory.described = _caches(memory, self.decoder.head_width, self.dtype)
        if not memory.described:
            return None
        logits: Tensor = x.new_empty(self.vocabulary)
        cos, sin = (part[memory.length] for part in memory.rotations)
        status = self.library.mpq_step(self.described, abi.Token(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), logits.data_ptr(), memory.described, memory.length,
            torch.get_num_threads(),
        ))  # fmt: skip
        if status < 0:
            raise MemoryError("out of memory for the CPU kernel's scratch buffers")
        if status:
            return None
        memory.length += 1
        return logits


def compiled_step(decoder: Decoder) -> CompiledStep | None:
    """The decoder's step in compiled code, for the present weights.

    None unless the decoder is a Llama's, all linear layers are packed in panels on a CPU, with plain or int8-token
    activations and no hooks, and the norms are of one type, float32 or bfloat16.
    """
    native, width = cpu.native(), decoder.head_width
    norms = [_weight(norm) for block in decoder.blocks for norm in (block.attention_norm, block.mlp_norm)]
    norms.append(_weight(decoder.norm))
    if not decoder.is_llama:
        return None
    dtype = norms[-1].dtype
    if native is None or width % 2 or dtype not in _TYPES or not decoder.blocks:
        return None
    if any(norm.dtype != dtype or norm.device.type != "cpu" for norm in norms):
        return None
    linear = [part for block in decoder.blocks for part in _linear(block)] + [decoder.head]
    if not all(map(_plain, linear)) or len({_sizes(block, width) for block in decoder.blocks}) > 1:
        return None
    floats = [norm.detach().float().contiguous() for norm in norms]
    kept: list[object] = [*floats]
    blocks = [
        abi.Block(*_layers(block, kept), *(norm.data_ptr() for norm in floats[2 * index : 2 * index + 2]))
        for index, block in enumerate(decoder.blocks)
    ]
    described = abi.Decoder(
        (abi.Block * len(blocks))(*blocks), len(blocks), *_sizes(decoder.blocks[0], width), decoder.epsilon,
        dtype == torch.bfloat16, native.level, native.parallel, _one(decoder.head, kept), floats[-1].data_ptr(),
    )  # fmt: skip
    head: Any = decoder.head
    return CompiledStep(decoder, native.library, described, head.out_features, dtype, kept)


def _caches(memory: Memory, width: int, dtype: torch.dtype) -> ctypes.Array[abi.BlockCache] | tuple[()]:
    """The cache as passed to the library; () if the library cannot read it or round tokens to its formats."""
    arrays = []
    for index, parts in enumerate(zip(memory.keys, memory.values, strict=True)):
        names = names_of(memory if memory.packed else Memory(), index, dtype)
        if not memory.packed and any(part[0].dtype != dtype or not part[0].is_contiguous() for part in parts):
            return ()
        slabs = [cached.slabs_of(part) if memory.packed else _rows(part[0]) for part in parts]
        described = (cached.vectors_of(name, width, dtype) for name in names)
        vectors = [one for one in described if cached.rounds(one)]
        if len(vectors) < len(names):
            return ()
        arrays.append(abi.BlockCache(*map(ctypes.pointer, vectors), *slabs))  # type: ignore[arg-type]
    return (abi.BlockCache * len(arrays))(*arrays)


def _rows(floats: Tensor) -> ctypes.Array[abi.Slab]:  # (1, key heads, capacity, head width)
    """A float cache as one slab; the last block may extend past its end."""
    count = -(-floats.shape[2] // blocks.TOKENS)
    return (abi.Slab * 1)(abi.Slab(floats.data_ptr(), count, floats.stride(1) * floats.itemsize))


def _linear(block: Block) -> tuple[Any, ...]:
    return block.q, block.k, block.v, block.o, block.gate, block.up, block.down


def _sizes(block: Block, width: int) -> tuple[int, ...]:
    """Width, hidden width, heads, key heads and head width of a block."""
    q, k, _, _, gate, *_ = _linear(block)
    return q.in_features, gate.out_features, q.out_features // width, k.out_features // width, width


def _weight(norm: Any) -> Tensor:
    weight: Tensor = norm.weight
    return weight


def _plain(module: Any) -> bool:
    """Whether a module is a packed linear layer that the library computes identically."""
    if type(module) is not PackedLinear or "forward" in vars(module) or _hooked(module):
        return False
    parts, bias = _parts(module.weight), module.bias
    return (
        len(parts) <= abi.MAX_PARTS and module.activation in ("", "int8-channel")
        and all(part.layout == panels.NAME and part.device.type == "cpu" for part in parts)
        and not (module.activation and any(_is_bf16(part) for part in parts))
        and (bias is None or (bias.dtype in _TYPES and bias.is_contiguous()))
    )  # fmt: skip


def _parts(weight: PackedWeight) -> list[PackedWeight]:
    return weight.parts if isinstance(weight, MixedWeight) else [weight]


def _is_bf16(part: PackedWeight) -> bool:
    return cpu._plan(*part.signature[:3]).kind == panels.TABLE_BF16


def _hooked(module: Any) -> bool:
    own = (module._forward_hooks, module._forward_pre_hooks, everywhere._global_forward_hooks)
    return any((*own, everywhere._global_forward_pre_hooks))


def _layers(block: Block, kept: list[object]) -> list[abi.Layer]:
    """The block's seven layers; layers with one input are joined in the first one's place."""
    q, k, v, o, gate, up, down = _linear(block)
    return [*_together((q, k, v), kept), _one(o, kept), *_together((gate, up), kept), _one(down, kept)]


def _together(members: Sequence[Any], kept: list[object]) -> list[abi.Layer]:
    """Layers with one input: a stack is one weight; others become parts of one layer, if it can have as many."""
    stack: Stack | None = members[0].stack
    if stack is not None and len(stack.members) == len(members) and stack.intact() and all(
        one is other for one, other in zip(stack.members, members, strict=True)
    ):  # fmt: skip
        bias = None if members[0].bias is None else torch.cat([member.bias for member in members])
        signature = (stack.signature[0], stack.signature[1], stack.signature[2])
        first = _layer([_part(stack.tensors, signature, None, kept)], bias, members[0].activation, kept)
    else:
        kinds = {(member.activation, None if member.bias is None else member.bias.dtype) for member in members}
        if len(kinds) > 1 or sum(len(_parts(member.weight)) for member in members) > abi.MAX_PARTS:
            return [_one(member, kept) for member in members]
        first = _joined(members, kept)
    return [first] + [abi.Layer()] * (len(members) - 1)


def _joined(members: Sequence[Any], kept: list[object]) -> abi.Layer:
    """All parts of several layers, whose outputs the library keeps at multiples of 16."""
    parts, biases, start = [], [], 0
    for member in members:
        places = member.weight.places if isinstance(member.weight, MixedWeight) else torch.arange(member.weight.rows)
        parts += _parts_of(member.weight, places + start, kept)
        room = -(-member.weight.rows // 16) * 16
        if member.bias is not None:
            biases.append(functional.pad(member.bias.detach(), (0, room - member.weight.rows)))
        start += room
    return _layer(parts, torch.cat(biases) if biases else None, members[0].activation, kept)


def _one(module: Any, kept: list[object]) -> abi.Layer:
    places = module.weight.places if isinstance(module.weight, MixedWeight) else None
    return _layer(_parts_of(module.weight, places, kept), module.bias, module.activation, kept)


def _parts_of(weight: PackedWeight, places: Tensor | None, kept: list[object]) -> list[abi.Part]:
    """The weight's parts, whose rows stand at these places one after the other."""
    parts = _parts(weight)
    each = [None] * len(parts) if places is None else torch.split(places, [part.rows for part in parts])
    return [_part(part.tensors, part.signature[:3], own, kept) for part, own in zip(parts, each, strict=True)]


def _part(
    tensors: Sequence[Tensor], signature: tuple[str, int, int], places: Tensor | None, kept: list[object]
) -> abi.Part:
    kept += [*tensors, places]
    scale = tensors[1].data_ptr() if len(tensors) > 1 else 0
    weight = ctypes.pointer(cpu._plan(*signature).weight)
    return abi.Part(weight, tensors[0].data_ptr(), scale, 0 if places is None else places.data_ptr())


def _layer(parts: Sequence[abi.Part], bias: Tensor | None, activation: str, kept: list[object]) -> abi.Layer:
    kept.append(bias)
    address, is_bf16 = (0, 0) if bias is None else (bias.data_ptr(), int(bias.dtype == torch.bfloat16))
    return abi.Layer((abi.Part * len(parts))(*parts), address, len(parts), is_bf16, 1 if activation else 2)
