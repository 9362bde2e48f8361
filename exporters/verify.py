"""Verification of exports: the loaded model has the rounded weights and computes the same outputs.

Outputs are compared layer by layer. The simulated model runs first, and its layers' inputs and outputs are kept. Then
the loaded model runs, with each packed layer's output replaced by the simulated layer's. Errors therefore do not
accumulate: a layer's input may differ only by rounding of equal operations, its output only by the packed kernels'
arithmetic (`kernel_error`), and the first difference is reported where it arises.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, summary
from mpq.core.layer import Layer
from mpq.core.pieces import PIECE
from mpq.core.scheme import Scheme
from mpq.kernels.tolerance import kernel_error, same_code_error
from mpq.kernels.weight import PackedWeight
from mpq.network.calibration import evaluating
from mpq.network.fingerprint import fingerprint
from mpq.network.shelf import Kept, Shelf
from mpq.network.uses import seeing_uses
from mpq.quantized import checked_layers, round_cache, simulate_rounded
from mpq.rounding.reference import Quantized, dequantize

Run: TypeAlias = Callable[[nn.Module], Any]  # runs the model on a few samples; returns its output, a loss, or anything
Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any] | Run
Digests: TypeAlias = dict[str, str]  # digest of each layer's rounded weight, by layer name

HELD = 2**26  # bytes of the simulated layers' inputs and outputs in memory; the rest is in files


def runner(inputs: Inputs) -> Run:
    """A function that runs a model on inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a
    function that runs the model itself.
    """
    if isinstance(inputs, Mapping):
        return lambda model: model(**inputs)
    if isinstance(inputs, Tensor):
        return lambda model: model(inputs)
    if isinstance(inputs, tuple):
        return lambda model: model(*inputs)
    return inputs


def noting(layers: Iterable[tuple[Layer, Scheme, Quantized]], digests: Digests) -> Iterator[Any]:
    """The layers unchanged; the digests of their rounded weights are recorded."""
    for layer, scheme, quantized in layers:
        digests[layer.name] = numbers_digest(dequantize(quantized))
        yield layer, scheme, quantized


def same_numbers(name: str, actual: Tensor, expected: Tensor, relative: float = 0.0) -> None:
    """MpqError if a layer's weight, as read back, differs from the rounded one."""
    numbers = expected.float().to(actual.device)
    if actual.shape != expected.shape or bool(
        ((actual.float() - numbers).abs() > relative * (numbers.abs() + 1e-30)).any()
    ):
        raise MpqError(f"layer {name} reads back other numbers than were rounded: nothing was written")


def same_tensor(name: str, actual: Tensor, expected: Tensor) -> None:
    """MpqError if a tensor is not the expected one bit for bit."""
    if fingerprint([actual]) != fingerprint([expected]):
        raise MpqError(f"the tensor {name} reads back changed: nothing was written")


def numbers_digest(numbers: Tensor) -> str:
    """The digest of the values in float32, with negative zeros as zeros."""
    return fingerprint([numbers.float() + 0.0])


def verify(
    model: nn.Module,
    loaded: nn.Module,
    allocation: Allocation,
    digests: Digests,
    others: Mapping[str, Tensor],
    run: Run | None,
) -> None:
    """Compare a loaded model with the exported one.

    Args:
        model: the exported model.
        loaded: the model that was read back, packed.
        allocation: layers and schemes.
        digests: of the rounded weights, recorded by `noting`.
        others: every other tensor of the model, by name.
        run: runs a model on a few samples; without it only tensors are compared.

    Raises:
        MpqError: a layer's numbers, another tensor or what the model computes differs: the first one is named.
    """
    for layer, _ in checked_layers(model, allocation):
        weight = loaded.get_submodule(layer.name).weight
        if not isinstance(weight, PackedWeight) or numbers_digest(weight.dequantize()) != digests[layer.name]:
            raise MpqError(f"layer {layer.name} reads back other numbers than were rounded: nothing was written")
    verify_tensors(others, lambda name: loaded.get_submodule(name.rpartition(".")[0]), loaded)
    if run is not None:
        verify_outputs(model, loaded, allocation, run)


def verify_tensors(others: Mapping[str, Tensor], owner: Callable[[str], nn.Module], loaded: nn.Module) -> None:
    """MpqError naming the first tensor of a loaded model that is not equal bit for bit."""
    for name, tensor in others.items():
        actual = getattr(owner(name), name.rpartition(".")[2], None)
        if not isinstance(actual, Tensor) or fingerprint([actual]) != fingerprint([tensor]):
            raise MpqError(f"the tensor {name} of {type(loaded).__name__} reads back changed: nothing was written")


