"""Learning rates from the spectrum: exact on quadratics, at the edge of stability of networks, near a grid's best."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq
from mpq.core.errors import MpqError, NotFiniteError
from mpq.network.calibration import seeded
from mpq.sensitivity.learning_rate import learning_rate

SIZE = 12


def quadratic():
    """0.5 x' A x with eigenvalues from 0.05 to 4, and x."""
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=seeded(0)))[0]
    values = torch.logspace(math.log10(0.05), math.log10(4), SIZE)
    return (basis * values) @ basis.T, torch.ones(SIZE, requires_grad=True)


def loss_after(matrix, lr, momentum, steps=400):
    x = torch.ones(SIZE, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * x @ matrix @ x).backward()
        optimizer.step()
    return (0.5 * x @ matrix @ x).item()


def test_the_edge_of_a_quadratic_is_exact():
    matrix, x = quadratic()
    rate = learning_rate([lambda: 0.5 * x @ matrix @ x], [x])
    assert rate.largest == pytest.approx(4, rel=1e-4)
    assert rate.smallest == pytest.approx(0.05, rel=1e-2)  # above a hundredth of the largest
    root = (4 / rate.smallest) ** 0.5
    assert rate.momentum == pytest.approx(((root - 1) / (root + 1)) ** 2)
    assert rate.stable == pytest.approx(2 * (1 + rate.momentum) / 4, rel=1e-4)
    assert loss_after(matrix, 0.98 * rate.stable, rate.momentum) < 1e-3
    assert loss_after(matrix, 1.02 * rate.stable, rate.momentum) > 1e3
    assert rate.lr == pytest.approx(rate.stable / 4)


def test_adams_curvature_is_that_of_the_scaled_hessian():
    matrix, x = quadratic()
    shift = torch.randn(SIZE, generator=seeded(1))
    losses = [lambda: 0.5 * (x - shift) @ matrix @ (x - shift), lambda: 0.5 * x @ matrix @ x]
    gradients = torch.stack([(matrix @ (x - shift)).detach(), (matrix @ x).detach()])
    roots = gradients.square().mean(0).sqrt()
    scale = (roots + 0.01 * roots.mean()).rsqrt()
    exact = torch.linalg.eigvalsh(scale.unsqueeze(1) * matrix * scale)[-1].item()
    rate = learning_rate(losses, [x], optimizer="adam")
    assert rate.largest == pytest.approx(exact, rel=1e-4)
    assert rate.stable == pytest.approx(38 / exact, rel=1e-4)  # (2 + 2 * 0.9) / (1 - 0.9)


@pytest.fixture(scope="module")
def digits():
    source = mpq.open_source("tiny-cnn", nsamples=512, batch_size=512)
    return source.calibration[0]


def network(images):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 48), nn.Tanh(), nn.Linear(48, 10))


def train(data, optimizer, lr, momentum, batch, steps=80, cosine=True):
    images, labels = data
    model, generator = network(images), seeded(2)
    if optimizer == "sgd":
        stepper = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    else:
        stepper = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        for group in stepper.param_groups:
            group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / steps) if cosine else 1)
        chosen = slice(None) if batch is None else torch.randint(len(images), (batch,), generator=generator)
        stepper.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        stepper.step()
    loss = functional.cross_entropy(model(images), labels).item()
    return loss if math.isfinite(loss) else math.inf


def found(data, optimizer, batch, seed=3):
    images, labels = data
    model, generator = network(images), seeded(seed)
    rows = [torch.randint(len(images), (batch,), generator=generator) for _ in range(8)]
    losses = [lambda own=own: functional.cross_entropy(model(images[own]), labels[own]) for own in rows]
    return learning_rate(losses, list(model.parameters()), optimizer=optimizer)


def test_a_network_is_stable_below_the_edge_and_not_far_above(digits):
    images, labels = digits
    model = network(images)
    rate = learning_rate([lambda: functional.cross_entropy(model(images), labels)], list(model.parameters()))
    start = functional.cross_entropy(model(images), labels).item()
    assert train(digits, "sgd", 0.5 * rate.stable, rate.momentum, None, 30, cosine=False) < 0.7 * start
    assert train(digits, "sgd", 8 * rate.stable, rate.momentum, None, 30, cosine=False) > start


@pytest.mark.parametrize(("optimizer", "batch"), [("sgd", 8), ("sgd", 64), ("adam", 64)])
def test_the_rate_is_within_a_factor_of_three_of_a_grids_best(optimizer, batch, digits):
    rate = found(digits, optimizer, batch)
    grid = [rate.lr * 1.5**power for power in range(-7, 8)]
    losses = [train(digits, optimizer, lr, rate.momentum, batch) for lr in grid]
    best = grid[losses.index(min(losses))]
    assert 1 / 3 <= rate.lr / best <= 3
    assert grid[0] < best < grid[-1]


def test_small_batches_have_larger_eigenvalues(digits):
    mean = [sum(found(digits, "sgd", batch, seed).largest for seed in range(4)) / 4 for batch in (4, 32, 512)]
    assert mean[0] > 1.5 * mean[1] > 1.5 * mean[2]
    rate = found(digits, "sgd", 4)
    assert rate.at_batch(4, "sgd").lr == pytest.approx(4 * rate.lr)
    assert rate.at_batch(4, "adam").lr == pytest.approx(2 * rate.lr)


def test_losses_without_a_rate_are_reported():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(MpqError, match="no positive curvature"):
        learning_rate([lambda: -x.square().sum()], [x])
    with pytest.raises(NotFiniteError):
        learning_rate([lambda: (x * math.nan).sum()], [x])
    with pytest.raises(MpqError, match="unknown optimizer 'lion'"):
        learning_rate([lambda: x.square().sum()], [x], optimizer="lion")
