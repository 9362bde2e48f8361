"""Calibration batches: losses, checks and seeds."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.network.calibration import (
    check_batches,
    check_loss,
    cross_entropy,
    evaluating,
    first_samples,
    mean_loss,
    next_token_loss,
    samples_in,
    seeded,
    split_batch,
)


class Bigram(nn.Module):
    """A table of next-token logits."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Embedding(5, 5)

    def forward(self, tokens, attention_mask=None):
        return self.logits(tokens)


def test_next_token_loss_is_the_mean_over_predicted_tokens():
    model, tokens = Bigram(), torch.randint(0, 5, (3, 6), generator=seeded(0))
    each = [functional.cross_entropy(model(row)[t], row[t + 1]) for row in tokens for t in range(5)]
    for batch in (tokens, (tokens,), {"input_ids": tokens}, {"input_ids": tokens, "attention_mask": None}):
        torch.testing.assert_close(next_token_loss(model, batch), torch.stack(each).mean())


def test_masked_tokens_are_not_predicted():
    model, tokens = Bigram(), torch.randint(0, 5, (1, 6), generator=seeded(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    short = next_token_loss(model, tokens[:, :4])
    torch.testing.assert_close(next_token_loss(model, {"input_ids": tokens, "attention_mask": mask}), short)


def test_mean_loss_weighs_batches_by_samples():
    model = nn.Linear(3, 4)
    inputs, labels = torch.randn(10, 3, generator=seeded(0)), torch.randint(0, 4, (10,), generator=seeded(1))
    whole = cross_entropy(model, (inputs, labels)).item()
    parts = [(inputs[:7], labels[:7]), (inputs[7:], labels[7:])]
    assert mean_loss(model, parts, cross_entropy) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batches"),
        ([torch.ones(2), torch.ones(0, 3)], "batch 1 is empty"),
        ([()], "batch 0 is empty"),
        ([(torch.tensor([1.0, float("nan")]), torch.tensor([1, 2]))], "batch 0 holds NaN"),
        ([{"x": torch.ones(2)}, {"x": torch.tensor([float("inf")])}], "batch 1 holds NaN or infinite"),
    ],
)
def test_bad_batches_are_reported(batches, message):
    with pytest.raises(MpqError, match=message):
        check_batches(iter(batches))


def test_bad_losses_name_the_batch():
    with pytest.raises(MpqError, match="batch 3 is nan"):
        check_loss(torch.tensor(float("nan")), 3)
    with pytest.raises(MpqError, match="one number"):
        check_loss(torch.ones(2), 0)


def test_split_batches_keep_their_containers():
    parts = split_batch({"ids": torch.arange(6).view(3, 2), "pair": (torch.arange(3), None)})
    assert [part["ids"].tolist() for part in parts] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert parts[2]["pair"][0].tolist() == [2]
    assert samples_in(parts[0]) == 1


def test_generators_depend_on_seed_and_names_alone():
    def draw(*names):
        return torch.rand(3, generator=seeded(*names)).tolist()

    torch.manual_seed(1)
    first = draw(0, "probe", 1)
    torch.manual_seed(2)
    assert draw(0, "probe", 1) == first
    assert len({tuple(draw(*names)) for names in [(0, "probe", 1), (1, "probe", 1), (0, "probe", 2), (0, "a")]}) == 4


def test_training_modes_are_restored_module_by_module(caplog):
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Linear(2, 2)).train()
    model[1].eval()

    def fail():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with caplog.at_level(logging.INFO), pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert "evaluation mode" in caplog.text


def test_first_samples_cut_the_last_batch():
    batches = [torch.arange(3), torch.arange(3, 7), torch.arange(7, 9)]
    assert [part.tolist() for part in first_samples(batches, 5)] == [[0, 1, 2], [3, 4]]
    assert [len(part) for part in first_samples(batches, 3)] == [3]
    assert [len(part) for part in first_samples(batches, 100)] == [3, 4, 2]
    assert first_samples(batches, 0) == ()


def test_a_model_that_forbids_attributes_is_refused_and_unchanged():
    class Frozen(nn.Module):
        def __setattr__(self, name, value):
            if "frozen" in vars(self):
                raise AttributeError(f"{name} is frozen")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Linear(2, 2), Frozen())
    vars(model[1])["frozen"] = True
    with pytest.raises(MpqError, match=r"cannot be put into evaluation mode.*training is frozen"), evaluating(model):
        pass
    assert all(module.training for module in model.modules())
