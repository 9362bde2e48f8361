"""Choices of architecture with shared weights, searched jointly with formats (FLIQNAS, arXiv 2308.03290).

Smaller options use a part of the largest one's weights: the first channels, the middle of a kernel. Unused weights are
set to zero before rounding, so that they do not affect scales, and have no cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError, nearest_names
from mpq.core.layer import Layer
from mpq.network.layers import is_transposed
from mpq.rounding.reference import Quantized


@dataclass(frozen=True)
class Width:
    """A choice of width: the number of channels between layers that are used."""

    produced_by: tuple[str, ...]  # layers that compute them: a convolution, and a depthwise one after it
    read_by: tuple[str, ...]  # layers that read them
    shares: tuple[float, ...] = (0.5, 0.75, 1.0)  # shares of the channels; the last one is all
    along: tuple[str, ...] = ()  # batch normalizations of these channels

    @property
    def options(self) -> int:
        """Number of widths."""
        return len(self.shares)


@dataclass(frozen=True)
class Kernel:
    """A choice of kernel size: the side of the used middle of a convolution's square kernel."""

    layer: str
    sizes: tuple[int, ...]  # ascending; the last one is the whole kernel

    @property
    def options(self) -> int:
        """Number of sizes."""
        return len(self.sizes)


Choice = Width | Kernel


class Architecture:
    """The choices of a model; options are indices, one for each choice.

    Raises:
        MpqError: an unknown layer, shares or sizes that are not ascending to the whole, or a layer that cannot be cut.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], choices: Sequence[Choice]) -> None:
        self.choices = tuple(choices)
        self._index = {layer.name: index for index, layer in enumerate(layers)}
        self._kernels: dict[str, int] = {}
        for choice in self.choices:
            names = (choice.layer,) if isinstance(choice, Kernel) else (*choice.produced_by, *choice.read_by)
            for name in names:
                if name not in self._index:
                    raise MpqError(f"unknown layer {name!r} in a choice: {nearest_names(name, self._index)}")
                layer = layers[self._index[name]]
                if layer.aliases or is_transposed(layer.kind) or layer.kind == "embedding":
                    raise MpqError(f"layer {name} is {layer.kind} or shares its weight: its width cannot be chosen")
            if isinstance(choice, Width):
                self._check_width(choice, layers)
            else:
                self._check_kernel(choice, model.get_submodule(choice.layer))

    def _check_width(self, width: Width, layers: Sequence[Layer]) -> None:
        if list(width.shares) != sorted(set(width.shares)) or width.shares[0] <= 0 or width.shares[-1] != 1:
            raise MpqError(f"invalid shares {width.shares}: expected them ascending from above 0 to 1")
        channels = {layers[self._index[name]].rows for name in width.produced_by}
        if len(channels) != 1 or any(layers[self._index[name]].cols % min(channels) for name in width.read_by):
            raise MpqError(
                f"the layers of a width differ in channels: {', '.join((*width.produced_by, *width.read_by))}"
            )

    def _check_kernel(self, kernel: Kernel, module: nn.Module) -> None:
        whole = module.kernel_size[0] if isinstance(module, nn.Conv2d) else 0
        same_parity = all(size % 2 == whole % 2 for size in kernel.sizes)
        if not same_parity or list(kernel.sizes) != sorted(set(kernel.sizes)) or kernel.sizes[-1] != whole:
            raise MpqError(
                f"invalid sizes {kernel.sizes} of the kernel of {kernel.layer}: expected steps of 2 to {whole}"
            )
        assert isinstance(module, nn.Conv2d)
        if module.kernel_size[1] != whole or isinstance(module.padding, str):
            raise MpqError(f"the kernel of {kernel.layer} cannot be cut: expected a square one with padding in numbers")
        self._kernels[kernel.layer] = whole

    def kept(self, layers: Sequence[Layer], options: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Rows and columns of each layer's matrix that are used, int64."""
        rows = [layer.rows for layer in layers]
        columns = [torch.ones(layer.cols, dtype=torch.bool) for layer in layers]
        for choice, option in zip(self.choices, options, strict=True):
            if isinstance(choice, Width):
                channels = layers[self._index[choice.produced_by[0]]].rows
                count = math.ceil(choice.shares[option] * channels)
                for name in choice.produced_by:
                    rows[self._index[name]] = count
                for name in choice.read_by:
                    columns[self._index[name]].view(channels, -1)[count:] = False
            else:
                whole, size = self._kernels[choice.layer], choice.sizes[option]
                edge = (whole - size) // 2
                middle = torch.zeros(whole, whole, dtype=torch.bool)
                middle[edge : edge + size, edge : edge + size] = True
                columns[self._index[choice.layer]].view(-1, whole * whole)[:, ~middle.flatten()] = False
        return [(torch.arange(count), column.nonzero().flatten()) for count, column in zip(rows, columns, strict=True)]

    def scaled(self, layers: Sequence[Layer], options: Sequence[int]) -> tuple[Layer, ...]:
        """The layers with only the used rows, columns and multiplications."""
        found = []
        for layer, (rows, columns) in zip(layers, self.kept(layers, options), strict=True):
            macs = layer.macs * len(rows) * len(columns) // (layer.rows * layer.cols)
            found.append(replace(layer, rows=len(rows), cols=len(columns), macs=macs))
        return tuple(found)

    def masks(self, layers: Sequence[Layer], options: Sequence[int]) -> dict[str, Tensor]:
        """Mask of each layer's matrix, (1, cols), by name; unused rows are not masked, since nothing reads them."""
        pairs = zip(layers, self.kept(layers, options), strict=True)
        masks = {
            layer.name: torch.zeros(1, layer.cols, dtype=torch.float32).index_fill_(1, columns, 1)
            for layer, (_, columns) in pairs
        }
        return {name: mask for name, mask in masks.items() if not bool(mask.all())}

    @torch.no_grad()
    def cut(self, model: nn.Module, options: Sequence[int]) -> None:
        """Remove unused rows and columns from the model's layers and normalizations, in place."""
        for choice, option in zip(self.choices, options, strict=True):
            if isinstance(choice, Width):
                first = model.get_submodule(choice.produced_by[0])
                channels = len(first.weight)  # type: ignore[arg-type]
                count = math.ceil(choice.shares[option] * channels)
                for name in chain(choice.produced_by, choice.along):
                    _cut_rows(model.get_submodule(name), count)
                for name in choice.read_by:
                    _cut_inputs(model.get_submodule(name), channels, count)
            else:
                _cut_kernel(model.get_submodule(choice.layer), choice.sizes[option])


