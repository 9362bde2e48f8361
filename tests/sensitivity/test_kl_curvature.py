"""The curvature of the divergence against plain loops over inputs and positions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import gauss_newton_blocks, sample_gradients
from small_models import CASES, Routed, TiedLanguageModel, class_batches, make_task, seed_weights, token_batches
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy, next_token_loss, samples_in
from mpq.network.layers import input_matrix, output_matrix
from mpq.rounding.activations import fake_quantize_inputs
from mpq.sensitivity import backward
from mpq.sensitivity import by_position as module
from mpq.sensitivity.derivatives import layer_uses
from mpq.sensitivity.journal import Journal
from mpq.sensitivity.kl_curvature import kl_curvature, row_scores, softness
from mpq.sensitivity.predictions import predictions


def by_input(task):
    """Half the mean over samples of (dw_r . dL_n/dw_r)^2 by row, one after another: [layer][scheme] (rows,)."""
    sizes = [layer.params for layer in task.layers]
    gradients = sample_gradients(task).split(sizes, 1)
    found = []
    for layer, gradient in zip(task.layers, gradients, strict=True):
        matrix = gradient.reshape(len(gradient), *task.module(layer).weight.shape).flatten(2)
        if type(task.module(layer)).__name__ == "Conv1D":
            matrix = matrix.mT
        errors = [task.weight_error(layer, scheme).double() for scheme in task.schemes]
        found.append([0.5 * (matrix * error).sum(2).square().mean(0) for error in errors])
    return found


def by_position(task):
    """1/2 dw_r H dw_r^T s_r, summed position by position: [layer][scheme] (rows,)."""
    found = []
    samples = sum(samples_in(batch) for batch in task.batches)
    for layer in task.layers:
        errors = [task.weight_error(layer, scheme).double() for scheme in task.schemes]
        moments = {
            False: torch.zeros(layer.cols, layer.cols).double(),
            True: torch.zeros(layer.cols, layer.cols).double(),
        }
        shares = {False: torch.zeros(layer.rows).double(), True: torch.zeros(layer.rows).double()}
        for index in range(len(task.batches)):
            for use in (use for _, uses in layer_uses(task, index) for use in uses[layer.name]):
                slopes = output_matrix(use.module, use.gradient.double()).reshape(-1, use.gradient.shape[-1])
                lookup = isinstance(use.module, nn.Embedding)
                inputs = use.inputs.flatten() if lookup else input_matrix(use.module, use.inputs.double())
                for x, g in zip(inputs, slopes, strict=True):
                    moments[lookup] += torch.outer(g, g) if lookup else g.square().sum() * torch.outer(x, x)
                    if lookup:
                        shares[True][x] += g.square().sum()
                    else:
                        shares[False] += g.square()
        rows = [torch.zeros(layer.rows).double() for _ in errors]
        for place, error in enumerate(errors):
            for lookup in (False, True):
                share = shares[lookup] / shares[lookup].sum().clamp(min=1e-30)
                rows[place] += 0.5 / samples * ((error @ moments[lookup]) * error).sum(1) * share
        found.append(rows)
    return found


@pytest.mark.parametrize("name", ["mlp", "convolutions", "tied"])
@pytest.mark.parametrize("graph", [2**27, 1])
def test_an_inputs_positions_add_up_before_they_are_squared(name, graph, monkeypatch):
    """The same for whole batches and for pieces of one sample."""
    monkeypatch.setattr(backward, "GRAPH", graph)
    rows = row_scores(CASES[name](), estimate="input", labels="data")
    task = CASES[name]()
    for layer, expected in zip(task.layers, by_input(task), strict=True):
        torch.testing.assert_close(rows(layer)[0], torch.stack(expected, 1), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_positions_are_weighted_by_their_gradient(name, monkeypatch):
    monkeypatch.setattr(module, "OUTLIER", 1.0)
    rows = row_scores(CASES[name](), estimate="position", labels="data")
    task = CASES[name]()
    for layer, expected in zip(task.layers, by_position(task), strict=True):
        torch.testing.assert_close(rows(layer)[0], torch.stack(expected, 1), rtol=1e-4, atol=1e-12)


def test_many_draws_of_labels_are_the_divergences_own_curvature():
    """Of a layer with one row nothing is left out: 1/2 dw F dw^T."""
    model = seed_weights(nn.Sequential(nn.Linear(4, 1, bias=False), nn.Tanh(), nn.Linear(1, 3, bias=False)))
    task = make_task(model, class_batches((4,)), cross_entropy)
    scores, errors = kl_curvature(replace(task), draws=400)
    block, error = (
        gauss_newton_blocks(task)[0][0],
        task.weight_error(task.layers[0], task.schemes[0]).flatten().double(),
    )
    assert scores[0, 0] == pytest.approx(0.5 * (error @ block @ error).item(), rel=0.1)
    assert 0 < errors[0, 0] < scores[0, 0]


def test_overconfident_predictions_are_softened():
    """Logits 300 times as large leave no curvature; at the chosen temperature the predictions have an error of 0.02."""
    task = CASES["mlp"]()
    assert softness(task) == 1.0
    with torch.no_grad():
        task.model[-1].weight *= 300
    found = softness(task)
    chances = (task.model(task.batches[0][0]) / found).softmax(-1)
    assert (1 - chances.amax(-1)).mean().item() == pytest.approx(0.02, rel=0.05)
    soft, hard = (
        kl_curvature(replace(task, journal=Journal(None, {})), **options)[0] for options in ({}, {"temperature": 1.0})
    )
    assert (soft > 2 * hard).all()


def test_the_estimate_follows_the_labels():
    def made(name, **options):
        return kl_curvature(CASES[name](), **options)[0]

    np.testing.assert_array_equal(made("convolutions"), made("convolutions", estimate="input"))
    np.testing.assert_array_equal(made("tied"), made("tied", estimate="position"))
    assert not np.allclose(made("tied"), made("tied", estimate="input"))


@pytest.mark.parametrize(("name", "layer", "estimate"), [("mlp", 1, "position"), ("tied", 2, "input")])
def test_activation_and_weight_errors_add_up(name, layer, estimate):
    """The errors of all rows interact, at a position or over a whole input and both calls of its layer."""
    schemes = ("int4-channel", "int4-channel+a:int4-token")
    options = {"estimate": estimate, "labels": "data", "shrink": False}
    found = kl_curvature(CASES[name](schemes=schemes), **options)[0]
    task = CASES[name](schemes=("fp32+a:int4-token",))
    expected, samples = 0.0, 0
    for index in range(len(task.batches)):
        for count, uses in layer_uses(task, index):
            products = []
            for use in uses[task.layers[layer].name]:
                change = use.module(fake_quantize_inputs(use.module, use.inputs, task.schemes[0].activation))
                change = change - use.module(use.inputs)
                products.append((change * use.gradient).detach().reshape(count, -1).double().sum(1))
            expected, samples = expected + 0.5 * sum(products).square().sum().item(), samples + count
    assert found[layer, 1] - found[layer, 0] == pytest.approx(expected / samples, rel=1e-3)


def test_padding_costs_nothing():
    """Ten hidden tokens after the first batch's five change no score: their labels are not asked for."""
    batches = token_batches()
    padded = tuple(
        {
            "input_ids": functional.pad(tokens, (0, 10)),
            "attention_mask": functional.pad(torch.ones_like(tokens), (0, 10)),
        }
        for tokens in batches
    )

    def loss(model, batch):
        hidden = batch["attention_mask"][:, 1:] == 0
        targets = batch["input_ids"][:, 1:].masked_fill(hidden, -100)
        return functional.cross_entropy(model(batch["input_ids"])[:, :-1].flatten(0, 1), targets.flatten())

    plain = make_task(seed_weights(TiedLanguageModel()), batches, next_token_loss)
    other = make_task(seed_weights(TiedLanguageModel()), padded, loss)
    options = {"estimate": "position", "labels": "data"}
    np.testing.assert_allclose(kl_curvature(other, **options)[0], kl_curvature(plain, **options)[0], rtol=1e-4)


