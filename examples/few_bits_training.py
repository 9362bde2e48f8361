"""Train in few bits: simulated NVFP4 forward and backward, in an ordinary training loop."""

import torch
from torch.nn import functional

import mpq
from mpq import lowprecision

source = mpq.open_source("tiny-cnn", nsamples=256, batch_size=32)
recipes = {
    "full precision": None,
    "FP8 hybrid": lowprecision.Recipe("fp8-e4m3", gradients="fp8-e5m2"),
    "NVFP4": lowprecision.Recipe("nvfp4", stochastic="backward", hadamard="backward"),
}
for name, recipe in recipes.items():
    torch.manual_seed(0)
    model = mpq.open_source("tiny-cnn").model
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if recipe is not None:
        lowprecision.convert(model, recipe, exclude="*head*")
    optimizer = lowprecision.StableSPAM(model.parameters(), lr=0.01)
    model.train()
    for _ in range(3):
        for images, labels in source.calibration:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    print(f"{name:15} {mpq.evaluate(model, source.evaluation, source.kind, progress=False)}")