def sliced(quantized: Quantized, rows: Tensor, columns: Tensor) -> Quantized:
    """Some rows and columns of a matrix with scales per channel or for the tensor."""
    tables = quantized.map_tables(lambda _, table: table[rows] if table.ndim and len(table) > 1 else table)
    return replace(tables, shape=(len(rows), len(columns)), codes=quantized.codes[rows][:, columns])


def _cut_rows(module: nn.Module, count: int) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.ndim:
            tensor.data = tensor.data[:count].clone()
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:  # depthwise
            module.groups = module.in_channels = count
        module.out_channels = count
    elif isinstance(module, nn.Linear):
        module.out_features = count
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.num_features = count


def _cut_inputs(module: nn.Module, channels: int, count: int) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.data = weight.data[:, : weight.shape[1] // channels * count].clone()
    if isinstance(module, nn.Conv2d):
        module.in_channels = count
    elif isinstance(module, nn.Linear):
        module.in_features = weight.shape[1]


def _cut_kernel(module: nn.Module, size: int) -> None:
    assert isinstance(module, nn.Conv2d)
    edge = (module.kernel_size[0] - size) // 2
    if edge:
        module.weight.data = module.weight.data[..., edge:-edge, edge:-edge].clone()
        module.kernel_size = (size, size)
        assert not isinstance(module.padding, str)
        module.padding = (module.padding[0] - edge * module.dilation[0], module.padding[1] - edge * module.dilation[1])
        module._reversed_padding_repeated_twice = [pad for pad in reversed(module.padding) for _ in range(2)]
