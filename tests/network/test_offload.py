"""Offloading: weights are on the device one module at a time, with equal results.

The device is the CPU itself: copies are made, counted and dropped as on any other device.
"""

import numpy as np
import pytest
import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.models import bundled_model
from mpq.network.calibration import cross_entropy, next_token_loss, seeded
from mpq.network.offload import offloaded
from mpq.sensitivity.profile import profile


def deep() -> nn.Sequential:
    """Twenty layers of 16 kB."""
    model = nn.Sequential(*(part for _ in range(20) for part in (nn.Linear(64, 64, bias=False), nn.ReLU())))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(0.18 * torch.randn(64, 64, generator=seeded(4, name)))
    return model


BATCHES = tuple(
    (torch.randn(6, 64, generator=seeded(0, index)), torch.arange(6) + index) for index in range(2)
)  # fmt: skip


def test_gradients_are_equal_with_one_layer_on_the_device():
    model, inputs = deep(), BATCHES[0][0].clone().requires_grad_()
    model.requires_grad_(False)
    (expected,) = torch.autograd.grad(model(inputs).square().sum(), inputs)
    layer = 64 * 64 * 4
    with offloaded(model, "cpu") as visitors:
        loss = model(inputs).square().sum()
        assert visitors.peak == layer
        assert visitors.resident == 0  # the graph holds no weights
        (found,) = torch.autograd.grad(loss, inputs)
        assert visitors.peak <= 2 * layer  # one being used while the next is fetched
        assert visitors.resident == 0
    assert torch.equal(found, expected)


def test_parameters_and_buffers_are_restored_even_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError), offloaded(model, "cpu"):
        model(torch.zeros(2, 5))
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_tied_weights_and_attention_modules_are_loaded_when_used():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(self.attention(x, x, x)[0])

    model, tokens = Tied(), torch.arange(9).view(1, 9)
    expected = model(tokens)
    with offloaded(model, "cpu") as visitors:
        assert torch.equal(model(tokens), expected)
        assert visitors.peak < sum(parameter.numel() * 4 for parameter in model.parameters())


@pytest.mark.parametrize("metric", ["kl-curvature", "kronecker", "output", "fisher", "quadratic", "loss", "linearity"])
def test_tables_are_the_same(metric):
    plain, moved = (
        profile(deep(), BATCHES, cross_entropy, ("int3-channel",), metric=metric, progress=False, offload=offload)
        for offload in (None, "cpu")
    )
    np.testing.assert_array_equal(moved.scores, plain.scores)
    np.testing.assert_array_equal(moved.errors, plain.errors)


def test_a_language_model():
    model = bundled_model("tiny-lm")
    tokens = (torch.randint(0, 64, (2, 12), generator=seeded(5)),)
    tables = [
        profile(model, tokens, next_token_loss, ("int4-channel",), progress=False, offload=offload)
        for offload in (None, "cpu")
    ]
    np.testing.assert_allclose(tables[1].scores, tables[0].scores, rtol=1e-5)


def test_second_derivatives_are_refused():
    with pytest.raises(MpqError, match="offload"):
        profile(deep(), BATCHES, cross_entropy, ("int3-channel",), metric="hessian", progress=False, offload="cpu")
