"""Building a ranking benchmark: random configurations of a model, each quantized and measured."""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.patterns import match_names
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import Batch, LossFn, check_batches, check_loss, evaluating, samples_in, tensors_in
from mpq.network.copies import copied
from mpq.network.fingerprint import fingerprint, model_fingerprint
from mpq.network.layers import find_layers, matrix_to_weight, weight_matrix
from mpq.network.macs import count_macs
from mpq.proxies.benchmark import DIGITS, Benchmark, spell
from mpq.rounding import METHODS, method_named
from mpq.rounding.reference import dequantize
from mpq.sensitivity.journal import Journal


def draw_configurations(
    layers: Sequence[Layer], options: Sequence[Sequence[int]], rows: int, seed: int
) -> NDArray[np.int64]:
    """Distinct random configurations (rows, layers): schemes are uniformly random, tied layers share one.

    Args:
        layers: in order.
        options: the indices of the schemes that each layer may take.
        rows: how many.
        seed: with the same seed, fewer rows are the first of more rows.

    Raises:
        MpqError: tied layers with different options, or fewer configurations than rows.
    """
    groups = list(dict.fromkeys(layer.tie or layer.name for layer in layers))
    allowed: dict[str, tuple[int, ...]] = {}
    for layer, indices in zip(layers, options, strict=True):
        if allowed.setdefault(layer.tie or layer.name, tuple(indices)) != tuple(indices):
            raise MpqError(f"layers of {layer.tie} share a scheme: pin all of them or none")
    possible = 1
    for indices in allowed.values():
        possible = min(possible * len(indices), 10**12)
    if rows > possible:
        raise MpqError(f"invalid number of rows {rows}: there are only {possible} configurations")
    unique: dict[tuple[int, ...], None] = {}
    for attempt in count():
        random = np.random.default_rng([seed, attempt])
        drawn = {group: int(random.choice(allowed[group])) for group in groups}
        unique[tuple(drawn[layer.tie or layer.name] for layer in layers)] = None
        if len(unique) == rows:
            return np.array(list(unique), dtype=np.int64)
    raise AssertionError("unreachable")


def build_benchmark(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    schemes: Sequence[str],
    rows: int = 425,
    *,
    fixed: Mapping[str, str] | None = None,
    method: str = "mse",
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> Benchmark:
    """Measure random configurations of a model after post-training quantization of its weights.

    Each layer's weight is rounded once per scheme; a row then costs one pass over the data. The caller's model is
    unchanged.

    Args:
        model: the pretrained network.
        batches: the data to measure on, as `loss_fn` takes it; accuracy is counted where a batch is (inputs, labels).
        loss_fn: the batch's mean loss per sample.
        schemes: weight formats that layers choose from ("int2-channel", ...).
        rows: configurations to measure.
        fixed: layer pattern to the one scheme that its layers take, usually 8 bits for the first and last.
        method: the rounding method; one that needs calibration data is refused.
        seed: of the configurations.
        resume: a file that keeps measured rows; an interrupted run goes on from it and gives the same table.
        progress: show a progress bar.
        provenance: what to record ("model", "dataset", ...).

    Raises:
        MpqError: unknown names, schemes that quantize activations, patterns without a layer, bad data.
    """
    if METHODS.named(method).second_moment:
        raise MpqError(
            f"the method {method} needs calibration data, which a benchmark does not use: take 'mse' or 'nearest'"
        )
    batches = check_batches(batches)
    network = copied(model).eval()
    layers = count_macs(network, find_layers(network), batches[0], loss_fn)
    names, options = _options(layers, schemes, fixed or {})
    choices = draw_configurations(layers, options, rows, seed)
    settings = {
        "weights": model_fingerprint(network), "data": fingerprint(t for batch in batches for t in tensors_in(batch)),
        "method": method, "seed": seed, "fixed": dict(fixed or {}),
        "nsamples": sum(samples_in(batch) for batch in batches),
    }  # fmt: skip
    journal = Journal(resume, {**settings, "schemes": names})
    loss, accuracy = measure(network, batches, loss_fn)
    cache = _rounded(network, layers, names, options, method)
    measured = []
    for choice in tqdm(choices, desc="configurations", disable=None if progress else True, dynamic_ncols=True):
        values = journal.recall(spell(choice))
        if values is None:
            with torch.no_grad():
                for layer, index in zip(layers, choice, strict=True):
                    weight: Tensor = network.get_submodule(layer.name).weight  # type: ignore[assignment]
                    weight.copy_(cache[layer.name, int(index)])
            values = list(measure(network, batches, loss_fn))
            journal.note(spell(choice), values)
        measured.append(values)
    losses, accuracies = np.array(measured, dtype=np.float64).T
    settings |= {"reference_loss": loss, "reference_accuracy": None if np.isnan(accuracy) else accuracy}
    table = Benchmark(layers, names, choices, losses, accuracies, {**(provenance or {}), **settings})
    journal.close()
    return table


def _options(
    layers: Sequence[Layer], schemes: Sequence[str], fixed: Mapping[str, str]
) -> tuple[tuple[str, ...], list[list[int]]]:
    """All scheme names, and the indices that each layer may take."""
    free = list(dict.fromkeys(parse_scheme(name).name for name in schemes))
    names = list(dict.fromkeys([*free, *(parse_scheme(name).name for name in fixed.values())]))
    if not free or len(names) > len(DIGITS):
        raise MpqError(f"a benchmark takes 1 to {len(DIGITS)} schemes, not {len(names)}")
    for name in names:
        if parse_scheme(name).activation is not None:
            raise MpqError(f"a benchmark measures weight formats only, not {name}: leave its '+a:' part out")
    options = {layer.name: list(range(len(free))) for layer in layers}
    for pattern, name in fixed.items():
        for matched in match_names(pattern, options):
            options[matched] = [names.index(parse_scheme(name).name)]
    return tuple(names), list(options.values())


def _rounded(
    network: nn.Module, layers: Sequence[Layer], names: Sequence[str], options: Sequence[Sequence[int]], method: str
) -> dict[tuple[str, int], Tensor]:
    """Every layer's weight in each scheme that it may take."""
    rounding, cache = method_named(method), {}
    for layer, indices in zip(layers, options, strict=True):
        module = network.get_submodule(layer.name)
        weight = weight_matrix(module).detach().clone()
        for index in indices:
            rounded = dequantize(rounding(weight, parse_scheme(names[index]).weight, None))
            cache[layer.name, index] = matrix_to_weight(rounded, module).clone()
    return cache


def measure(model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn) -> tuple[float, float]:
    """Mean loss per sample and share of right answers, NaN where batches are not (inputs, class labels)."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    loss, right, samples = 0.0, 0.0, 0
    try:
        with torch.inference_mode(), evaluating(model):
            for index, batch in enumerate(batches):
                outputs.clear()
                size = samples_in(batch)
                loss += check_loss(loss_fn(model, batch), index).item() * size
                right += _right(outputs[-1], batch) if outputs else float("nan")
                samples += size
    finally:
        handle.remove()
    return loss / samples, right / samples


def _right(output: Any, batch: Batch) -> float:
    logits = getattr(output, "logits", output)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(logits, Tensor) or logits.ndim != 2:
        return float("nan")
    labels = batch[1]
    if labels.is_floating_point() or labels.ndim != 1:
        return float("nan")
    return float((logits.argmax(1) == labels).sum())
