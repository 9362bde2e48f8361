"""The Hessian approximated by its trace and the inputs' second moment, against losses for which that is exact."""

import pytest
import torch
from small_models import Convolutions, TiedLanguageModel, class_batches, make_task, mlp, seed_weights, token_batches
from torch import nn

from mpq.network.calibration import cross_entropy, mean_loss, next_token_loss, seeded
from mpq.sensitivity.curvature import curvature
from mpq.sensitivity.hessian import floored, hessian_traces
from mpq.sensitivity.loss import loss
from mpq.sensitivity.output import output_statistics


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_squared_errors_of_one_layer_are_predicted_exactly(kind):
    """1/2 ||W x - W0 x||^2 has the Hessian I (x) E[x x^T]: the prediction is the measured loss."""
    module = nn.Linear(12, 6, bias=False) if kind == "linear" else nn.Conv2d(3, 6, 2, bias=False)
    model = seed_weights(nn.Sequential(module))
    mean = torch.arange(12.0) if kind == "linear" else torch.arange(3.0).view(3, 1, 1)
    inputs = mean + torch.randn(40, *((12,) if kind == "linear" else (3, 5, 5)), generator=seeded(0))
    targets = model(inputs).detach()

    def squared(model, batch):
        return 0.5 * (model(batch[0]) - batch[1]).square().sum() / len(batch[0])

    task = make_task(model, [(inputs, targets)], squared)
    measured, _ = loss(task)
    predicted, errors = curvature(make_task(model, [(inputs, targets)], squared), min_probes=1500, max_probes=1500)
    for j in range(len(task.schemes)):
        assert abs(predicted[0, j] - measured[0, j]) < 4 * errors[0, j]
        assert errors[0, j] < 0.1 * measured[0, j]
    assert mean_loss(model, task.batches, squared) == 0


@pytest.mark.parametrize(
    "task",
    [
        make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy),
        make_task(seed_weights(Convolutions()), class_batches((4, 6, 6), (6, 5)), cross_entropy),
        make_task(seed_weights(TiedLanguageModel()), token_batches(), next_token_loss),
    ],
    ids=["mlp", "convolutions", "tied"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_an_even_error_costs_the_whole_trace(task, weighted):
    """Unit errors in each weight alone add up to the trace."""
    for layer in task.layers:
        shape = output_statistics(task, weighted)[layer.name]
        units = torch.eye(layer.params).reshape(layer.params, layer.rows, layer.cols)
        assert sum(map(shape.error, units)) == pytest.approx(shape.trace(), rel=1e-4)


def test_scores_scale_with_the_measured_traces():
    task = make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy)
    scores, errors = curvature(task)
    traces = hessian_traces(task)
    shapes = output_statistics(task, weighted=False)
    for i, layer in enumerate(task.layers):
        share = shapes[layer.name].error(task.weight_error(layer, task.schemes[0])) / shapes[layer.name].trace()
        assert scores[i, 0] == pytest.approx(0.5 * floored(traces)[i] * share)
        assert errors[i, 0] == pytest.approx(0.5 * traces.errors[i] * share)
