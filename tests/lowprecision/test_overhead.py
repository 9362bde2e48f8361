import math

import pytest
import torch
from torch import nn

from mpq.lowprecision import Mask, Recipe, convert, overhead
from mpq.lowprecision.overhead import added_operations
from mpq.network.calibration import cross_entropy


def test_operations_by_hand():
    m, n, k = 10, 6, 4
    operands = {"x": m * k, "w": n * k, "g": m * n}
    twice = 2 * sum(operands.values())
    assert added_operations(Recipe("fp4-e2m1-g16-sfp32"), m, n, k) == 3 * twice
    assert added_operations(Recipe("nvfp4"), m, n, k) == 5 * twice
    assert added_operations(Recipe("nvfp4", stochastic="backward"), m, n, k) == 5 * twice + 4 * operands["g"]
    assert added_operations(Recipe("nvfp4", stochastic="forward"), m, n, k) == 5 * twice + 2 * (
        operands["x"] + operands["w"]
    )
    backward = 2 * operands["g"] + operands["w"] + operands["x"]
    assert added_operations(Recipe("mxfp4", hadamard="backward"), m, n, k) == 3 * twice + 5 * backward
    assert added_operations(Recipe("mxfp4", gradients="fp32"), m, n, k) == 3 * (twice - 2 * operands["g"])
    assert added_operations(Recipe("mxfp4", relaxation="spline"), m, n, k) == 3 * twice + 3 * (
        operands["x"] + operands["w"]
    )
    assert added_operations(Mask(3), m, n, k) == 2 * twice


def test_layers_are_counted_with_their_own_inputs():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(8 * 16, 10))
    batch, recipe = (torch.zeros(5, 4, 6, 6), torch.zeros(5, dtype=torch.long)), Recipe("nvfp4")
    shapes = [(5 * 16, 4, 18)] * 2 + [(5, 10, 128)]
    expected = sum(added_operations(recipe, *s) for s in shapes) / sum(6 * math.prod(s) for s in shapes)
    assert overhead(model, recipe, batch, cross_entropy) == pytest.approx(expected)
    assert type(model[0]) is nn.Conv2d
    only = added_operations(recipe, *shapes[2]) / (6 * math.prod(shapes[2]))
    assert overhead(model, recipe, batch, cross_entropy, exclude="0") == pytest.approx(only)
    convert(model, recipe)
    assert overhead(model, recipe, batch, cross_entropy) == pytest.approx(expected)
