"""Parts of the exact search against enumeration: merges and certificates."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.search.exact import _Core, _Stretch


def core_of(seed, groups, schemes, ties):
    """A core with integer (many ties) or real values, and all its solutions: costs, losses, regrets."""
    random = np.random.default_rng(seed)
    shape = (1 if ties else groups, schemes)
    costs = random.integers(0, 6, shape).astype(float)
    losses = random.integers(0, 6, shape).astype(float) if ties else random.random(shape)
    costs, losses = (np.broadcast_to(values, (groups, schemes)).copy() for values in (costs, losses))
    choices = np.array(list(product(range(schemes), repeat=groups)))
    every_cost, every_loss = (values[np.arange(groups), choices].sum(1) for values in (costs, losses))
    low, high = np.sort(random.choice(np.append(every_cost, every_cost.max() + 1), 2))
    multiplier = float(random.integers(0, 4)) if ties else float(random.random() * 2)
    core = _Core(costs, losses, multiplier, float(low), float(high))
    regrets = every_loss + multiplier * every_cost - (core.loss + multiplier * core.cost)
    return core, every_cost, every_loss, regrets


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 4), st.booleans(), st.floats(0, 8),
    st.sampled_from([1, 2, 3, 5, 10**6]),
)  # fmt: skip
def test_a_merge_finds_every_solution_up_to_its_regret(seed, groups, schemes, ties, regret, max_states):
    core, costs, losses, regrets = core_of(seed, groups, schemes, ties)
    merged = core.merge(regret, max_states)
    assert len(merged.costs) <= max_states
    assert merged.regret <= regret
    if max_states > schemes**groups:
        assert merged.regret == regret
    inside = (costs >= core.low) & (costs < core.high)
    for point, (cost, loss) in enumerate(zip(merged.costs, merged.losses, strict=True)):
        assert core.low <= cost < core.high
        assert (np.isclose(costs, cost) & np.isclose(losses, loss)).any()
        assert (merged.choice(point) >= 0).all()
    wanted = inside & (regrets <= merged.regret - (0 if ties else 1e-9))
    for cost, loss in zip(costs[wanted], losses[wanted], strict=True):
        found = (merged.costs <= cost + 1e-9) & (merged.losses <= loss + 1e-9)
        cheaper = (costs < core.low) & (losses <= loss + 1e-9)  # belongs to another segment
        assert found.any() or cheaper.any()


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 0.5))
def test_a_gap_is_the_largest_share_below_the_frontier(seed, groups, regret):
    """At each cost: the frontier's loss against the least that a solution of a larger regret can have."""
    core, *_ = core_of(seed, groups, 3, False)
    if core.high - core.low < 0.5:
        return
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 9))
    costs = np.sort(np.append(random.uniform(core.low - 2, core.high + 1, count), core.low - random.choice([0.3, 1.3])))
    losses = np.sort(random.uniform(0.5, 6, count + 1))[::-1]
    budgets = np.unique(np.concatenate([np.nextafter(costs[1:], -np.inf), costs, [core.low, core.high - 1e-9]]))
    budgets = budgets[(budgets >= max(core.low, costs[0])) & (budgets < core.high)]
    at = losses[np.searchsorted(costs, budgets, side="right") - 1]
    bound = core.loss - core.multiplier * (budgets - core.cost) + regret
    expected = max(((at - bound) / at).max(), 0.0)
    stretch = _Stretch(costs[:0], losses[:0], core.best, np.empty(0, np.intp), np.empty((0, 0), np.int16), regret, core)
    np.testing.assert_allclose(stretch.gap(costs, losses), expected, rtol=1e-6, atol=1e-6)
    assert _Stretch(costs[:0], losses[:0], core.best, stretch.free, stretch.choices, regret).gap(costs, losses) == 0
