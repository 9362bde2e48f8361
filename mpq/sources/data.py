"""Data by name (bundled, a file, a `datasets` id, a user's loader) as calibration and evaluation batches."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mpq.core.errors import MpqError, first_line, nearest_names
from mpq.core.reading import reading
from mpq.models import EVERYTHING, digit_batches, novel_text
from mpq.models.conversations import chat_text, has_template
from mpq.models.data import image_batches, token_windows, window_batches
from mpq.network.calibration import Batch, LossFn, check_batches, tensors_in
from mpq.sources.extras import import_object, need
from mpq.sources.networks import Network

BUNDLED_DATA = {"novels": "perplexity", "digits": "accuracy", "chat": "perplexity"}
OTHER = 8  # windows of text of another kind
HELD_OUT = 0.2  # share of a file's end that is for evaluation only
SEQLEN = 256
# Evaluation samples by kind, relative to calibration: a window of text has hundreds of predictions, an image one.
ACCEPTANCE = {"perplexity": 0.25, "accuracy": 1.0}
EVALUATION = {"perplexity": 0.25, "accuracy": 4.0}
EVALUATION_LEAST = 32
BATCH = 16  # samples
ARRAYS = ".npz"
LOGITS = 2**24  # logits per batch: 64 MB in float32


@dataclass(frozen=True, eq=False)
class Data:
    """Separate batches for calibration, for acceptance of candidates, and for evaluation."""

    name: str
    calibration: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]
    kind: str  # "accuracy", "perplexity" or "loss"
    loss_fn: LossFn | None = None
    acceptance: tuple[Batch, ...] = ()  # empty where there are too few samples
    other: tuple[Batch, ...] = ()  # another kind of text, for the report
    other_name: str = ""


@dataclass(frozen=True)
class Wanted:
    """Requested number and size of samples."""

    nsamples: int
    seqlen: int
    batch_size: int
    seed: int
    evaluation_samples: int | None

    def calibration(self, there: int = EVERYTHING) -> dict[str, int]:
        """Keyword arguments of the functions that make batches; a fifth of the samples is kept for acceptance."""
        return {**self._common(), "samples": min(self.nsamples, there - there // 5)}

    def acceptance(self, kind: str, there: int = EVERYTHING) -> dict[str, int]:
        """The same for acceptance: samples that calibration does not draw."""
        samples = max(1, round(ACCEPTANCE[kind] * self.nsamples))
        return {**self._common(), "samples": samples, "skip": self.calibration(there)["samples"]}

    def evaluation(self, kind: str) -> dict[str, int]:
        """The same for evaluation."""
        most = max(EVALUATION_LEAST, round(EVALUATION[kind] * self.nsamples))
        return {**self._common(), "samples": self.evaluation_samples or most}

    def _common(self) -> dict[str, int]:
        return {"batch_size": self.batch_size, "seed": self.seed}


def open_data(
    name: str | None,
    network: Network,
    *,
    nsamples: int = 128,
    seqlen: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    evaluation_samples: int | None = None,
    untrusted: Collection[str] = (),
) -> Data:
    """Open data by name (None: the network's default) as batches; see `mpq.sources.open_source`.

    A file's last fifth is for evaluation and the rest for calibration.

    Raises:
        MpqError: unknown data, with the nearest names; data of another kind than the network's.
    """
    if network.context is not None and (seqlen or 0) > network.context:
        raise MpqError(f"seqlen {seqlen} is more than {network.name} takes: at most {network.context}")
    if nsamples < 1 or (batch_size is not None and batch_size < 1):
        raise MpqError(f"nsamples and batch_size must be at least 1, not {nsamples} and {batch_size}")
    seqlen = min(SEQLEN, network.context or SEQLEN) if seqlen is None else seqlen
    batch_size = batch_size or _fitting(network, seqlen)
    wanted = Wanted(nsamples, seqlen, batch_size, seed, evaluation_samples)
    if name is None:
        name = _default(network)
    data = _named(name, network, wanted, untrusted)
    return with_other(data, network, wanted) if data.kind == network.kind == "perplexity" else data


def with_other(data: Data, network: Network, wanted: Wanted) -> Data:
    """The data with text of another kind: the novels, or conversations if the data are the novels."""
    name = "chat" if data.name == "novels" else "novels"
    if network.encode is None or (name == "chat" and not has_template(network.tokenizer)):
        return data
    try:
        windows = token_windows(network.encode(_text(name, "evaluation", network)), wanted.seqlen)
    except MpqError:  # too short for such long windows
        return data
    batches = window_batches(windows, batch_size=wanted.batch_size, samples=OTHER, seed=wanted.seed)
    return replace(data, other=batches, other_name=name)


def _named(name: str, network: Network, wanted: Wanted, untrusted: Collection[str]) -> Data:
    if name in BUNDLED_DATA:
        return _bundled(name, network, wanted)
    if name.startswith("datasets:"):
        return _from_hub(name, network, wanted)
    path = Path(name)
    if path.suffix in (*_TEXTS, ARRAYS):
        if not path.is_file():
            raise MpqError(f"no such file: {name}")
        with reading(path, f"{path.suffix} data file", "make it again"):
            if path.suffix == ARRAYS:
                return _from_arrays(path, network, wanted)
            text = "\n".join(_TEXTS[path.suffix](path))
        return _texts(name, [text], network, wanted)
    if ":" in name:
        return _from_loader(name, network, wanted, untrusted)
    known = [*BUNDLED_DATA, *(f"FILE{suffix}" for suffix in (*_TEXTS, ARRAYS)), "datasets:ID", "package.module:loader"]
    raise MpqError(f"unknown data {name!r}: {nearest_names(name, known)}")


def _fitting(network: Network, seqlen: int) -> int:
    """BATCH samples, fewer of a language model whose vocabulary makes their logits large."""
    words = getattr(getattr(network.model, "config", None), "vocab_size", None)
    return min(BATCH, max(1, LOGITS // (seqlen * words))) if isinstance(words, int) and words > 0 else BATCH


def _default(network: Network) -> str:
    if network.recipe.get("name") == "tiny-cnn":
        return "digits"
    if network.kind == "perplexity" and has_template(network.tokenizer):
        return "chat"
    if network.kind == "perplexity" or (network.kind in ("distance", "seq2seq") and network.encode is not None):
        return "novels"
    raise MpqError(f"no data for {network.name}: name a file or package.module:loader with --dataset")


def _bundled(name: str, network: Network, wanted: Wanted) -> Data:
    _check_kind(name, BUNDLED_DATA[name], network)
    kind = BUNDLED_DATA[name]
    if name == "digits":
        calibration, evaluation = digit_batches(**wanted.calibration())
        held, _ = digit_batches(**wanted.acceptance(kind))
        samples = wanted.evaluation(kind)["samples"]
        limited: list[Batch] = []
        for inputs, labels in evaluation:
            left = samples - sum(len(part[1]) for part in limited)
            limited += [(inputs[:left], labels[:left])] if left > 0 else []
        return Data(name, calibration, tuple(limited), kind, acceptance=held)
    encode = _encoder(network)
    if name == "chat" and not has_template(network.tokenizer):
        raise MpqError(f"{network.name} has no chat template: take the data novels, or a file")
    windows = {
        use: token_windows(encode(_text(name, use, network)), wanted.seqlen) for use in ("calibration", "evaluation")
    }
    return Data(
        name,
        window_batches(windows["calibration"], **wanted.calibration()),
        window_batches(windows["evaluation"], **wanted.evaluation(kind)),
        kind,
        acceptance=window_batches(windows["calibration"], **wanted.acceptance(kind)),
    )


def _text(name: str, use: str, network: Network) -> str:
    """Bundled text for "calibration" or "evaluation"."""
    return novel_text(use) if name == "novels" else chat_text(network.tokenizer, use)


def _whole_text(path: Path) -> list[str]:
    return [path.read_text("utf-8-sig")]


def _lines_of_json(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):  # strings may hold other line ends
        try:
            if line.strip():
                texts.append(_text_in(line))
        except (ValueError, KeyError, TypeError) as error:
            raise MpqError(f'{path} line {number} is not {{"text": ...}}: {error!r}') from error
    return texts


def _text_in(line: str) -> str:
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.40} is no text")
    return text


def _parquet_column(path: Path) -> list[str]:
    parquet = need("pyarrow.parquet", "data", ".parquet files")
    columns = parquet.read_schema(path).names
    if "text" not in columns:
        raise MpqError(f"{path} has the columns {', '.join(columns)}: expected a column called text")
    texts: list[str | None] = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return [text for text in texts if text is not None]


def _from_hub(name: str, network: Network, wanted: Wanted) -> Data:
    datasets = need("datasets", "data", "hub data sets")
    _, id_, *config = name.split(":")
    try:
        splits = datasets.load_dataset(id_, *config)
    except (OSError, ValueError, RuntimeError) as error:
        raise MpqError(f"the data set {id_!r} cannot be loaded: {first_line(error)}") from error
    held_out = next((split for split in ("test", "validation") if split in splits), None)
    seen = "train" if "train" in splits else next(iter(splits))
    if "text" not in splits[seen].column_names:
        raise MpqError(f"{name} has the columns {', '.join(splits[seen].column_names)}: expected a column called text")
    if held_out is None or held_out == seen:
        return _texts(name, splits[seen]["text"], network, wanted)
    windows = [_windows(name, splits[split]["text"], network, wanted) for split in (seen, held_out)]
    return _data_of_windows(name, windows[0], windows[1], wanted)


def _texts(name: str, texts: Iterable[str], network: Network, wanted: Wanted) -> Data:
    _check_kind(name, "perplexity", network)
    return _split_windows(name, _windows(name, texts, network, wanted), wanted)


def _windows(name: str, texts: Iterable[str], network: Network, wanted: Wanted) -> Tensor:
    return token_windows(_encoder(network)("\n".join(texts)), wanted.seqlen, name)


def _split_windows(name: str, windows: Tensor, wanted: Wanted) -> Data:
    border = len(windows) - max(1, round(HELD_OUT * len(windows)))
    if border < 1:
        raise MpqError(f"{name} gives {len(windows)} sample(s): expected at least two, one of them for evaluation")
    return _data_of_windows(name, windows[:border], windows[border:], wanted)


def _data_of_windows(name: str, seen: Tensor, unseen: Tensor, wanted: Wanted) -> Data:
    return Data(
        name,
        window_batches(seen, **wanted.calibration(len(seen))),
        window_batches(unseen, **wanted.evaluation("perplexity")),
        "perplexity",
        acceptance=window_batches(seen, **wanted.acceptance("perplexity", len(seen))),
    )


def _from_arrays(path: Path, network: Network, wanted: Wanted) -> Data:
    """`images` or `inputs` with `labels`, or `input_ids` (windows, seqlen)."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if "input_ids" in arrays:
        _check_kind(str(path), "perplexity", network)
        return _split_windows(str(path), torch.from_numpy(arrays["input_ids"].astype(np.int64)), wanted)
    key = next((name for name in ("images", "inputs") if name in arrays), None)
    if key is not None and network.kind == "distance":
        arrays.setdefault("labels", np.zeros(len(arrays[key]), np.int64))  # not used
    if key is None or "labels" not in arrays or len(arrays[key]) != len(arrays["labels"]):
        raise MpqError(f"{path} holds {', '.join(arrays)}: expected images (or inputs) and labels, or input_ids")
    _check_kind(str(path), "accuracy", network)
    inputs = _image_tensor(arrays[key], network) if key == "images" else torch.from_numpy(arrays[key]).float()
    labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    border = len(inputs) - max(1, round(HELD_OUT * len(inputs)))
    if border < 1:
        raise MpqError(f"{path} gives {len(inputs)} sample(s): expected at least two, one of them for evaluation")
    return Data(
        str(path),
        image_batches(inputs[:border], labels[:border], **wanted.calibration(border)),
        image_batches(inputs[border:], labels[border:], **wanted.evaluation("accuracy")),
        "accuracy",
        acceptance=image_batches(inputs[:border], labels[:border], **wanted.acceptance("accuracy", border)),
    )


def _image_tensor(images: Any, network: Network) -> Tensor:
    """uint8 (n, height, width[, channels]) as float (n, channels, height, width) in [0, 1], normalized."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise MpqError(
            f"invalid images: expected uint8 of 3 or 4 dimensions, not {images.dtype} {images.shape}: use inputs"
        )
    tensor = torch.from_numpy(images).float() / 255
    tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
    if network.size is not None and tensor.shape[2:] != network.size:
        tensor = functional.interpolate(tensor, network.size, mode="bilinear", antialias=True)
    if network.mean:
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (network.mean, network.std))
        tensor = (tensor - mean) / std
    return tensor


def _from_loader(name: str, network: Network, wanted: Wanted, untrusted: Collection[str]) -> Data:
    """Data from a loader that returns batches or a mapping with "calibration", "acceptance", "evaluation", "loss_fn".

    All but "calibration" are optional; of four or more calibration batches, the last fifth is then for acceptance.
    """
    loaded = import_object(name, untrusted)()
    acceptance: tuple[Batch, ...] = ()
    loss_fn = loaded.get("loss_fn") if isinstance(loaded, Mapping) else None
    if isinstance(loaded, Mapping):
        if "calibration" not in loaded:
            raise MpqError(f"{name} gave {', '.join(map(str, loaded))}: expected calibration, evaluation[, loss_fn]")
        calibration = check_batches(loaded["calibration"])
        evaluation = check_batches(loaded["evaluation"]) if "evaluation" in loaded else ()
        acceptance = check_batches(loaded["acceptance"]) if "acceptance" in loaded else ()
    else:
        calibration, evaluation = check_batches(loaded), ()
    if not evaluation:
        if len(calibration) < 2:
            raise MpqError(f"{name} returned one batch: expected at least two, of which the last is for evaluation")
        border = len(calibration) - max(1, round(HELD_OUT * len(calibration)))
        calibration, evaluation = calibration[:border], calibration[border:]
    if not acceptance and len(calibration) >= 4:
        border = len(calibration) - max(1, round(HELD_OUT * len(calibration)))
        calibration, acceptance = calibration[:border], calibration[border:]
    kind = "loss" if loss_fn else _kind_of(name, calibration[0], network)
    return Data(name, calibration, evaluation, kind, loss_fn, acceptance)


def _kind_of(name: str, batch: Batch, network: Network) -> str:
    if network.kind in ("distance", "seq2seq"):
        return network.kind
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return "accuracy"
    first = tensors_in(batch)[0]
    if first.ndim == 2 and not first.is_floating_point():
        return "perplexity"
    raise MpqError(f"{name} gives neither (inputs, labels) nor tokens: let it return a 'loss_fn' with its batches")


def _encoder(network: Network) -> Callable[[str], list[int]]:
    if network.encode is None:
        reason = network.damage or f"{network.name} has no tokenizer for text"
        raise MpqError(f"{reason}: give token windows by package.module:loader or .npz")
    return network.encode


def _check_kind(name: str, kind: str, network: Network) -> None:
    wanted = network.kind
    if wanted in ("distance", "seq2seq"):  # any inputs of the model
        wanted = "perplexity" if network.encode is not None or network.damage else "accuracy"
    if wanted is not None and wanted != kind:
        needed = "text" if wanted == "perplexity" else "labelled images"
        raise MpqError(f"{network.name} takes {needed}, which {name} is not")


_TEXTS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _whole_text,
    ".jsonl": _lines_of_json,
    ".parquet": _parquet_column,
}
