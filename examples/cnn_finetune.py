"""Recover the loss of low bits: fine-tune under an allocation, export exactly what was trained, load it packed."""

import sys
import tempfile

import torch
from torch.nn import functional

import mpq

source = mpq.open_source("tiny-cnn", nsamples=256, batch_size=32)
table = mpq.profile(
    source.model, source.calibration[:1], source.loss_fn, ["int2-channel", "int4-channel"], metric="fisher"
)
allocation = mpq.frontier(table).at(bits=2.6)


def accuracy(model: torch.nn.Module) -> float:
    return mpq.evaluate(model, source.evaluation, source.kind, progress=False).value


# In one call: distillation from the original, learned scales; never worse than the start on acceptance data.
tuned = mpq.finetune(
    source.model, allocation, source.calibration, source.loss_fn, mpq.Finetuning(steps=24, lr=1e-3),
    acceptance=source.acceptance,
)  # fmt: skip
print(tuned.verdict())

# In your own loop: a simulated copy is an ordinary module for any optimizer, DistributedDataParallel, accelerate.
student = mpq.simulate(source.model, allocation, learned=True)
before = accuracy(student)
optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
student.train()
for _ in range(3):
    for images, labels in source.calibration:
        optimizer.zero_grad()
        functional.cross_entropy(student(images), labels).backward()
        optimizer.step()

# Both ways the export holds exactly the trained codes and scales.
folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
mpq.export(student.eval(), allocation, folder, recipe=source.recipe)
packed = mpq.load(folder)
print(
    f"original {accuracy(source.model):.3f}, {allocation.bits:.1f} bits {before:.3f}, "
    f"fine-tuned {accuracy(student):.3f}, packed {accuracy(packed):.3f}; mpq.finetune {accuracy(tuned.model):.3f}"
)
