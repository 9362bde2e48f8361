import pytest
import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.lowprecision import StableSPAM
from mpq.network.calibration import seeded


def parameter(values):
    return nn.Parameter(torch.tensor(values))


def steps(optimizer, weight, gradients):
    moves = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        moves.append(weight.detach() - before)
    return moves


def test_first_step_is_that_of_adam_on_the_direction():
    weight = parameter([1.0, -2.0, 3.0])
    (move,) = steps(StableSPAM([weight], lr=0.1), weight, [[0.3, -0.4, 0.0]])
    torch.testing.assert_close(move, torch.tensor([-0.1, 0.1, 0.0]), atol=1e-5, rtol=1e-5)


def test_two_steps_by_hand():
    weight, options = parameter([0.0]), {"betas": (0.5, 0.5), "gammas": (0.5, 0.5, 0.5), "eps": 0.0}
    moves = steps(StableSPAM([weight], lr=1.0, **options), weight, [[1.0], [4.0]])
    limit = (0.5 * 0.5 * 1 + 0.5 * 4) / 0.75  # 3
    mean, square = (0.25 * 1 + 0.5 * limit) / 0.75, (0.25 * 1 + 0.5 * limit**2) / 0.75
    gradient = mean / square**0.5
    first, second = (0.25 * 1 + 0.5 * gradient) / 0.75, (0.25 * 1 + 0.5 * gradient**2) / 0.75
    assert moves[0].item() == pytest.approx(-1.0)
    assert moves[1].item() == pytest.approx(-first / second**0.5)


def test_moments_are_reset():
    def last(reset_every):
        weight = parameter([0.0])
        return steps(StableSPAM([weight], lr=1.0, reset_every=reset_every), weight, [[1.0]] * 3 + [[-1.0]])[-1].item()

    assert last(3) == pytest.approx(1.0, rel=1e-5)  # a first step again, to where the gradient points
    assert last(0) < 0  # three steps the other way weigh more


def test_a_spike_moves_the_weights_less_than_adams():
    def distance(kind, **options):
        weight = nn.Parameter(torch.randn(20, generator=seeded(0)))
        optimizer = kind([weight], lr=0.05, **options)
        for step in range(300):
            optimizer.zero_grad()
            weight.square().sum().backward()
            if step in (150, 151):
                weight.grad[3] += 1e4
            optimizer.step()
        return weight.abs().max().item()

    assert distance(StableSPAM) < 0.5 * distance(torch.optim.Adam)


def test_impossible_settings_and_weight_decay():
    weight = parameter([2.0])
    weight.grad = torch.zeros(1)
    StableSPAM([weight], lr=0.5, weight_decay=0.1).step()
    assert weight.item() == pytest.approx(2.0 * 0.95)
    for settings in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"reset_every": -1}):
        with pytest.raises(MpqError, match="StableSPAM takes"):
            StableSPAM([weight], **settings)