class Masked(nn.Module):
    """The outputs of its first position, which may be huge, do not affect any prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x))[:, 1:])


def test_dominant_positions_are_scored_one_by_one(monkeypatch):
    """With positions scored one by one: half the mean over samples of the sum over t of g_tr^2 (dw_r . x_t)^2."""
    monkeypatch.setattr(module, "OUTLIER", 0.0)
    rows = row_scores(CASES["mlp"](), estimate="position", labels="data")
    task = CASES["mlp"]()  # one position a sample
    for layer, expected in zip(task.layers, by_input(task), strict=True):
        torch.testing.assert_close(rows(layer)[0], torch.stack(expected, 1), rtol=1e-4, atol=1e-12)


def test_huge_inputs_without_gradient_cost_nothing():
    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    inputs, labels = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 3).long()
    huge = inputs.clone()
    huge[:, 0] = 1e4
    found = [kl_curvature(make_task(seed_weights(Masked()), [(given, labels)], loss))[0] for given in (inputs, huge)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_routed_layers_are_scored_sample_by_sample():
    task = make_task(seed_weights(Routed()), class_batches((5, 4)), cross_entropy)
    rows = row_scores(task, labels="data")
    for layer, expected in zip(task.layers, by_input(task), strict=True):
        torch.testing.assert_close(rows(layer)[0], torch.stack(expected, 1), rtol=1e-4, atol=1e-12)


def test_invalid_requests_are_reported():
    with pytest.raises(MpqError, match="position"):
        kl_curvature(CASES["mlp"](), estimate="token")
    with pytest.raises(MpqError, match="labels"):
        kl_curvature(CASES["mlp"](), labels="none")


def test_predictions_of_outputs_at_hand_do_not_run_the_model():
    task = CASES["tied"]()
    ran = []
    task.model.mix.register_forward_hook(lambda *_: ran.append(1))
    (found,) = predictions(task.model, task.batches[0], task.loss_fn)
    (again,) = predictions(task.model, task.batches[0], task.loss_fn, [torch.zeros(3, 5, 7)])
    assert len(ran) == 1
    assert "forward" not in vars(task.model)
    torch.testing.assert_close(found.weights, again.weights)


def test_an_estimate_by_position_stops_when_it_has_enough(monkeypatch):
    task = make_task(seed_weights(TiedLanguageModel()), token_batches((3, 4, 2)), next_token_loss)
    few = (task.batches[0], task.batches[1][:1])

    def scores(batches):
        return kl_curvature(replace(task, batches=batches, journal=Journal(None, {})))[0]

    monkeypatch.setattr("mpq.sensitivity.kl_curvature.POSITIONS", 15)  # four sequences of four predictions
    assert np.array_equal(scores(task.batches), scores(few))
    monkeypatch.setattr("mpq.sensitivity.kl_curvature.POSITIONS", 2**13)
    assert not np.array_equal(scores(task.batches), scores(few))
