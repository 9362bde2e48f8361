"""`mpq finetune`: a packed model fine-tuned from the codes in its folder and written to another folder."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.evaluation import Quality, Reference
from mpq.exporters import export
from mpq.exporters.folder import read_json, refuse_foreign
from mpq.exporters.mpq import checkpoint
from mpq.exporting import few_samples
from mpq.finetuning import Finetuned, finetune
from mpq.folders import open_folder
from mpq.kernels.layout import unpack
from mpq.kernels.weight import PackedWeight
from mpq.network.copies import copied
from mpq.network.prepare import prepared
from mpq.quantized import checked_layers
from mpq.rounding.reference import Quantized
from mpq.rounding.store import Finished, MethodRounder
from mpq.training.settings import Finetuning

UNFINISHED = ".unfinished"  # suffix of the file from which an interrupted fine-tuning resumes
COMPARED = 2  # samples on which the written model is compared with the trained one


@dataclass(frozen=True, eq=False)
class FinetunedFolder:
    """Result of `finetune_folder`."""

    folder: Path
    finetuned: Finetuned
    allocation: Allocation
    original: Quality  # on the report's data, as the next two
    before: Quality
    after: Quality

    def words(self) -> tuple[str, ...]:
        """The changes, in sentences."""
        sentences = [self.finetuned.verdict()]
        if self.before.divergence is not None and self.after.divergence is not None:
            (one, _), (other, _) = self.before.divergence.mean(), self.after.divergence.mean()
            difference, error = self.after.harm_above(self.before)
            sentences.append(
                f"On the report's data the KL divergence from the original went from {one:.4g} to {other:.4g} "
                f"(difference {difference:.3g} +- {error:.1g})."
            )
        return tuple(sentences)


def finetune_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Finetuning,
    data: str | None = None,
    *,
    trust: bool = False,
    progress: bool = True,
    **options: Any,
) -> FinetunedFolder:
    """Fine-tune a packed model against its original, and write it packed; both are measured on the report's data.

    Training starts from the codes, scales and other tensors in the folder. After an interruption the same call resumes.

    Args:
        folder: what `mpq quantize` or `mpq.export` wrote.
        output: another folder.
        settings: of the training; the objective of models without logits is their loss.
        data: name of other data than the folder's.
        trust: whether what the folder names may be imported and called.
        progress: show progress bars.
        **options: of `mpq.sources.open_source`; `nsamples` is how much is trained on.

    Raises:
        MpqError: a folder that cannot be read, whose original is gone or that is the output too.
    """
    path, target = Path(folder), Path(output)
    if path.resolve() == target.resolve():
        raise MpqError(f"cannot write the result to its own source {path}: name another output folder")
    refuse_foreign(target, checkpoint.FILES)
    packed, source, allocation, alone = open_folder(path, data, trust=trust, **options)
    if alone:
        raise MpqError(f"cannot open {source.name}, the original of {path}, which training needs: restore it")
    source = replace(source, model=prepared(source.model))
    if source.kind not in ("accuracy", "perplexity") and settings.objective.kl:
        settings = replace(settings, objective=replace(settings.objective, kl=0.0, task=1.0))
    reference = Reference(source.model, source.evaluation, source.kind, source.loss_fn, progress)
    before = reference.measure(packed, progress)
    rounding = read_json(path / "config.json")["quantization_config"].get("rounding", "unknown")
    rounder, start = _start(packed, source.model, allocation, rounding)
    finetuned = finetune(
        start, allocation, source.calibration, source.loss_fn, settings, acceptance=source.acceptance or None,
        method=rounder, teacher=source.model, checkpoint=target.with_name(target.name + UNFINISHED), progress=progress,
    )  # fmt: skip
    few = few_samples(source, COMPARED)
    export(
        finetuned.model, allocation, target, recipe=source.recipe or None, side_files=source.side_files,
        inputs=lambda model: source.loss_fn(model, few),
    )  # fmt: skip
    own = None if source.recipe else copied(source.model)
    after = reference.measure(checkpoint.load(target, model=own, trust=trust), progress)
    return FinetunedFolder(target, finetuned, allocation, reference.quality, before, after)


@torch.no_grad()
def _start(packed: nn.Module, original: nn.Module, allocation: Allocation, rounding: str) -> tuple[Finished, nn.Module]:
    """The folder's codes, and the original with every other tensor as the folder has it."""
    layers = [layer for layer, _ in checked_layers(original, allocation)]
    codes: dict[str, Quantized] = {}
    for layer in layers:
        weight = packed.get_submodule(layer.name).weight
        assert isinstance(weight, PackedWeight)
        codes[layer.name] = unpack(weight.matrix())
    start, weights = copied(original), {f"{name}.weight" for layer in layers for name in layer.names}
    theirs = packed.state_dict()
    for name, tensor in start.state_dict().items():
        if name not in weights and name in theirs and theirs[name].shape == tensor.shape:
            tensor.copy_(theirs[name])
    return Finished(rounding, codes, MethodRounder("nearest")), start
