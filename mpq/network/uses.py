"""All uses of the layers' weights in a forward pass: calls of their modules, products computed elsewhere, and other
reads of the values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mpq.core.layer import Layer
from mpq.network.calls import call_input
from mpq.network.layers import matrix_to_weight, own_code, weight_matrix

# see(layer name, module, inputs, outputs) returns replacements of the outputs, or None to keep them.
See: TypeAlias = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]


def _without_weights(cls: type[Any]) -> Any:
    """The class without weight initialization, which `torch.vmap` refuses."""
    return type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})


LINEAR, EMBEDDING = _without_weights(nn.Linear), _without_weights(nn.Embedding)
CONVOLUTIONS: dict[Any, type[nn.Conv1d | nn.Conv2d]] = {
    functional.conv1d: _without_weights(nn.Conv1d),
    functional.conv2d: _without_weights(nn.Conv2d),
}
VIEWS = ("T", "mT", "H", "mH", "data", "real")  # properties of a tensor that give its values
ABOUT = frozenset(
    {"size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex"}
    | {"element_size", "data_ptr", "storage_offset", "get_device", "__len__", "__hash__", "__repr__", "requires_grad_"}
)


@contextmanager
def seeing_uses(
    model: nn.Module, layers: Sequence[Layer], see: See, inside: Callable[[nn.Module], bool] = own_code
) -> Iterator[None]:
    """Call `see` at every use of a layer's weight inside the block.

    The call of a plain module is a use with that module. A product or look-up with the whole weight anywhere else is a
    use with a stand-in: an nn.Linear, convolution or embedding with the same weight and the call's stride and padding,
    without bias. Any other read of the values is a use of an embedding in which every row is looked up once; its
    outputs are the weight matrix.

    Args:
        model: without computed weights, see `mpq.network.prepare`.
        layers: whose uses are seen.
        see: called at each use.
        inside: the modules whose code is traced; others count as one call.
    """
    modules = {model.get_submodule(name): layer.name for layer in layers for name in layer.names}
    watch = _Watch(modules, see)

    def enter(module: nn.Module, args: Any) -> None:
        watch.depth += 1

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        watch.depth -= 1
        if isinstance(output, Tensor):
            return see(name, module, call_input(args, kwargs), output)
        return None

    handles = []
    for module, name in modules.items():
        if not inside(module):  # a copy that is made during the pass keeps its hooks, and so its name
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True, always_call=True))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Checks the arguments of every torch function outside of plain modules for a layer's weight."""

    def __init__(self, modules: Mapping[nn.Module, str], see: See) -> None:
        super().__init__()
        self.modules = {id(module.weight): (module, name) for module, name in modules.items()}
        self.see, self.depth = see, 0
        self.read: dict[int, Tensor] = {}  # replacements of weights that were read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth or _is_about(func) or not any(map(self._holds, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if id(weight) in self.modules and (stand_in := _stand_in(func, *args, **kwargs)) is not None:
            output = func(*args, **kwargs)
            inputs = args[0] if args else kwargs["input"]
            seen = self.see(self.modules[id(weight)][1], stand_in, inputs, output)
            return output if seen is None else seen
        return func(*map(self._numbers, args), **{name: self._numbers(value) for name, value in kwargs.items()})

    def _holds(self, value: Any) -> bool:
        return any(map(self._holds, value)) if type(value) in (list, tuple) else id(value) in self.modules

    def _numbers(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._numbers, value))
        if id(value) not in self.modules:
            return value
        if id(value) not in self.read:
            module, name = self.modules[id(value)]
            matrix = weight_matrix(module).detach()
            seen = self.see(name, _embedding(value, matrix), torch.arange(len(matrix), device=value.device), matrix)
            self.read[id(value)] = value if seen is None else matrix_to_weight(seen, module)
        return self.read[id(value)]


def _is_about(func: Any) -> bool:
    """Whether a function reads metadata of a tensor and not its values."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in VIEWS
    return name in ABOUT or name == "__set__"


def _stand_in(func: Any, input: Any = None, weight: Any = None, *args: Any, **kwargs: Any) -> nn.Module | None:
    """The plain module equivalent to a product or look-up with a whole weight; None for other functions."""
    if func is functional.embedding:
        return _embedding(weight, weight)
    if func is functional.linear and weight.ndim == 2:
        linear: nn.Linear = LINEAR(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear._parameters["weight"] = weight
        return linear
    if func in CONVOLUTIONS:
        return _convolution(CONVOLUTIONS[func], weight, *args, **kwargs)
    return None


def _convolution(
    cls: type[nn.Conv1d | nn.Conv2d],
    weight: nn.Parameter,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> nn.Module:
    size: Any = tuple(weight.shape[2:])
    sides = [_whole(value) for value in (stride, padding, dilation)]
    stride, padding, dilation = sides
    channels = weight.shape[1] * groups, weight.shape[0]
    conv = cls(*channels, size, stride, padding, dilation, groups, bias=False, device="meta")
    conv._parameters["weight"] = weight
    return conv


def _whole(value: Any) -> Any:
    return value if isinstance(value, (int, str)) else value[0] if len(value) == 1 else tuple(value)


def _embedding(weight: Any, matrix: Tensor) -> nn.Embedding:
    rows, cols = matrix.shape
    embedding: nn.Embedding = EMBEDDING(rows, cols, device="meta")
    embedding._parameters["weight"] = weight
    return embedding
