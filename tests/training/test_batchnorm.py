"""Folding keeps outputs; freezing stops the statistics; unfoldable norms are reported."""

import copy

import pytest
import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy
from mpq.training.batchnorm import fold_batchnorm, freeze_batchnorm
from tests.sensitivity.small_models import Convolutions, class_batches, seed_weights


def forward(model, batch):
    return model(batch)


class Norms(nn.Module):
    """Every kind of layer with a norm behind it: (n, 4, 6, 6) -> (n, 5)."""

    def __init__(self, bias: bool, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, bias=bias)
        self.norm = nn.BatchNorm2d(6, affine=affine)
        self.line = nn.Conv1d(6, 4, 2, bias=bias)
        self.line_norm = nn.BatchNorm1d(4, eps=1e-3)
        self.head = nn.Linear(4 * 15, 5, bias=bias)
        self.head_norm = nn.BatchNorm1d(5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.line_norm(self.line(x.flatten(2)))
        return self.head_norm(self.head(x.flatten(1)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding_keeps_outputs(bias, affine):
    model = seed_weights(Norms(bias, affine)).double()
    images = class_batches((4, 6, 6), (32,))[0][0].double()
    for _ in range(5):
        model.train()(images * 2 + 1)
    model.eval()
    expected = model(images)
    assert fold_batchnorm(model, images, forward) == ("conv", "line", "head")
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())
    torch.testing.assert_close(model(images), expected)


def test_frozen_norms_train_as_the_folded_model_would():
    model = seed_weights(Convolutions())
    batch = class_batches((4, 6, 6), (16,))[0]
    for _ in range(3):
        model.train()(batch[0])
    model.drop.p = 0.0
    handles = freeze_batchnorm(model)
    mean = model.norm.running_mean.clone()
    expected = copy.deepcopy(model).eval()(batch[0])
    model.train()
    assert torch.equal(model(batch[0]), expected)
    assert torch.equal(model.norm.running_mean, mean)
    cross_entropy(model, batch).backward()
    assert model.norm.weight.grad is not None
    for handle in handles:
        handle.remove()
    model.train()(batch[0])
    assert not torch.equal(model.norm.running_mean, mean)


def test_unfoldable_norms_are_reported():
    images = torch.ones(2, 4)
    with pytest.raises(MpqError, match="batch normalization 1 does not follow a layer"):
        fold_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), images, forward)
    line = nn.Linear(4, 4)
    with pytest.raises(MpqError, match="layer 0 is used 2 times"):
        fold_batchnorm(nn.Sequential(line, nn.ReLU(), line, nn.BatchNorm1d(4)), images, forward)
    with pytest.raises(MpqError, match="without stored statistics"):
        fold_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), images, forward)
