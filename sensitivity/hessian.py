"""Mean Hessian trace times squared error (HAWQ-V2, arXiv 1911.03852), all layers' traces at once."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.core.errors import MpqError
from mpq.core.formats import Format
from mpq.core.layer import Layer
from mpq.network.calibration import samples_in, seeded
from mpq.sensitivity.gauss_newton import design_order, gauss_newton_draws, slope_scales, straight_layers
from mpq.sensitivity.inputs import input_curvature, input_errors
from mpq.sensitivity.products import Curvature, operator_named, weight_curvature
from mpq.sensitivity.task import Scores, Task, score_weight_errors

log = logging.getLogger(__name__)


def hessian(
    task: Task,
    *,
    operator: str = "hessian",
    min_probes: int = 2,
    max_probes: int = 16,
    target: float = 0.2,
    settle: float = 0.7,
    backend: str = "own",
) -> Scores:
    """Predicted loss increase 1/2 * Tr(H_i) / n_i * ||Q(W_i) - W_i||^2 of every layer i and scheme.

    The paper's Omega (section 3.2) is twice this; with the half it is the second-order term of the loss itself, for a
    perturbation spread evenly over directions, and can be compared with other metrics. A trace below its own standard
    error is replaced by that error: noise, or an unconverged model's negative curvature, never makes a layer free.
    Schemes with an activation format add the same term of the layer's inputs a, 1/2 * Tr(H_a) / n_a * ||Q(a) - a||^2,
    averaged over samples (section 3.3).

    Args:
        task: model, data, layers and schemes.
        operator: "hessian", or "gauss-newton": its part without the network's own curvature.
        min_probes: probes for each batch before the stopping rule is asked.
        max_probes: probes for each batch at most.
        target: a layer is done when the probes' part of its standard error is below this share of its trace,
        settle: or below this share of the whole standard error: the rest is the data's, which probes cannot reduce.
        backend: "own", or "pyhessian": its Hutchinson trace, `max_probes` draws for one layer at a time.
    """
    rule = {"min_probes": min_probes, "max_probes": max_probes, "target": target, "settle": settle}
    if backend == "own":
        traces = hessian_traces(task, operator=operator, **rule)  # type: ignore[arg-type]
    elif backend == "pyhessian":
        traces = _pyhessian_traces(task, max_probes)
    else:
        raise MpqError(f"unknown backend {backend!r}: take 'own' or 'pyhessian'")
    means = floored(traces)
    index = {layer.name: i for i, layer in enumerate(task.layers)}

    def score(layer: Layer, difference: Tensor) -> tuple[float, float]:
        i = index[layer.name]
        factor = 0.5 * difference.square().sum(dtype=torch.float64).item() / layer.params
        return factor * float(means[i]), factor * float(traces.errors[i])

    if all(scheme.activation is None for scheme in task.schemes):
        return score_weight_errors(task, score)
    errors = input_errors(task)
    of_inputs = hessian_traces(task, operator=operator, of="inputs", **rule)  # type: ignore[arg-type]
    input_means = floored(of_inputs)

    def activation(layer: Layer, format: Format) -> tuple[float, float]:
        i, error = index[layer.name], errors[layer.name]
        factor = 0.5 * error.squared[format] / max(error.numbers, 1)
        return factor * float(input_means[i]), factor * float(of_inputs.errors[i])

    return score_weight_errors(task, score, activation)


CURVATURES: dict[str, Callable[[Task, int, str], AbstractContextManager[tuple[Curvature, list[int]]]]] = {
    "weights": weight_curvature,
    "inputs": input_curvature,
}


@dataclass(frozen=True)
class Traces:
    """Traces of the layers' diagonal Hessian blocks, with standard errors."""

    means: NDArray[np.float64]  # (layers,)
    errors: NDArray[np.float64]  # standard errors over probes and batches together
    probe_errors: NDArray[np.float64]  # the part that more probes would reduce
    probes: int  # per batch


def floored(traces: Traces) -> NDArray[np.float64]:
    """The traces (layers,), each at least its standard error; the number raised is logged."""
    raised, negative = int((traces.means < traces.errors).sum()), int((traces.means < 0).sum())
    if raised:
        log.warning(
            "%d of %d layers' Hessian traces are below their standard error (%d negative): the error is used instead",
            raised, len(traces.means), negative,
        )  # fmt: skip
    return np.maximum(traces.means, traces.errors)


