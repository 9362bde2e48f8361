"""Peak memory of activations at any batch and context, from one pass over tensors without numbers."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mpq.core.errors import MpqError, summary
from mpq.core.layer import Layer
from mpq.core.live_activations import LayerInput, LiveActivations, Moment
from mpq.network.cached import ARGUMENTS
from mpq.network.calibration import Batch, LossFn, evaluating, take
from mpq.network.calls import call_input
from mpq.network.copies import copied


def live_activations(
    model: nn.Module, layers: Sequence[Layer], sample: Batch, loss_fn: LossFn, batch: int = 1, context: int = 0
) -> LiveActivations:
    """What is live in one pass of the model over `batch` copies of a sample, whose tokens are `context` where given.

    Tensors are counted from the operation that makes them until nothing refers to them, in the types and by the
    operations of the model's own code; outputs of views, weights, the model's inputs and what it caches do not count,
    nor does what an operation uses within itself. Logits are those of the last position where the model can leave the
    others out. A tensor that layers alone read counts in their activation formats, as where the operation before it
    writes it so.

    Raises:
        MpqError: the model's code looks at numbers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    model = copied(model, {id(tensor): tensor for tensor in tensors})  # the model may store what it computes
    try:
        args, kwargs = _call_of(model, take(sample, slice(0, 1)), loss_fn)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            args, kwargs = tree_map(partial(_larger, fake, batch, context), (args, kwargs))
            named = [*model.named_parameters(), *model.named_buffers()]
            state: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in named}
            watch = _Watch()
            with torch.no_grad(), evaluating(model), _watching(model, layers, watch), watch:
                outputs = functional_call(model, state, args, kwargs)
            return LiveActivations(tuple(watch.moments(_cached(outputs))), batch, context)
    except MpqError:
        raise
    except Exception as error:
        raise MpqError(
            f"the activations of {type(model).__name__} cannot be counted without running it "
            f"({summary(error)}): leave out their budget"
        ) from error


def _larger(fake: FakeTensorMode, batch: int, context: int, value: Any) -> Any:
    """An argument for so many samples, of so many tokens, without numbers."""
    if not isinstance(value, Tensor):
        return value
    if not value.ndim or len(value) != 1:
        return fake.from_tensor(value)
    tokens = context and value.ndim == 2 and not value.is_floating_point()
    return value.new_empty((batch, context) if tokens else (batch, *value.shape[1:]))


class _Called(BaseException):
    """Ends a call of a loss once the model's arguments are known."""


def _call_of(model: nn.Module, sample: Batch, loss_fn: LossFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a loss calls the model, for logits of the last position alone where it can."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Called

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        loss_fn(model, sample)
    except _Called:
        pass
    finally:
        handle.remove()
    if not calls:
        raise MpqError("the loss does not call the model itself, so its activations cannot be counted: leave them out")
    args, kwargs = calls[0]
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    return args, {**kwargs, **last}


def _cached(outputs: Any) -> list[Tensor]:
    """Keys and values that an output holds for the next tokens."""
    cache = next((value for name in ARGUMENTS if (value := getattr(outputs, name, None)) is not None), None)
    layers = getattr(cache, "layers", ())
    cached = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return [tensor for tensor in cached if isinstance(tensor, Tensor)]


@dataclass
class _Storage:
    """A tensor's memory, by what reads it."""

    nbytes: int
    shape: tuple[int, int] = (0, 0)  # rows and columns of the matrix that layers read
    readers: dict[str, None] = field(default_factory=dict)
    floats: bool = False  # whether something else reads it too

    @property
    def as_input(self) -> LayerInput | None:
        return LayerInput(*self.shape, self.nbytes, tuple(self.readers)) if self.readers and not self.floats else None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live storages after every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, _Storage] = {}  # live ones by address of their handle
        self.seen: dict[tuple[int, ...], tuple[list[_Storage], str]] = {}
        self.modules: list[str] = []
        self.inputs: list[tuple[str, int]] = []  # running layers: name, and handle of the input

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        read = {_handle(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = {_handle(tensor): tensor for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)}
        writes = func._schema.is_mutable
        if writes or not made.keys() <= read:  # else a view
            for handle in read & self.known.keys():
                self._read(self.known[handle])
        for handle, tensor in made.items():
            if handle not in read:
                storage = tensor.untyped_storage()
                self.known[handle] = _Storage(storage.nbytes())
                weakref.finalize(storage, self.known.pop, handle, None)
            elif writes and handle in self.known:  # made again
                self.known[handle] = _Storage(self.known[handle].nbytes)
        live = list(self.known.values())
        self.seen.setdefault(tuple(map(id, live)), (live, self.modules[-1] if self.modules else ""))
        return outputs

    def _read(self, storage: _Storage) -> None:
        if self.inputs and self.known.get(self.inputs[-1][1]) is storage:
            storage.readers[self.inputs[-1][0]] = None
        else:
            storage.floats = True

    def enter(self, name: str, layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note which module runs, and what a layer reads."""
        self.modules.append(name)
        if not layer:
            return
        given = call_input(args, kwargs)
        storage = self.known.get(_handle(given))
        channels = 1 if isinstance(module, _ConvNd) else -1
        cols = given.shape[channels] if given.ndim else 1
        whole = storage is not None and given.numel() * given.element_size() == storage.nbytes
        readable = whole and given.is_floating_point() and not isinstance(module, nn.Embedding)
        if storage is not None and readable:
            storage.shape = (given.numel() // cols, cols)
        self.inputs.append((layer, _handle(given) if readable else 0))

    def leave(self, layer: str, *_: Any) -> None:
        """Note that a module has run."""
        self.modules.pop()
        if layer:
            self.inputs.pop()

    def moments(self, cached: Sequence[Tensor]) -> Iterator[Moment]:
        """Those that no other moment with the same tensors exceeds."""
        left_out = {id(self.known.get(_handle(tensor))) for tensor in cached}
        most: dict[frozenset[int], tuple[int, str]] = {}
        inputs: dict[int, LayerInput] = {}
        for live, module in self.seen.values():
            counted = [one for one in live if id(one) not in left_out]
            inputs_of = {id(one): given for one in counted if (given := one.as_input) is not None}
            inputs.update(inputs_of)
            floats = sum(one.nbytes for one in counted if id(one) not in inputs_of)
            key = frozenset(inputs_of)
            if floats > most.get(key, (-1, ""))[0]:
                most[key] = floats, module
        for key, (floats, module) in most.items():
            if not any(key < other and floats <= most[other][0] for other in most):
                yield Moment(floats, tuple(inputs[place] for place in sorted(key)), module)


def _handle(tensor: Tensor) -> int:
    handle: int = tensor.untyped_storage()._cdata
    return handle


@contextmanager
def _watching(model: nn.Module, layers: Sequence[Layer], watch: _Watch) -> Iterator[None]:
    """Tell `watch` which module runs."""
    own = {id(model.get_submodule(name)): layer.name for layer in layers for name in layer.names}
    handles = []
    for name, module in model.named_modules():
        layer = own.get(id(module), "")
        handles.append(module.register_forward_pre_hook(partial(watch.enter, name, layer), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(watch.leave, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
