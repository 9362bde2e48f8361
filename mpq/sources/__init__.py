"""Opening models and data by name, as a model with calibration and evaluation batches."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.errors import MpqError, first_line, summary
from mpq.network.calibration import (
    Batch,
    LossFn,
    careful,
    cross_entropy,
    evaluating,
    mapped,
    next_token_loss,
    take,
    tensors_in,
)
from mpq.network.fingerprint import fingerprint
from mpq.sources.data import Data, open_data
from mpq.sources.networks import Network, network_in, open_network, skeleton
from mpq.sources.objectives import with_objective

LOSSES: Mapping[str, LossFn] = {"accuracy": cross_entropy, "perplexity": next_token_loss}

__all__ = [
    "Data",
    "Network",
    "Source",
    "names_in",
    "network_in",
    "open_data",
    "open_network",
    "open_source",
    "skeleton",
]


@dataclass(frozen=True, eq=False)
class Source:
    """A model and its data, ready to be profiled and measured.

    For a model of your own: `Source("mine", model, calibration, evaluation, loss_fn)`.
    """

    name: str
    model: nn.Module
    calibration: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]  # samples that are not in `calibration`, for the report only
    loss_fn: LossFn
    kind: str = "loss"  # one of `mpq.evaluation.KINDS`
    recipe: Mapping[str, Any] = field(default_factory=dict)  # JSON values from which `skeleton` rebuilds the model
    data: str = "own"  # name of the data
    tokenizer: Any = None
    acceptance: tuple[Batch, ...] = ()  # samples in neither, for comparing finished candidates
    other: tuple[Batch, ...] = ()  # text of another kind, `other_name`, for the report only
    other_name: str = ""
    side_files: tuple[Path, ...] = ()  # tokenizer, processor and the like: copied into every export

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_fn", careful(self.loss_fn))

    def provenance(self) -> dict[str, str]:
        """Provenance for tables and allocations: names, and the SHA-256 of the calibration data."""
        data = fingerprint(tensor for batch in self.calibration for tensor in tensors_in(batch))
        return {"model": self.name, "dataset": self.data, "calibration": data}


def open_source(
    model_name: str,
    data_name: str | None = None,
    *,
    nsamples: int = 128,
    seqlen: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    evaluation_samples: int | None = None,
    model_device: str | torch.device | None = None,
    untrusted: Collection[str] = (),
    network: Network | None = None,
) -> Source:
    """Open a model and data by name.

    Args:
        model_name: a bundled model (`tiny-lm`, `tiny-cnn`), a Hugging Face folder or hub id, a GGUF file or a folder
            with one, `timm:NAME`, or `package.module:factory`, called without arguments (the current folder is
            searched too).
        data_name: `novels`, `chat` or `digits` (bundled), a .txt, .jsonl, .npz or .parquet file,
            `datasets:ID[:CONFIG]`, or `package.module:loader`. By default bundled models take their own data, language
            models the novels, and those with a chat template `chat`: prose, dialogue and code as conversations.
        nsamples: calibration samples (windows of text, images), drawn from the seed.
        seqlen: tokens in a window; by default 256, or the model's context where shorter.
        batch_size: samples in a batch; by default 16, or fewer where a large vocabulary makes their logits large.
        seed: of the draw.
        device: where model and batches go.
        evaluation_samples: at most this many; by default a quarter of `nsamples` windows of text, or four times as many
            images, and at least 32.
        model_device: device of the model, where it differs from the batches'.
        untrusted: names read from a file and not given by the user; they are never imported.
        network: the model, if already open.

    Raises:
        MpqError: an unknown or untrusted name, a missing extra (with its command), data that does not fit.
    """
    for place in (device, model_device):
        check_device(place)
    network = network or open_network(model_name, untrusted)
    data = open_data(
        data_name, network, nsamples=nsamples, seqlen=seqlen, batch_size=batch_size, seed=seed,
        evaluation_samples=evaluation_samples, untrusted=untrusted,
    )  # fmt: skip
    with _running(model_name, data.name, "config" in network.recipe):
        data = with_objective(network, data, seed)
    if data.loss_fn is None and data.kind not in LOSSES:
        raise MpqError(f"{data.name} has no loss: let its loader return a 'loss_fn'")
    source = Source(
        name=model_name,
        model=network.model.to(device if model_device is None else model_device),
        calibration=tuple(to_device(batch, device) for batch in data.calibration),
        evaluation=tuple(to_device(batch, device) for batch in data.evaluation),
        loss_fn=data.loss_fn or LOSSES[data.kind],
        kind=data.kind,
        recipe=network.recipe,
        data=data.name,
        tokenizer=network.tokenizer,
        side_files=network.side_files,
        acceptance=tuple(to_device(batch, device) for batch in data.acceptance),
        other=tuple(to_device(batch, device) for batch in data.other),
        other_name=data.other_name,
    )
    if network.recipe.get("kind") in ("transformers", "factory") and model_device is None:
        _check_runs(source)
    return source


def _check_runs(source: Source) -> None:
    """MpqError where a model from files does not run on a sample of its data, or a user's own on a whole batch."""
    batch, files = source.calibration[0], "config" in source.recipe
    with _running(source.name, source.data, files), torch.no_grad(), evaluating(source.model):
        source.loss_fn(source.model, take(batch, slice(0, 1)) if files else batch)


@contextmanager
def _running(name: str, data: str, files: bool) -> Iterator[None]:
    """Turn what a model raises on data into MpqError; `files`: the model is from files."""
    try:
        yield
    except (MpqError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config or vocabulary that does not fit fails anywhere inside
        why = ": its config, weights and tokenizer do not fit together" if files else ""
        raise MpqError(f"{name} does not run on a sample of {data} ({summary(error)}){why}") from error


def check_device(device: str | torch.device | None) -> None:
    """MpqError for a missing device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise MpqError(f"no device {str(device)!r} here ({first_line(error)}): name another, as cpu") from error


def names_in(provenance: Mapping[str, Any], trust: bool) -> tuple[str | None, str | None, frozenset[str]]:
    """Model and data named by a file's provenance (None where missing), and the untrusted ones of these names.

    Raises:
        MpqError: a value that is not a name.
    """
    names = provenance.get("model"), provenance.get("dataset")
    for name in names:
        if not isinstance(name, str | None):
            raise MpqError(
                f"invalid name {name!r} of a model or data in a file: expected text; name them on the command line"
            )
    return *names, frozenset() if trust else frozenset(filter(None, names))


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    """The batch with all its tensors on the device, in the same containers."""
    return mapped(batch, lambda tensor: tensor.to(device))
