"""Targets and weights of a loss, found by evaluating it, against the loss's definition."""

import pytest
import torch
from small_models import TiedLanguageModel, mlp, seed_weights
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy, next_token_loss, seeded
from mpq.sensitivity.predictions import predictions, random_slopes

INPUTS, LABELS = torch.randn(6, 5, generator=seeded(0)), torch.tensor([0, 2, 1, 1, 0, 2])
TOKENS = torch.randint(0, 7, (3, 6), generator=seeded(1))


def test_a_classifiers_labels_and_equal_weights_are_found():
    (found,) = predictions(mlp(), (INPUTS, LABELS), cross_entropy)
    torch.testing.assert_close(found.weights, torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-4, atol=0)
    assert torch.equal(found.targets, LABELS)


def test_certain_predictions_are_found_as_well():
    """For certain predictions, softmax - target is 0 in float32: the loss is evaluated at other logits."""
    model = mlp()
    model[4].weight.data *= 1e4
    (found,) = predictions(model, (INPUTS, LABELS), cross_entropy)
    torch.testing.assert_close(found.weights, torch.full((6,), 1 / 6, dtype=torch.float64), rtol=1e-4, atol=0)
    assert torch.equal(found.targets, LABELS)


def test_weighted_and_smoothed_labels_are_found():
    weights = torch.tensor([1.0, 3.0, 0.5])

    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], weight=weights)

    (found,) = predictions(mlp(), (INPUTS, LABELS), loss)
    expected = (weights[LABELS] / weights[LABELS].sum()).double()
    torch.testing.assert_close(found.weights, expected, rtol=1e-4, atol=0)

    def smooth(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.2)

    (found,) = predictions(mlp(), (INPUTS, LABELS), smooth)
    assert torch.equal(found.targets, LABELS)


def test_hidden_tokens_weigh_nothing_and_targets_are_the_next_tokens():
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = seed_weights(TiedLanguageModel())

        def forward(self, tokens, attention_mask=None):
            return self.inner(tokens)

    (found,) = predictions(Model(), {"input_ids": TOKENS, "attention_mask": mask}, next_token_loss)
    asked = torch.zeros(3, 6, dtype=torch.bool)
    asked[:, :-1] = mask[:, 1:] > 0
    torch.testing.assert_close(found.weights, asked.double() / asked.sum(), rtol=1e-4, atol=1e-9)
    assert torch.equal(found.targets[:, :-1][asked[:, :-1]], TOKENS[:, 1:][asked[:, :-1]])


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: model(batch[0]).square().mean(),
        lambda model, batch: functional.cross_entropy(model(batch[0]) / 2, batch[1]),
        lambda model, batch: -cross_entropy(model, batch),
        lambda model, batch: model(batch[0]).mean(),
        lambda model, batch: functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1] / 2),
    ],
)
def test_other_losses_are_refused(loss):
    with pytest.raises(MpqError, match="cross-entropy"):
        predictions(mlp(), (INPUTS, LABELS), loss)


def test_a_loss_that_does_not_call_the_model_is_refused():
    with pytest.raises(MpqError, match="must call the model"):
        predictions(mlp(), (INPUTS, LABELS), lambda model, batch: model[0](batch[0]).square().mean())


def test_slopes_have_the_hessian_as_second_moment():
    count, logits, weight = 100_000, torch.tensor([2.0, 0.0, -1.0, 0.5]), 0.3
    slopes = random_slopes(logits.expand(count, 4), torch.full((count,), weight), seeded(5)).double()
    chances = logits.double().softmax(0)
    expected = weight * (chances.diag() - torch.outer(chances, chances))
    products = slopes.unsqueeze(2) * slopes.unsqueeze(1)
    error = products.std(0) / count**0.5
    assert ((products.mean(0) - expected).abs() <= 5 * error + 1e-9).all()
    assert (slopes.mean(0).abs() < 5 * slopes.std(0) / count**0.5 + 1e-9).all()
