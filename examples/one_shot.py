"""Search while training (FLIQS): formats are sampled in each step, and no retraining follows."""

import sys
import tempfile

import torch
from torch.nn import functional

import mpq
from mpq.search import OneShot, Schedule

source = mpq.open_source("tiny-cnn", nsamples=64, batch_size=16)
model = source.model.train()
schedule = Schedule(steps=40)  # then the choice is final and the weights train in it
search = OneShot(model, ["int2-channel", "int4-channel", "int8-channel"], "size", 0.5, schedule=schedule)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(56):
    images, labels = source.calibration[step % len(source.calibration)]
    with search.sample():
        loss = functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    search.update(quality=-loss.item())
allocation, rounder = search.allocation(), search.rounder()
search.close()
folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
mpq.export(model.eval(), allocation, folder, method=rounder, recipe=source.recipe)  # exactly the trained weights
quality = mpq.evaluate(mpq.load(folder), source.evaluation, source.kind, progress=False)
print(f"{allocation}\n{allocation.provenance['cost_over_target']:.3f} of the target, packed: {quality}")
