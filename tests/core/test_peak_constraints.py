"""Peak activations as linear constraints, against every allocation counted."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.live_activations import LayerInput, LiveActivations, Moment
from mpq.core.scheme import parse_scheme

SCHEMES = ("int8-channel", "int8-channel+a:int8-token", "int8-channel+a:int4-token")
LAYERS = tuple(Layer(name, "linear", 8, 8) for name in "abc")

inputs = some.builds(
    lambda rows, cols, readers: LayerInput(rows, cols, 4 * rows * cols, tuple(sorted(readers))),
    some.integers(1, 9), some.integers(1, 40), some.sets(some.sampled_from("abcx"), min_size=1, max_size=3),
)  # fmt: skip
moments = some.lists(
    some.builds(Moment, some.integers(0, 500), some.lists(inputs, max_size=2).map(tuple), some.just(""))
)


@settings(deadline=None)
@given(moments, some.integers(0, 4000))
def test_constraints_hold_where_the_peak_is_within_the_limit(found: list[Moment], limit: int) -> None:
    live = LiveActivations(tuple(found), 1)
    constraints = list(live.constraints(LAYERS, SCHEMES, limit))
    peaks = []
    for choice in product(range(len(SCHEMES)), repeat=len(LAYERS)):
        schemes = {layer.name: parse_scheme(SCHEMES[j]) for layer, j in zip(LAYERS, choice, strict=True)}
        peaks.append(live.peak(schemes))
        kept = all(cost[np.arange(len(LAYERS)), list(choice)].sum() <= left for cost, left in constraints)
        assert kept == (peaks[-1] <= limit)
    if limit < min(peaks):
        with pytest.raises(MpqError, match=f"take {min(peaks):,} for 1 samples"):
            live.check(limit, LAYERS, SCHEMES)
    else:
        live.check(limit, LAYERS, SCHEMES)
