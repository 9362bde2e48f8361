"""The quantizable layers of a model: finding them, their ties, and their weights as matrices."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.patterns import match_names
from mpq.network.experts import warn_about_stacks
from mpq.network.prepare import computes_weight

# Serving kernels compute these siblings in one product, so they must share a format.
FUSED = {
    "qkv": ({"q_proj", "k_proj", "v_proj"}, {"wq", "wk", "wv"}, {"query", "key", "value"}),
    "gate_up": ({"gate_proj", "up_proj"}, {"w1", "w3"}),
}
BASES: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "embedding": nn.Embedding,
    "conv3d": nn.Conv3d,
    "transposed-conv1d": nn.ConvTranspose1d,
    "transposed-conv2d": nn.ConvTranspose2d,
    "transposed-conv3d": nn.ConvTranspose3d,
}
PACKED_KINDS = ("linear", "conv1d", "conv2d", "embedding", "transformers-conv1d")  # kinds with a packed module
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)")  # one product for all experts


def layer_kind(module: nn.Module) -> str | None:
    """The kind of a quantizable module, None for any other.

    A layer has one plain floating-point weight of two dimensions or more, none of them 0. Left out are the output
    projection of nn.MultiheadAttention, which reads its weight in a fused kernel, and weights that a property computes.
    """
    kind = next((kind for kind, cls in BASES.items() if isinstance(module, cls)), None)
    if kind is None and _transformers_conv1d(module) is not None:
        kind = "transformers-conv1d"
    if kind is None or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return None
    stored = "weight" in module._parameters or "weight" in module._buffers or computes_weight(module)
    weight = getattr(module, "weight", None) if stored else None
    if not isinstance(weight, Tensor) or weight.ndim < 2 or weight.dtype not in FLOATS:
        return None
    if type(weight) not in (Tensor, nn.Parameter):  # other tensors may hold packed numbers
        return None
    return kind if weight.numel() else None


def own_code(module: nn.Module) -> bool:
    """Whether a layer's own code must run on its packed weight.

    True for kinds without a packed module, and for layers whose `forward` differs from their kind's.
    """
    base = next((cls for kind, cls in BASES.items() if isinstance(module, cls) and kind in PACKED_KINDS), None)
    if base is None:
        base = _transformers_conv1d(module)
    if base is None:
        return True
    names = ("forward", "_conv_forward") if hasattr(base, "_conv_forward") else ("forward",)
    return any(name in vars(module) or getattr(type(module), name) is not getattr(base, name) for name in names)


def _transformers_conv1d(module: nn.Module) -> type[nn.Module] | None:
    """transformers' Conv1D, where the module is one or inherits from it, as parametrized modules do."""
    bases = (cls for cls in type(module).__mro__ if cls.__name__ == "Conv1D")
    return next((cls for cls in bases if cls.__module__.startswith("transformers.")), None)


def find_layers(
    model: nn.Module, include: str | Iterable[str] = ("*",), exclude: str | Iterable[str] = ()
) -> tuple[Layer, ...]:
    """The quantizable layers in the model's order, each shared weight once, with their ties.

    Args:
        model: a module that holds layers; a bare layer is refused since it has no name.
        include: patterns (globs, or "re:" and a regular expression) of the layers to take.
        exclude: patterns of layers to leave out; wins over `include`. A weight shared by several modules is taken when
            one of its names is included, and left out when one is excluded.

    Raises:
        MpqError: no layers, or a pattern that matches none of them.
    """
    if layer_kind(model) is not None:
        raise MpqError("the model is a single layer and has no name: wrap it in torch.nn.Sequential")
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if layer_kind(module) is not None:
            holders.setdefault(id(module._parameters.get("weight", module)), []).append((name, module))
    warn_about_stacks(model)
    names = [name for modules in holders.values() for name, _ in modules]
    if not names:
        raise MpqError(f"{type(model).__name__} has no layer to quantize: expected a Linear, convolution or Embedding")
    included = set(match_names(include, names)) if include else set()
    excluded = set(match_names(exclude, names))
    layers = [
        _layer(modules)
        for modules in holders.values()
        if any(name in included for name, _ in modules) and not any(name in excluded for name, _ in modules)
    ]
    if not layers:
        raise MpqError(f"no layer is left of {', '.join(names[:4])}, ...: include more or exclude less")
    return _tied(layers)


def _layer(holders: Sequence[tuple[str, nn.Module]]) -> Layer:
    (name, module), *others = holders
    kind = layer_kind(module)
    assert kind is not None
    rows, cols = weight_matrix(module).shape
    return Layer(name, kind, rows, cols, aliases=tuple(alias for alias, _ in others))


