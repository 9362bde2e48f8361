import math
from dataclasses import replace

import numpy as np
import pytest
from problems import make_problem, make_table

from mpq.core.costs import weight_bytes
from mpq.core.errors import MpqError
from mpq.core.problem import Problem, build_problem, restricted
from mpq.core.scheme import parse_scheme


def test_costs_and_losses_are_sums_over_the_tied_layers():
    table = make_table(1, tie=True)
    problem = build_problem(table)
    assert problem.groups == ((0, 1), (2,), (3,), (4,))
    assert problem.group_name(0) == "pair"
    assert problem.group_name(1) == "layer2"
    np.testing.assert_allclose(problem.losses[0], table.scores[:2].sum(0))
    np.testing.assert_allclose(problem.variances[0], (table.errors[:2] ** 2).sum(0))
    sizes = [
        sum(weight_bytes(parse_scheme(name), layer.rows, layer.cols) for layer in table.layers[:2])
        for name in table.schemes
    ]
    assert problem.costs["size"][0].tolist() == sizes


def test_an_allocation_gives_tied_layers_one_scheme_and_adds_up():
    table = make_table(1, tie=True)
    problem = build_problem(table)
    allocation = problem.allocation([0, 1, 2, 3])
    assert allocation.schemes == tuple(table.schemes[j] for j in (0, 0, 1, 2, 3))
    picked = table.scores[range(5), [0, 0, 1, 2, 3]]
    assert allocation.loss == pytest.approx(picked.sum())
    assert allocation.error == pytest.approx(np.sqrt((0.01 * picked**2).sum()))
    assert allocation.size == problem.totals([0, 1, 2, 3])["size"]
    assert allocation.bitops == problem.totals([0, 1, 2, 3])["bitops"]
    assert allocation.overhead == 100


def test_ties_can_be_cut():
    assert len(build_problem(make_table(1, tie=True), ties=False).groups) == 5
    assert len(Problem.from_table(make_table(1, tie=True), ties=False).groups) == 5


def test_pins_and_bans_leave_only_what_they_allow():
    problem = build_problem(make_table(2), pin={"layer[01]": "bf16"}, forbid={"layer2": ["int*"], "layer3": "bf16"})
    allowed = [
        [name for name, loss in zip(problem.schemes, row, strict=True) if np.isfinite(loss)] for row in problem.losses
    ]
    assert allowed[0] == allowed[1] == ["bf16"]
    assert allowed[2] == ["fp8-e4m3", "bf16"]
    assert allowed[3] == list(problem.schemes[:-1])
    assert allowed[4] == list(problem.schemes)
    assert [name for name, _ in problem.uniform()] == []


def test_uniform_allocations_are_those_every_layer_can_take():
    problem = build_problem(make_table(2), forbid={"layer3": "bf16"})
    assert [name for name, _ in problem.uniform()] == list(problem.schemes[:-1])
    assert all(set(allocation.schemes) == {name} for name, allocation in problem.uniform())


def test_a_forbidden_choice_is_refused():
    problem = build_problem(make_table(2), forbid={"layer3": "bf16"})
    with pytest.raises(MpqError, match="bf16 is forbidden for layer3"):
        problem.allocation([4] * 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pin": {"layer9": "bf16"}}, "matches nothing"),
        ({"pin": {"layer0": "nvfp4"}}, "cannot pin layer0 to nvfp4"),
        ({"forbid": {"layer0": "int9*"}}, "scheme pattern 'int9\\*' matches nothing"),
        ({"forbid": {"layer0": "*"}}, "no scheme is left for layer0"),
        ({"budgets": {"watts": 3}}, "unknown cost 'watts'"),
    ],
)
def test_impossible_restrictions_say_which(options, message):
    with pytest.raises(MpqError, match=message):
        build_problem(make_table(2), **options)


def test_tied_layers_pinned_apart_are_an_error():
    with pytest.raises(MpqError, match="no scheme is left for pair"):
        build_problem(make_table(2, tie=True), pin={"layer0": "bf16", "layer1": "int2-g64"})


def test_further_costs_are_summed_too():
    table = make_table(1, tie=True)
    latency = np.arange(25.0).reshape(5, 5)
    problem = build_problem(table, costs={"latency": latency}, budgets={"latency": 50})
    np.testing.assert_array_equal(problem.costs["latency"][0], latency[:2].sum(0))


def test_restricting_schemes_keeps_losses_and_costs():
    problem = build_problem(make_table(2))
    fewer = restricted(problem, ["bf16", "int*"])
    assert fewer.schemes == ("int2-g64", "int3-g128", "int4-channel", "bf16")
    np.testing.assert_array_equal(fewer.losses, problem.losses[:, [0, 1, 2, 4]])
    np.testing.assert_array_equal(fewer.costs["bitops"], problem.costs["bitops"][:, [0, 1, 2, 4]])


@pytest.mark.parametrize("limit", [-1e-9, -1.0, math.nan, math.inf])
def test_a_budget_is_finite_and_not_negative(limit):
    with pytest.raises(MpqError, match="invalid budget bitops"):
        build_problem(make_table(1), budgets={"bitops": limit})
    assert build_problem(make_table(1), budgets={"bitops": 0}).budgets == {"bitops": 0.0}


def test_a_caches_loss_and_error_are_added_to_a_prediction():
    problem = replace(make_problem(1, layers=2), cache_loss=(0.25, 0.09))
    choices = np.array([4, 4])
    alone = replace(problem, cache_loss=(0.0, 0.0)).prediction(choices)
    loss, error = problem.prediction(choices)
    assert loss == pytest.approx(alone[0] + 0.25)
    assert error == pytest.approx((alone[1] ** 2 + 0.09) ** 0.5)
