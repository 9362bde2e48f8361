"""Measuring packed models in folders."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.evaluation import Quality, Reference, evaluate
from mpq.exporters.folder import read_json
from mpq.exporters.opening import Opened, open_any
from mpq.lowprecision.reproducibility import Reproducibility, reproducibility
from mpq.network.calibration import tensors_in
from mpq.sources import Network, Source, names_in, network_in, open_network, open_source

log = logging.getLogger(__name__)


def evaluate_folder(
    folder: str | os.PathLike[str],
    data: str | None = None,
    *,
    trust: bool = False,
    progress: bool = True,
    **options: Any,
) -> tuple[Quality, Allocation]:
    """Load a packed model and measure it, and its divergence from the original, on its table's data or on `data`.

    A model of transformers whose original is gone is measured alone, by the config and tokenizer in the folder.

    Args:
        folder: what `quantize_model`, `mpq.export` or another quantizer wrote, as `mpq.load` reads it.
        data: name of other data.
        trust: whether what the folder names may be imported and called: factories of models, loaders of data.
        progress: show progress bars.
        **options: of `mpq.sources.open_source`.

    Raises:
        MpqError: the folder is incomplete or altered, or it asks for code and is not trusted.
    """
    model, source, allocation, alone = open_folder(folder, data, trust=trust, **options)
    if alone:
        if source.kind == "distance":
            raise MpqError(f"cannot open {source.name}, from which the distance of {folder} is measured: restore it")
        return evaluate(model, source.evaluation, source.kind, source.loss_fn, progress), allocation
    reference = Reference(source.model, source.evaluation, source.kind, source.loss_fn, progress)
    return reference.measure(model, progress), allocation


def reproducibility_of_folder(
    folder: str | os.PathLike[str],
    data: str | None = None,
    *,
    prompts: int = 8,
    length: int = 32,
    steps: int = 16,
    trust: bool = False,
    **options: Any,
) -> tuple[Reproducibility, ...]:
    """How much a packed language model's greedy answers depend on batch size, padding and threads, by precision.

    Args:
        folder: what `quantize_model` or `mpq.export` wrote.
        data: name of other data.
        prompts: the first so many samples of the data.
        length: tokens of a prompt, from its beginning.
        steps: tokens of an answer.
        trust: as in `evaluate_folder`.
        **options: of `mpq.sources.open_source`.

    Raises:
        MpqError: as in `evaluate_folder`, or not a language model.
    """
    model, source, _, _ = open_folder(folder, data, trust=trust, **options)
    if source.kind != "perplexity":
        raise MpqError(f"{folder} is not a language model: reproducibility is measured on generated tokens")
    tokens = torch.cat([tensors_in(batch)[0][:, :length] for batch in source.evaluation])[:prompts]
    return reproducibility(model, tokens, steps)


def open_folder(
    folder: str | os.PathLike[str], data: str | None = None, *, trust: bool = False, **options: Any
) -> tuple[nn.Module, Source, Allocation, bool]:
    """The packed model, its source, its allocation, and whether the original could not be opened."""
    path = Path(folder)
    opened = open_any(path, trust=trust)
    model, allocation = opened.model, opened.allocation
    name, dataset, untrusted = names_in(allocation.provenance, trust)
    if name is None and opened.kind == "mpq":
        raise MpqError(f"{path} does not name its original model: measure it with mpq.evaluate in Python")
    if name is None:
        name, network, alone = str(path), opened.network or network_in(path, model), True
    else:
        network, alone = _original(path, name, untrusted, opened)
    if data is None and dataset is not None and Path(dataset).suffix and not (":" in dataset or Path(dataset).exists()):
        raise MpqError(f"the data {dataset} of {path} no longer exist: name a file with --dataset")
    source = open_source(name, data or dataset, untrusted=untrusted - {data}, network=network, **options)
    return model, source, allocation, alone


def _original(folder: Path, name: str, untrusted: frozenset[str], packed: Opened) -> tuple[Network, bool]:
    """The original network; where a model of transformers cannot be opened any more, the packed one, alone."""
    try:
        return open_network(name, untrusted), False
    except MpqError:
        config = read_json(folder / "config.json") if packed.network is None else {}
        if ":" in name or (packed.network is None and ("model_type" not in config or config.get("recipe") is not None)):
            raise
        log.warning("the original model %s cannot be opened: measured without it", name)
        return packed.network or network_in(folder, packed.model), True