@torch.no_grad()
def verify_outputs(model: nn.Module, loaded: nn.Module, allocation: Allocation, run: Run) -> None:
    """MpqError naming the first layer in which a loaded model's computation differs from the simulated one's."""
    rounded = (
        (layer, scheme, loaded.get_submodule(layer.name).weight.dequantize())  # type: ignore[operator]
        for layer, scheme in checked_layers(model, allocation)
    )
    simulated = simulate_rounded(model, rounded)
    round_cache(simulated, allocation.cache)
    names = [name for layer in allocation.layers for name in layer.names]
    calls: list[Call] = []
    shelf = Shelf(HELD)

    def keep(name: str, module: nn.Module, call: tuple[Any, Any, Any]) -> None:
        used, inputs, output = call
        outputs = [shelf.keep(tensor.clone()) for tensor in _tensors(output)]
        own = None if used is None else shelf.keep(used.clone())
        calls.append(Call(name, module, own, [shelf.keep(tensor) for tensor in inputs], outputs))

    used: set[str] = set()
    with _hooked(simulated, names, keep), seeing_uses(simulated, allocation.layers, lambda name, *_: used.add(name)):
        expected = result_tensors(run, simulated)
    if names and not used:
        raise MpqError(
            f"a copy of {type(model).__name__} uses none of its own layers' weights, so measurements do not apply to "
            "the export: does its forward refer to the original model? Nothing was written"
        )
    coming = iter(calls)

    def compare(name: str, module: nn.Module, call: tuple[Any, Any, Any]) -> Any:
        reference = next(coming, None)
        if reference is None or reference.name != name:
            described = "no layer" if reference is None else reference.name or "the whole model"
            raise _differs(f"it calls layer {name} where the model calls {described}")
        _, inputs, output = call
        called = f"the input of layer {name}" if name else "the model's input"
        _compare(called, [kept() for kept in reference.inputs], inputs)
        outputs = [kept() for kept in reference.outputs]
        what = f"the output of layer {name}" if name else "the model's output"
        _compare(what, outputs, _tensors(output), reference.allowed(output))
        return outputs[0].clone() if name else None

    with _hooked(loaded, names, compare):
        actual = result_tensors(run, loaded)
    if (missing := next(coming, None)) is not None:
        raise _differs(f"it never calls layer {missing.name}")
    _compare("the result of the run", expected, actual)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer of the simulated model, or ("") of the whole model."""

    name: str
    module: nn.Module
    used: Kept | None  # the first input after rounding
    inputs: list[Kept]  # before rounding
    outputs: list[Kept]

    def allowed(self, output: Any) -> list[Tensor] | None:
        """Tolerance of a packed layer's output; None for equal operations."""
        if not (self.name and isinstance(output, Tensor) and self.outputs):
            return None
        return [kernel_error(self.module, None if self.used is None else self.used(), self.outputs[0]())]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's arguments or outputs; caches and other objects are skipped."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return [output] if isinstance(output, Tensor) else []


@contextmanager
def _hooked(model: nn.Module, names: Iterable[str], report: Callable[..., Any]) -> Iterator[None]:
    """Call `see(name, module, (rounded input, inputs, output))` at each call; its result replaces the output."""
    handles = []
    original_inputs: dict[str, list[list[Tensor]]] = {}

    def hook(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [tensor.clone() for tensor in _tensors((args, kwargs))]
            original_inputs.setdefault(name, []).append(tensors)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            used = next(iter(_tensors((args, kwargs))), None)
            return report(name, module, (used, original_inputs[name].pop(), output))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    hook("", model)
    hooked: set[int] = set()
    for name in names:  # shared modules are seen once, under their first name
        module = model.get_submodule(name)
        if id(module) not in hooked:
            hooked.add(id(module))
            hook(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def result_tensors(run: Run, model: nn.Module) -> list[Tensor]:
    """Tensors in a run's result; random numbers are the same for every model."""
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            output = run(model)
        except (MpqError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code, which may raise anything
            reason = summary(error)
            raise MpqError(
                f"a model of packed or simulated layers does not run ({reason}): nothing was written"
            ) from error
    return _tensors(torch.tensor(output) if isinstance(output, float) else output)


def _compare(what: str, expected: list[Tensor], actual: list[Tensor], allowed: list[Tensor] | None = None) -> None:
    for index, (one, other) in enumerate(zip_longest(expected, actual)):
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            raise _differs(f"{what} has a different shape or type")
        if torch.equal(one, other):
            continue
        room = allowed[index] if allowed else same_code_error(one)
        for parts in zip(*(tensor.reshape(-1).split(PIECE) for tensor in (one, other, room)), strict=True):
            wanted, had, allowance = (part.double() for part in parts)
            error = (wanted - had).abs()
            excess = error > allowance  # NaN must match NaN
            if bool((excess | (wanted.isnan() != had.isnan())).any()):
                raise _differs(f"{what} is off by up to {error.max().item():.2g}, {_times(error, allowance)}")


def _times(error: Tensor, room: Tensor) -> str:
    ratio = (error / room.clamp(min=1e-300)).nan_to_num(posinf=1e99).max().item()
    return f"{ratio:.2g} times the tolerance of rounding"


def _differs(what: str) -> MpqError:
    return MpqError(f"the model that was read back differs: {what}. Nothing was written")
