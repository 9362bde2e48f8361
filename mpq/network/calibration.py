"""Calibration batches: losses, input checks, and random generators derived from a seed by name."""

import copy
import dataclasses
import functools
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import ChangedBatchError, MpqError, NotFiniteError, first_line
from mpq.network.parallel import share, total

IGNORED = -100  # the label of a position without one
ELEMENTS = 2**24  # logits processed at once

# A tensor, or a tuple, list, mapping or dataclass of tensors whose first dimension counts samples.
Batch: TypeAlias = Any
LossFn: TypeAlias = Callable[[nn.Module, Batch], Tensor]  # the mean loss of the batch's samples, a scalar

log = logging.getLogger(__name__)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a classifier on (inputs, labels (batch,)); `model(inputs)` gives (batch, classes)."""
    inputs, labels = batch
    return functional.cross_entropy(logits_of(model(inputs)), labels)


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy per predicted token of a language model.

    `batch` holds tokens (batch, sequence), bare, in a 1-tuple, or as "input_ids" of a mapping; an "attention_mask" is
    passed on, and tokens it hides are not predicted. `model(tokens)` gives logits, or an object that has them.
    """
    if isinstance(batch, (tuple, list)):
        (batch,) = batch
    tokens, options = batch, {}
    if isinstance(batch, Mapping):
        tokens = batch["input_ids"]
        options = {name: batch[name] for name in ("attention_mask",) if batch.get(name) is not None}
    targets = tokens[:, 1:]
    if options:
        targets = targets.masked_fill(options["attention_mask"][:, 1:] == 0, -100)
    logits = logits_of(model(tokens, **options))[:, :-1]
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def careful(loss_fn: LossFn) -> LossFn:
    """The loss, which gets containers of its own at each call, so that it may take entries out of them.

    Raises:
        MpqError: no function; when it is called, ChangedBatchError where it changes a tensor of the batch.
    """
    if not callable(loss_fn):
        raise MpqError(f"expected a function loss_fn(model, batch), not {loss_fn!r}")
    if hasattr(loss_fn, "careful_of"):
        return loss_fn

    @functools.wraps(loss_fn, updated=())
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        versions = _versions(batch)
        value = loss_fn(model, mapped(batch, lambda tensor: tensor))
        if _versions(batch) != versions:
            raise ChangedBatchError(
                "the model or its loss changes its batch in place, and later passes would see other data: work on a "
                "copy, as tensor.clone()"
            )
        return value

    loss.careful_of = loss_fn  # type: ignore[attr-defined]
    return loss


