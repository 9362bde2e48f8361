"""Two small trained models shipped with the package, with calibration and evaluation data."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpq.core.errors import MpqError, nearest_names
from mpq.evaluation import Quality, evaluate
from mpq.models.data import image_batches, text_batches
from mpq.models.tiny_cnn import TinyCNN
from mpq.models.tiny_lm import TinyLM
from mpq.models.tokenizer import PieceTokenizer
from mpq.network.calibration import Batch, LossFn, cross_entropy, next_token_loss

EVERYTHING = 1_000_000  # larger than any bundled data set
TRAINED_DIGITS = 1297  # digits from here on were not in the training set


@dataclass(frozen=True)
class BundledModel:
    """A shipped model: how to build it, its weights' file and its measure of quality."""

    build: Callable[[], nn.Module]
    weights: str
    kind: str  # "accuracy" or "perplexity"
    loss_fn: LossFn


BUNDLED = {
    "tiny-lm": BundledModel(TinyLM, "tiny_lm.safetensors", "perplexity", next_token_loss),
    "tiny-cnn": BundledModel(TinyCNN, "tiny_cnn.safetensors", "accuracy", cross_entropy),
}


@dataclass(frozen=True, eq=False)
class BundledTask:
    """A trained model with its data."""

    name: str
    model: nn.Module
    calibration: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]
    loss_fn: LossFn
    kind: str  # "accuracy" or "perplexity"

    def quality(self, model: nn.Module | None = None) -> Quality:
        """Accuracy or perplexity on the evaluation batches, of the model itself or of a changed copy."""
        return evaluate(self.model if model is None else model, self.evaluation, self.kind)


def bundled(name: str, *, nsamples: int = 128, seqlen: int = 256, batch_size: int = 16, seed: int = 0) -> BundledTask:
    """The model of this name with `nsamples` calibration samples drawn from the seed, and all its evaluation data.

    Raises:
        MpqError: an unknown name, with the nearest known ones.
    """
    model = bundled_model(name)
    calibration: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]
    if name == "tiny-lm":
        calibration, evaluation = (
            novel_batches(use, tokenizer().encode, seqlen=seqlen, batch_size=batch_size, samples=samples, seed=seed)
            for use, samples in (("calibration", nsamples), ("evaluation", EVERYTHING))
        )
    else:
        calibration, evaluation = digit_batches(nsamples, batch_size=batch_size, seed=seed)
    about = BUNDLED[name]
    return BundledTask(name, model, calibration, evaluation, about.loss_fn, about.kind)


def bundled_model(name: str) -> nn.Module:
    """The trained model, float32, in evaluation mode; MpqError for an unknown name."""
    if name not in BUNDLED:
        raise MpqError(f"unknown bundled model {name!r}: {nearest_names(name, BUNDLED)}")
    model = BUNDLED[name].build()
    with as_file(files(__name__) / BUNDLED[name].weights) as path:
        state = load_file(path)
    model.load_state_dict({key: value.to(model.state_dict()[key].dtype) for key, value in state.items()}, strict=False)
    return model.eval()


def tokenizer() -> PieceTokenizer:
    """The tokenizer of tiny-lm."""
    with as_file(files(__name__) / "tiny_lm_pieces.txt") as path:
        return PieceTokenizer.load(path)


def novel_batches(
    use: str,
    encode: Callable[[str], list[int]],
    *,
    seqlen: int,
    batch_size: int,
    samples: int,
    seed: int,
    skip: int = 0,
) -> tuple[Tensor, ...]:
    """Token windows of Jane Austen: "calibration" (Pride and Prejudice), "evaluation" (Persuasion, unseen)."""
    text = novel_text(use)
    return text_batches(text, encode, seqlen=seqlen, batch_size=batch_size, samples=samples, seed=seed, skip=skip)


def novel_text(use: str) -> str:
    """Jane Austen: "calibration" (Pride and Prejudice), "evaluation" (Persuasion)."""
    return (files(__name__) / f"tiny_lm_{use}.txt").read_text("utf-8")


def digit_batches(
    samples: int, *, batch_size: int, seed: int, skip: int = 0
) -> tuple[tuple[tuple[Tensor, Tensor], ...], tuple[tuple[Tensor, Tensor], ...]]:
    """Calibration batches (from the training set) and the 500 other digits for evaluation, (n, 1, 8, 8)."""
    with as_file(files(__name__) / "tiny_cnn_digits.npz") as path, np.load(path) as data:
        images, labels = torch.from_numpy(data["images"]).float().unsqueeze(1) / 16, torch.from_numpy(data["labels"])
    seen, unseen = slice(0, TRAINED_DIGITS), slice(TRAINED_DIGITS, None)
    return (
        image_batches(images[seen], labels[seen].long(), batch_size=batch_size, samples=samples, seed=seed, skip=skip),
        image_batches(images[unseen], labels[unseen].long(), batch_size=100, samples=EVERYTHING, seed=seed),
    )
