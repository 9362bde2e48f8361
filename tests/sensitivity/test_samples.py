"""What metrics take a batch for, and what they say when it is something else."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq
from mpq.core.errors import MpqError
from mpq.sensitivity.samples import check_independent, check_mean


class Recurrent(nn.Module):
    """Reads (time, samples, 4), or (samples, time, 4) when `batch_first`; the classes of each sample's last step."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.cell = nn.RNN(6, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 3)
        self.batch_first = batch_first

    def forward(self, x):
        """(samples, 3)."""
        hidden, _ = self.cell(self.first(x))
        return self.head(hidden[:, -1] if self.batch_first else hidden[-1])


def last_step(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def test_time_first_is_told_where_samples_must_be_split():
    inputs, labels = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    with pytest.raises(MpqError, match="put samples, not time, first"):
        mpq.profile(Recurrent(False), [(inputs, labels)], last_step, ["int3-channel"], progress=False)
    table = mpq.profile(Recurrent(True), [(inputs.transpose(0, 1), labels)], last_step, ["int3-channel"])
    assert (table.scores > 0).all()


def test_samples_that_meet_cannot_be_split():
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0), nn.Softmax(0))
    batch = (torch.randn(5, 4),)
    with pytest.raises(MpqError, match="calibration batch 7 depend on each other"):
        check_independent(model, batch, lambda model, batch: model(batch[0]).square().mean(), 7)


def test_a_loss_that_takes_no_single_sample_is_not_asked():
    check_mean(nn.Linear(4, 3), (torch.randn(5, 4),), lambda model, batch: model(batch[0]).view(5, 3).sum())
