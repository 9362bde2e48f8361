"""Search while training (FLIQS): formats are sampled in each step, and no retraining follows."""

import torch
from torch.nn import functional

import mpq
from mpq.search import OneShot, Schedule

source = mpq.open_source("tiny-cnn", nsamples=64, batch_size=16)
model = source.model.train()
search = OneShot(model, ["int2-channel", "int4-channel", "int8-channel"], "size", 0.5, schedule=Schedule(steps=40))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(40):
    images, labels = source.calibration[step % len(source.calibration)]
    with search.sample():
        loss = functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    search.update(quality=-loss.item())
allocation = search.allocation()
search.close()
print(allocation)