def _versions(batch: Batch) -> list[int]:
    """Counts of the changes to each tensor of a batch."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(batch)]


def logits_of(output: Any) -> Tensor:
    """The output's `logits` (attribute or mapping entry) if it has them, else the output itself."""
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def with_logits(output: Any, logits: Tensor) -> Any:
    """The same output with other logits; objects are changed in place."""
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, MutableMapping):
        output["logits"] = logits
    else:
        output.logits = logits
    return output


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """The logits of every call of the model inside the block, as they come."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        logits = logits_of(output)
        if isinstance(logits, Tensor):
            outputs.append(logits)

    handle = model.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def tensors_in(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, depth first."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif _is_record(batch):
        batch = vars(batch).values()
    if isinstance(batch, Iterable) and not isinstance(batch, (str, bytes)):
        return [tensor for part in batch for tensor in tensors_in(part)]
    return []


def samples_in(batch: Batch) -> int:
    """Number of samples: the most frequent length of tensors with more than one element; the first such on a tie."""
    tensors = [tensor for tensor in tensors_in(batch) if tensor.ndim]
    voting = [tensor for tensor in tensors if tensor.numel() > 1] or tensors
    return Counter(map(len, voting)).most_common(1)[0][0]


def counted_positions(batch: Batch) -> tuple[Tensor, ...]:
    """Masks of counted positions, bool (samples, positions), one for each length with hidden positions.

    An attention mask (an entry "attention_mask" of a mapping, "decoder_attention_mask" too) hides positions, and so
    does -100 in a tensor of labels, as in `torch.nn.functional.cross_entropy`. Masks of one shape are combined.
    """
    counted: dict[tuple[int, ...], Tensor] = {}
    masks = [part != IGNORED for part in tensors_in(batch) if part.dtype == torch.int64 and part.ndim == 2]
    if isinstance(batch, Mapping):
        attention_masks = [part for name, part in batch.items() if str(name).endswith("attention_mask")]
        masks += [part != 0 for part in attention_masks if isinstance(part, Tensor) and part.ndim == 2]
    for mask in masks:
        if not bool(mask.all()):
            shape = tuple(mask.shape)
            counted[shape] = counted[shape] & mask if shape in counted else mask
    return tuple(counted.values())


def split_batch(batch: Batch) -> list[Batch]:
    """The batch as batches of one sample, in the same containers."""
    return [take(batch, slice(index, index + 1)) for index in range(samples_in(batch))]


def take(batch: Batch, samples: slice | list[int]) -> Batch:
    """Some samples of a batch, in the same containers; tensors whose length is not the number of samples stay whole."""
    count = samples_in(batch)
    return mapped(batch, lambda tensor: tensor[samples] if tensor.ndim and len(tensor) == count else tensor)


def first_samples(batches: Iterable[Batch], count: int) -> tuple[Batch, ...]:
    """The first `count` samples, the last batch cut where it has more."""
    picked: list[Batch] = []
    for batch in batches:
        if count <= 0:
            break
        picked.append(take(batch, slice(0, count)))
        count -= samples_in(batch)
    return tuple(picked)


def first_batches(batches: Sequence[Batch], count: float) -> Sequence[Batch]:
    """The first whole batches, as few as hold `count` samples, or all there are."""
    held = accumulate(samples_in(batch) for batch in batches)
    return batches[: next((number for number, samples in enumerate(held, 1) if samples >= count), len(batches))]


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor changed, in the same containers."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        parts = {name: mapped(part, change) for name, part in batch.items()}
        if not isinstance(batch, MutableMapping):
            return parts
        other = copy.copy(batch)  # keeps its class and other data, such as a tokenizer's encodings
        for name, part in parts.items():
            other[name] = part
        return other
    if isinstance(batch, (tuple, list)):
        elements = [mapped(part, change) for part in batch]
        return type(batch)(*elements) if hasattr(batch, "_fields") else type(batch)(elements)
    if _is_record(batch):
        other = copy.copy(batch)
        for name, part in vars(batch).items():
            object.__setattr__(other, name, mapped(part, change))  # dataclasses may be frozen
        return other
    return batch


def _is_record(batch: Batch) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type) and hasattr(batch, "__dict__")


def check_batches(batches: Iterable[Batch]) -> tuple[Batch, ...]:
    """The batches as a tuple.

    Raises:
        MpqError: no batches, an empty one, or NaN or infinite inputs; the message names the batch, counted from 0.
    """
    checked = tuple(map(_ordinary, batches))
    if not checked:
        raise MpqError("no calibration batches: expected at least one")
    for index, batch in enumerate(checked):
        tensors = tensors_in(batch)
        if not tensors and (batch if isinstance(batch, (Mapping, tuple, list)) else True):
            raise MpqError(
                f"calibration batch {index}, a {type(batch).__name__}, holds no tensor: expected a tensor, or a tuple, "
                "list, mapping or dataclass of tensors"
            )
        for tensor in tensors:
            if tensor.layout is not torch.strided or tensor.is_nested:
                raise MpqError(f"calibration batch {index} holds a sparse or nested tensor: expected dense ones")
            if tensor.is_meta:
                raise MpqError(f"calibration batch {index} has a tensor on the device 'meta', which has no content")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise MpqError(f"calibration batch {index} holds NaN or infinite values: clean the data first")
        if any(tensor.numel() == 0 for tensor in tensors) or not any(tensor.ndim for tensor in tensors):
            raise MpqError(f"calibration batch {index} is empty: expected at least one sample")
    return checked


def _ordinary(batch: Batch) -> Batch:
    """The batch with copies of tensors that were made in inference mode, which autograd refuses."""
    if not any(tensor.is_inference() for tensor in tensors_in(batch)):
        return batch
    return mapped(batch, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def check_loss(loss: object, batch_index: int) -> Tensor:
    """The loss as a tensor; NotFiniteError naming the batch when it is NaN or infinite, MpqError for no number."""
    if isinstance(loss, Real):
        loss = torch.tensor(float(loss), dtype=torch.float32)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        came = f"a {type(loss).__name__}"
        if isinstance(loss, Tensor):
            came = f"a tensor {tuple(loss.shape)}" + (" of complex numbers" if loss.is_complex() else "")
        raise MpqError(f"invalid loss: expected one number, the batch's mean loss, not {came}")
    if not math.isfinite(loss.item()):
        problem = f"the loss of calibration batch {batch_index} is {loss.item()}"
        raise NotFiniteError(f"{problem}: check the model and this batch")
    return loss


def check_gradient(loss: object) -> Tensor:
    """The loss itself; MpqError when it cannot be differentiated."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise MpqError(
            "the loss has no gradient: compute it from the model's outputs without .item(), .detach() or "
            "no_grad, or take a metric that only measures, such as 'loss'"
        )
    return loss


def mean_loss(model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn) -> float:
    """Loss per sample over all batches, without gradients; the model's mode is left as it is."""
    added = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for index, batch in share(list(enumerate(batches))):
            added += check_loss(loss_fn(model, batch), index).item() * samples_in(batch)
    return total({"loss": added})["loss"].item() / sum(samples_in(batch) for batch in batches)


def seeded(seed: int, *names: object) -> torch.Generator:
    """A generator on the CPU that depends on the seed and the names only."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def seeded_normal(shape: Sequence[int] | int, seed: int, *names: object) -> Tensor:
    """Standard normal numbers on the CPU, float32 whatever the default dtype, that depend on seed and names only."""
    return torch.randn(shape, generator=seeded(seed, *names), dtype=torch.float32, device="cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block (no dropout, stored batch statistics); each module's mode is restored after.

    Modules compiled in place (`module.compile()`) run uncompiled, since compiled code ignores new hooks.

    Raises:
        MpqError: a module that does not let its mode be set.
    """
    compiled = [(module, vars(module)["_compiled_call_impl"]) for module in model.modules() if _is_compiled(module)]
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        log.info("the model is in training mode: it is measured in evaluation mode, then set back")
    try:
        model.eval()
    except AttributeError as error:
        for module, training in modes:
            vars(module)["training"] = training
        raise MpqError(
            f"{type(model).__name__} cannot be put into evaluation mode ({first_line(error)}): let its modules' "
            "attributes be set"
        ) from error
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, call in compiled:
            module._compiled_call_impl = call


def _is_compiled(module: nn.Module) -> bool:
    return vars(module).get("_compiled_call_impl") is not None
