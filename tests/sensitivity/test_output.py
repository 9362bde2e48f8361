"""Output errors against the layers' own outputs, computed directly."""

import pytest
import torch
from exact import output_differences
from small_models import CASES, Convolutions, class_batches, make_task, seed_weights
from torch import nn

from mpq.network.calibration import cross_entropy, samples_in
from mpq.network.layers import find_layers, weight_groups
from mpq.network.moments import second_moments
from mpq.sensitivity.output import output


@pytest.mark.parametrize("name", CASES)
def test_the_plain_error_is_the_mean_squared_change_of_outputs(name):
    task = CASES[name]()
    scores, _ = output(task, weighted=False)
    samples = sum(samples_in(batch) for batch in task.batches)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            assert scores[i, j] == pytest.approx(plain_error(task, layer, scheme) / samples, rel=1e-4)


def plain_error(task, layer, scheme):
    """Squared changes of outputs where a gradient of any channel comes back."""
    found = output_differences(task, layer, scheme)
    return sum((change.square() * (slope != 0).any(-1, keepdim=True)).sum().item() for _, change, slope in found)


@pytest.mark.parametrize("name", CASES)
def test_the_weighted_error_is_the_documented_sum(name):
    """Squared gradients as (mean over channels) x (channel's share over all positions), summed one row at a time."""
    task = CASES[name]()
    scores, _ = output(task)
    samples = sum(samples_in(batch) for batch in task.batches)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            total, rows, shares = 0.0, [], []
            for use, change, gradient in output_differences(task, layer, scheme):
                squares = gradient.square()
                if isinstance(use.module, nn.Embedding):
                    total += (squares * change.square()).sum().item()
                    continue
                groups = weight_groups(use.module)
                squares, change = (matrix.reshape(groups, -1, matrix.shape[-1]) for matrix in (squares, change))
                rows.append(squares.mean(-1, keepdim=True) * change.square())
                shares.append(squares)
            if rows:
                channel = torch.cat(shares, 1).sum(1, keepdim=True)
                weights = channel / channel.mean(-1, keepdim=True)
                total += (torch.cat(rows, 1) * weights).sum().item()
            assert scores[i, j] == pytest.approx(0.5 * total / samples, rel=1e-4)


def test_with_one_position_and_one_channel_the_weighted_error_is_exact():
    """Then the squared gradients are their own product form: the score is 1/2 E[d^2 (dW x)^2]."""
    model = seed_weights(nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)))
    task = make_task(model, class_batches((5,), (9, 4)), cross_entropy)
    scores, _ = output(task)
    layer, scheme = task.layers[0], task.schemes[0]
    total = sum(
        (gradient * change).square().sum().item() for _, change, gradient in output_differences(task, layer, scheme)
    )
    assert scores[0, 0] == pytest.approx(0.5 * total / 13, rel=1e-4)


def test_the_plain_error_is_the_second_moments():
    task = CASES["mlp"]()
    scores, _ = output(task, weighted=False)
    moments = second_moments(task.model, find_layers(task.model), task.batches, task.loss_fn)
    for i, layer in enumerate(task.layers):
        difference = task.weight_error(layer, task.schemes[0])
        expected = (difference @ moments[layer.name] @ difference.T).trace().item()
        assert scores[i, 0] == pytest.approx(expected, rel=1e-4)


def test_gradients_belong_to_single_samples():
    """The same data in batches of other sizes gives the same scores."""
    (inputs, labels), _ = class_batches((4, 6, 6), (12, 1))
    model = seed_weights(Convolutions())
    whole, _ = output(make_task(model, [(inputs, labels)], cross_entropy))
    parts = [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])]
    split, _ = output(make_task(model, parts, cross_entropy))
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(split), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_activation_formats_change_the_inputs_too(name):
    task = CASES[name](schemes=("int3-channel+a:int4-token", "int4-g32+a:int8"))
    scores, _ = output(task, weighted=False)
    samples = sum(samples_in(batch) for batch in task.batches)
    for i, layer in enumerate(task.layers):
        for j, scheme in enumerate(task.schemes):
            assert scores[i, j] == pytest.approx(plain_error(task, layer, scheme) / samples, rel=1e-3)