def hessian_traces(
    task: Task,
    *,
    operator: str = "hessian",
    of: str = "weights",
    min_probes: int = 2,
    max_probes: int = 16,
    target: float = 0.2,
    settle: float = 0.7,
) -> Traces:
    """Estimates of Tr(H_ii) for every layer i, all layers at once, until the probes' part of the error is small.

    Where the model's outputs bend in no layer's own weight (ReLU networks, see `straight_layers`) and the loss is
    cross-entropy, H_ii is Gauss-Newton's block, and gradients of single samples, where batches can be cut, give
    its trace with one backward pass a draw (`gauss_newton_draws`). So they do for every layer of the operator
    "gauss-newton".

    Elsewhere one draw is Hutchinson's: a Rademacher vector v over all layers' weights, v_j scaled by s_j, and one
    product H v on one batch; v_i . (H s v)_i / s_i has mean Tr(H_ii), since the cross terms vanish on average, and
    variance 2 (||H_ii||_F^2 - sum_k H_ii,kk^2) + sum_j!=i (s_j / s_i)^2 ||H_ij||_F^2. Scales of 1 / sqrt(Tr(G_jj)),
    from one draw of Gauss-Newton's, keep the layers of large trace out of the others' sums.

    H belongs to the loss per sample: batches are averaged by their sizes. Draws are seeded by batch, index and layer.

    Of "inputs", H_ii is the Hessian of a sample's loss in that sample's inputs of the layer, and its trace is averaged
    over samples: samples do not meet, so one product serves all of them (HAWQ-V2, section 3.3).

    Raises:
        MpqError: a batch of NaN loss, or an operation that cannot be differentiated twice.
    """
    if not 2 <= min_probes <= max_probes:
        raise MpqError(f"Hessian probes: want 2 <= min_probes <= max_probes, not {min_probes} and {max_probes}")
    operator_named(operator)
    if of not in CURVATURES:
        raise MpqError(f"traces are of {' or '.join(CURVATURES)}, not of {of!r}")
    rule = (min_probes, max_probes, target, settle)
    known, order = _slopes_of(task) if of == "weights" and not task.together else (False, None)
    straight = np.full(len(task.layers), known)
    if known and operator == "hessian":
        straight = np.array(straight_layers(task))
    by_order: dict[bool, Traces] = {}
    for simple in set(straight.tolist()):
        part = replace(task, layers=tuple(np.array(task.layers, dtype=object)[straight == simple]))
        if simple:
            by_order[simple] = _until_enough(part, rule, partial(_slope_draws, part, order), order)
        else:
            scales = slope_scales(part) if known else [1.0] * len(part.layers)
            by_order[simple] = _until_enough(part, rule, partial(_draws, part, operator, of, scales))
    columns = np.zeros((3, len(straight)))
    for simple, traces in by_order.items():
        columns[:, straight == simple] = traces.means, traces.errors, traces.probe_errors
    return Traces(columns[0], columns[1], columns[2], max(traces.probes for traces in by_order.values()))


def _slopes_of(task: Task) -> tuple[bool, int | None]:
    """Whether the loss is cross-entropy, and the order of its design of slopes."""
    try:
        return True, design_order(task)
    except (MpqError, AttributeError, TypeError, RuntimeError):  # outputs may be of any kind
        return False, None


def _until_enough(
    task: Task,
    rule: tuple[int, int, float, float],
    draw: Callable[[Sequence[int]], NDArray[np.float64]],
    order: int | None = None,
) -> Traces:
    min_probes, max_probes, target, settle = rule
    sizes = np.array([samples_in(batch) for batch in task.batches], dtype=np.float64)
    most = max_probes if order is None else min(max_probes, order)
    draws = np.empty((0, len(task.batches), len(task.layers)))
    while True:
        more = min(len(draws) or min_probes, most - len(draws))
        draws = np.concatenate([draws, draw(range(len(draws), len(draws) + more))])
        traces = _summary(draws, sizes / sizes.sum(), order)
        enough = np.maximum(target * np.abs(traces.means), settle * traces.errors)
        if len(draws) >= most or bool((traces.probe_errors <= enough).all()):
            return traces


