"""Objectives of models without a loss of their data, and batches in their form."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpq.core.errors import MpqError
from mpq.network.calibration import Batch
from mpq.network.distance import distance_loss, with_targets
from mpq.sources.data import Data
from mpq.sources.networks import Network


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes from "labels" among its keyword arguments."""
    loss: Tensor = model(**batch).loss
    return loss


def with_objective(network: Network, data: Data, seed: int = 0) -> Data:
    """The data as batches of the network's objective, where the data has no loss.

    Encoders are compared with their original output ("distance"). Encoder-decoders predict "labels" ("loss"): the
    second half of a window of text from the first.
    """
    if data.loss_fn is not None or network.kind not in ("distance", "seq2seq"):
        return data
    parts: dict[str, tuple[Batch, ...]] = {
        name: getattr(data, name) for name in ("calibration", "evaluation", "acceptance")
    }
    if network.kind == "seq2seq":
        halves: dict[str, Any] = {name: tuple(map(_translated, batches)) for name, batches in parts.items()}
        return replace(data, **halves, kind="loss", loss_fn=own_loss)
    targets: dict[str, Any] = {
        name: with_targets(
            network.model, [_named(network, batch) for batch in batches], noise=name == "calibration", seed=seed
        )
        for name, batches in parts.items()
    }
    return replace(data, **targets, kind="distance", loss_fn=distance_loss)


def _translated(batch: Batch) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    if not isinstance(batch, Tensor) or batch.shape[1] < 2:
        raise MpqError("an encoder-decoder takes text, or mappings of its keyword arguments with labels")
    half = batch.shape[1] // 2
    return {"input_ids": batch[:, :half].contiguous(), "labels": batch[:, half:].contiguous()}


def _named(network: Network, batch: Batch) -> Mapping[str, Any]:
    """Batches as keyword arguments; windows of text get the tokenizer's first and last special tokens."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, (tuple, list)):
        return {"pixel_values": batch[0]}
    tokens = batch.clone()
    for place, name in ((0, "cls_token_id"), (-1, "sep_token_id")):
        if (token := getattr(network.tokenizer, name, None)) is not None:
            tokens[:, place] = token
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
