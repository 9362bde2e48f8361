"""Judging: sizes kept, ranks against scipy's, losses against quantizing by hand, the oracle ranked first."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.judge import at_fixed_size, facts_of, judge, plot_judgement, random_choices, spearman
from mpq.network.calibration import cross_entropy, mean_loss, seeded
from mpq.rounding import METHODS
from mpq.rounding.reference import dequantize
from mpq.sensitivity.profile import profile

SCHEMES = ("int2-channel", "int3-channel", "int4-channel", "int8-channel")


def network():
    model = torch.nn.Sequential(*(torch.nn.Linear(12, 12) for _ in range(6)), torch.nn.Linear(12, 3))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(index)) * 0.4)
    return model.eval()


def data():
    """Labels are the network's own predictions, so that errors cost something."""
    inputs = [torch.randn(32, 12, generator=seeded(7, k)) for k in range(2)]
    with torch.no_grad():
        return tuple((batch, network()(batch).argmax(1)) for batch in inputs)


def tables():
    model, batches = network(), data()
    metrics = {name: profile(model, batches, cross_entropy, SCHEMES, metric=name, progress=False) for name in
               ("loss", "output")}  # fmt: skip
    first = metrics["loss"]
    noise = np.random.default_rng(0).random(first.scores.shape)
    metrics["noise"] = SensitivityTable(first.layers, first.schemes, noise, noise * 0, "noise")
    return metrics


@pytest.fixture(scope="module")
def judgement():
    return judge(network(), data(), cross_entropy, tables(), budgets=(4.4, 5.4), count=25, progress=False)


@pytest.mark.parametrize("bits", [3.8, 4.5, 5.5, 9.5])
def test_random_allocations_fill_their_budget(bits):
    problem = build_problem(tables()["loss"])
    generator = np.random.default_rng(1)
    sizes = []
    for _ in range(50):
        choices = random_choices(problem, bits, generator)
        sizes.append(8 * problem.totals(choices)["size"] / problem.weights)
        assert sizes[-1] <= bits
    if bits < 9:
        assert np.mean(sizes) > bits - 0.25
        assert len({tuple(random_choices(problem, bits, generator)) for _ in range(20)}) > 10


def test_unreachable_budgets_are_reported():
    with pytest.raises(MpqError, match="below the smallest allocation's"):
        random_choices(build_problem(tables()["loss"]), 1.0, np.random.default_rng(0))


def test_measured_losses_are_those_of_a_copy_quantized_by_hand(judgement):
    problem = build_problem(tables()["loss"])
    generator = np.random.default_rng(0)
    for index in range(5):
        choices = random_choices(problem, 4.4, generator)
        copy = deepcopy(network())
        for layer, choice in zip(problem.layers, choices, strict=True):
            module = copy.get_submodule(layer.name)
            scheme = parse_scheme(SCHEMES[choice])
            with torch.no_grad():
                module.weight.copy_(dequantize(METHODS["mse"](module.weight.detach(), scheme.weight, None)))
        change = mean_loss(copy, data(), cross_entropy) - mean_loss(network(), data(), cross_entropy)
        assert judgement.measured[index] == pytest.approx(change, abs=1e-6)


def test_better_metrics_are_judged_better(judgement):
    verdicts = {verdict.metric: verdict for verdict in judgement.verdicts}
    assert verdicts["loss"].at_fixed_size.value > verdicts["noise"].at_fixed_size.value + 0.3
    assert abs(verdicts["noise"].at_fixed_size.value) < 0.45
    assert verdicts["loss"].regrets.sum() < verdicts["noise"].regrets.sum()
    assert judgement.verdicts[-1].metric == "noise"
    for verdict in judgement.verdicts:
        assert (verdict.regrets >= 0).all()
        for interval in (verdict.spearman, verdict.kendall, verdict.at_fixed_size):
            assert interval.low <= interval.value <= interval.high
    assert "at fixed size" in str(judgement)


def test_ranks_are_scipys():
    generator = np.random.default_rng(2)
    x, y = generator.integers(0, 8, 40), generator.normal(size=40)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(np.ones(5), np.arange(5)) == 0


def test_size_alone_has_no_correlation_at_fixed_size():
    """A prediction from the budget alone correlates overall but not within budgets."""
    stratum = np.repeat([0, 1, 2], 50)
    generator = np.random.default_rng(3)
    measured = stratum + 0.3 * generator.normal(size=150)
    predicted = stratum + 0.3 * generator.normal(size=150)
    assert spearman(predicted, measured) > 0.8
    assert abs(at_fixed_size(predicted, measured, stratum)) < 0.25


def test_the_figure_shows_the_facts(judgement, tmp_path):
    facts = facts_of(judgement)
    assert [metric for metric, *_ in facts] == [verdict.metric for verdict in judgement.verdicts]
    figure = plot_judgement(judgement)
    assert len(figure.axes) == 3
    for axes, (_, predicted, measured, stratum) in zip(figure.axes, facts, strict=True):
        x, y = axes.lines[1].get_data()
        assert np.array_equal(x, predicted[stratum == 1])
        assert np.array_equal(y, measured[stratum == 1])
    figure.savefig(tmp_path / "judge.png")
    assert Path(tmp_path / "judge.png").stat().st_size > 5000


def test_tables_that_differ_are_reported():
    found = tables()
    layers = (Layer("other", "linear", 3, 3),)
    found["odd"] = SensitivityTable(layers, SCHEMES, np.ones((1, 4)), np.zeros((1, 4)), "odd")
    with pytest.raises(MpqError, match="other layers or schemes"):
        judge(network(), data(), cross_entropy, found, budgets=(4,), progress=False)
    with pytest.raises(MpqError, match="at least one sensitivity table"):
        judge(network(), data(), cross_entropy, {}, budgets=(4,), progress=False)