def _tied(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers with ties set for fused siblings: "<parent>.qkv", "<parent>.gate_up", and for all experts of a block:
    "<parent>.experts.gate_up", "<parent>.experts.down".
    """
    siblings: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        siblings.setdefault(parent, {})[leaf] = layer
    ties: dict[str, str] = {}
    for parent, leaves in siblings.items():
        for fused, families in FUSED.items():
            for family in families:
                members = [leaves[leaf] for leaf in sorted(family & leaves.keys())]
                if len(members) > 1 and len({(member.kind, member.cols) for member in members}) == 1:
                    ties.update((member.name, f"{parent}.{fused}".lstrip(".")) for member in members)
    for layer in layers:
        if expert := EXPERT.fullmatch(layer.name):
            ties[layer.name] = f"{expert[1]}.{'down' if expert[2] in ('down_proj', 'w2') else 'gate_up'}"
    return tuple(replace(layer, tie=ties.get(layer.name, "")) for layer in layers)


def is_transposed(kind: str | None) -> bool:
    """Whether weights of this kind have the input channels first: transformers' Conv1D, transposed convolutions."""
    return kind is not None and kind.startswith("trans")


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight as (rows, cols): (out, in / groups * kernel), for an embedding (tokens, width).

    A view, but for transposed convolutions, whose matrix is (out / groups, in * kernel), a copy.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    return (weight.transpose(0, 1) if is_transposed(layer_kind(module)) else weight).flatten(1)


def matrix_to_weight(matrix: Tensor, module: nn.Module) -> Tensor:
    """The inverse of `weight_matrix`: (rows, cols) in the shape of the module's own weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return shaped(matrix, weight.shape, is_transposed(layer_kind(module)))


def shaped(matrix: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """A matrix (rows, cols) in the shape of the weight."""
    if not transposed:
        return matrix.reshape(tuple(shape))
    return matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def weight_groups(module: nn.Module) -> int:
    """Convolution groups: row blocks of the weight matrix with separate inputs; 1 for other layers."""
    return module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1


def input_matrix(module: nn.Module, inputs: Tensor) -> Tensor:
    """Left operand of the weight matrix: (groups, samples * positions, cols), without the first dimension for 1 group.

    A convolution's inputs are unfolded: its outputs are `input_matrix @ weight_matrix.T`, positions in row-major order.

    Raises:
        MpqError: an embedding, whose inputs are indices.
    """
    if isinstance(module, nn.Embedding):
        raise MpqError("an embedding has no input matrix: its inputs are indices")
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return inputs.reshape(-1, inputs.shape[-1])
    spatial = len(module.kernel_size)
    if inputs.ndim == spatial + 1:
        inputs = inputs.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    columns = _windows(padded.unsqueeze(2) if spatial == 1 else padded, module)
    columns = columns.reshape(-1, module.groups, columns.shape[-1] // module.groups).transpose(0, 1)
    return columns if module.groups > 1 else columns[0]


def _windows(padded: Tensor, module: nn.Conv1d | nn.Conv2d) -> Tensor:
    """Input windows of a convolution at every position: (samples, height, width, in * kernel).

    One strided copy for each place of the kernel: half the time of `unfold`, whose positions come last.
    """
    one = (1,) * (2 - len(module.kernel_size))
    kernel, step, apart = ((*one, *sizes) for sizes in (module.kernel_size, module.stride, module.dilation))
    high, wide = (
        (size - gap * (length - 1) - 1) // stride + 1
        for size, gap, length, stride in zip(padded.shape[2:], apart, kernel, step, strict=True)
    )
    pixels = padded.permute(0, 2, 3, 1)
    windows = padded.new_empty(len(padded), high, wide, padded.shape[1], kernel[0] * kernel[1])
    for place in range(windows.shape[-1]):
        top, left = place // kernel[1] * apart[0], place % kernel[1] * apart[1]
        rows, columns = (
            slice(top, top + (high - 1) * step[0] + 1, step[0]),
            slice(left, left + (wide - 1) * step[1] + 1, step[1]),
        )
        windows[..., place] = pixels[:, rows, columns]
    return windows.flatten(3)


def output_matrix(module: nn.Module, outputs: Tensor) -> Tensor:
    """Outputs or their gradients as rows in the order of `input_matrix`: (groups, samples * positions, rows / groups),
    without the first dimension for 1 group.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return outputs.reshape(-1, outputs.shape[-1])
    if outputs.ndim == len(module.kernel_size) + 1:
        outputs = outputs.unsqueeze(0)
    columns = _by_group(outputs.flatten(2), module.groups)
    return columns if module.groups > 1 else columns[0]


def _by_group(columns: Tensor, groups: int) -> Tensor:
    """(samples, groups * size, positions) as (groups, samples * positions, size)."""
    samples, _, positions = columns.shape
    split = columns.reshape(samples, groups, -1, positions)
    return split.permute(1, 0, 3, 2).reshape(groups, samples * positions, -1)