def _summary(
    draws: NDArray[np.float64],  # (probes, batches, layers)
    shares: NDArray[np.float64],  # (batches,), sum 1
    order: int | None = None,  # draws of the full design, which has no error
) -> Traces:
    probes, batches, _ = draws.shape
    by_batch = draws.mean(0)
    means = shares @ by_batch
    probe_variances = shares**2 @ (draws.var(0, ddof=1) / probes)
    if order is not None:
        probe_variances *= 1 - probes / order
    # The variance between batches includes the probes' noise, but few batches estimate it badly: take the larger one.
    between_batches = (
        shares**2 @ (by_batch - means) ** 2 * (batches / (batches - 1)) if batches > 1 else probe_variances
    )
    return Traces(means, np.sqrt(np.maximum(between_batches, probe_variances)), np.sqrt(probe_variances), probes)


def _draws(task: Task, operator: str, of: str, scales: Sequence[float], rounds: Sequence[int]) -> NDArray[np.float64]:
    """v_i . (H v)_i of every batch, (rounds, batches, layers); a batch's graph serves all its rounds."""

    def work(batch: int, indices: Sequence[int]) -> Iterator[list[float]]:
        with CURVATURES[of](task, batch, operator) as (curvature, owners):
            for index in indices:
                yield _draw(task, curvature, owners, (batch, index), scales)

    return _by_batch(task, rounds, "probe {} of batch {}" + ("" if of == "weights" else f" of {of}"), work)


def _slope_draws(task: Task, order: int | None, rounds: Sequence[int]) -> NDArray[np.float64]:
    """The same from Gauss-Newton's draws."""
    return _by_batch(task, rounds, "slopes {} of batch {}", partial(gauss_newton_draws, task, order))


def _by_batch(
    task: Task, rounds: Sequence[int], name: str, work: Callable[[int, Sequence[int]], Iterator[list[float]]]
) -> NDArray[np.float64]:
    """The numbers (rounds, batches, layers) that `work(batch, rounds)` yields for each round."""
    items = {name.format(index, batch): (batch, index) for batch in range(len(task.batches)) for index in rounds}

    def draw(missing: Sequence[tuple[int, int]]) -> Iterator[list[float]]:
        tracked = task.track(missing, f"Hessian probes {rounds[0] + 1} to {rounds[-1] + 1}")
        for batch, values in groupby(tracked, key=lambda item: item[0]):
            yield from work(batch, [index for _, index in values])

    values = task.numbers(items, draw, adjacent=True)
    return np.array(values).reshape(len(task.batches), len(rounds), len(task.layers)).swapaxes(0, 1)


def _draw(
    task: Task, curvature: Curvature, owners: Sequence[int], seeds: tuple[int, int], scales: Sequence[float]
) -> list[float]:
    """One draw for every layer; a layer owns one variable, its weight, or as many as its module was called."""
    calls: dict[int, int] = {}
    probes = []
    for variable, owner in zip(curvature.variables, owners, strict=True):
        calls[owner] = calls.get(owner, 0) + 1
        again = () if calls[owner] == 1 else (calls[owner],)
        generator = seeded(task.seed, "hessian", *seeds, task.layers[owner].name, *again)
        probes.append(rademacher(variable, generator) * scales[owner])
    numbers = [0.0] * len(task.layers)
    for owner, v, hv in zip(owners, probes, curvature.product(probes), strict=True):
        numbers[owner] += (v * hv).sum(dtype=torch.float64).item() / scales[owner] ** 2
    return numbers


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs in the shape, type and place of `like`."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (signs * 2 - 1).to(like.device, like.dtype)


def _pyhessian_traces(task: Task, probes: int) -> Traces:
    from mpq.sensitivity.pyhessian import pyhessian_draws

    def work(layers: Sequence[Layer]) -> Iterator[list[float]]:
        for layer in task.track(layers, "pyhessian"):
            yield pyhessian_draws(task, [task.module(layer).weight], probes)  # type: ignore[list-item]

    draws = task.numbers({f"draws of {layer.name}": layer for layer in task.layers}, work)
    return _summary(np.array(draws).T[:, None], np.ones(1))
