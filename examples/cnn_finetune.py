"""Win back what low bits lose: fine-tune a simulated copy, then pack what it has become."""

import torch
from torch.nn import functional

import mpq

source = mpq.open_source("tiny-cnn", nsamples=256, batch_size=32)
table = mpq.profile(
    source.model, source.calibration[:1], source.loss_fn, ["int2-channel", "int4-channel"], metric="fisher"
)
allocation = mpq.frontier(table).at(bits=2.6)
student = mpq.simulate(source.model, allocation)  # rounds in the forward pass; gradients pass straight through


def accuracy(model: torch.nn.Module) -> float:
    return mpq.evaluate(model, source.evaluation, source.kind, progress=False).value


before = accuracy(student)
optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
student.train()
for _ in range(3):
    for images, labels in source.calibration:
        optimizer.zero_grad()
        functional.cross_entropy(student(images), labels).backward()
        optimizer.step()
print(f"original {accuracy(source.model):.3f}, 2.6 bits {before:.3f}, fine-tuned {accuracy(student.eval()):.3f}")
