"""The stages one by one, on a bundled network: profile, search, simulate, export, load."""

import sys
import tempfile

import torch

import mpq

source = mpq.open_source("tiny-cnn", nsamples=32)
formats = ["int2-g32", "int4-g32", "int8-channel", "fp8-e4m3"]
table = mpq.profile(source.model, source.calibration, source.loss_fn, formats, metric="fisher")
frontier = mpq.frontier(table)
allocation = frontier.at(bits=4.25)
print(frontier)
print(allocation)

simulated = mpq.simulate(source.model, allocation, trainable=False)
print("original: ", mpq.evaluate(source.model, source.evaluation, source.kind, progress=False))
print("simulated:", mpq.evaluate(simulated, source.evaluation, source.kind, progress=False))

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
mpq.export(source.model, allocation, folder, recipe=source.recipe)
packed = mpq.load(folder)
inputs = source.evaluation[0][0]
with torch.no_grad():
    print("packed differs from simulated by", (packed(inputs) - simulated(inputs)).abs().max().item())
