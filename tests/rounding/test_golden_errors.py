"""Squared errors that each method leaves today: no change of a search goes unnoticed, for better or worse.

The matrix has a mean, rows of different size, and rows that end within a group and a super-block.
"""

import pytest
import torch

from mpq.core.formats import parse_format
from mpq.network.calibration import seeded_normal
from mpq.rounding import method_named
from mpq.rounding.clip_search import clip_search
from mpq.rounding.reference import dequantize

FORMATS = (
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_1", "q5_1", "iq4_nl", "nl3-g64", "int3-g32", "int4-g128-asym",
    "int2-channel", "nvfp4", "mxfp4", "fp8-e4m3", "nf4-g64",
)  # fmt: skip
ROWS, COLS = 6, 600
ERRORS = {
    "nearest": (
        1292.8, 487.182, 78.672, 17.1606, 4.59064, 78.5263, 17.1338, 96.7466, 430.121, 627.929,
        123.194, 8786.31, 114.633, 164.102, 9.32163, 106.905,
    ),
    "mse": (
        818.066, 249.285, 60.1878, 14.28, 3.56234, 59.3941, 13.314, 66.7706, 331.076, 313.049,
        111.456, 1749.57, 95.1499, 157.189, 8.77673, 90.506,
    ),
    "gptq": (
        1.29459e+06, 320860, 78381.2, 18100.6, 4341.63, 78109, 17141.1, 75958.5, 353248, 351257,
        103646, 2.35077e+06, 112636, 140287, 8161.34, 91140.5,
    ),
    "importance": (
        1.86328e+06, 550111, 135270, 31733.9, 7981.84, 134160, 29544, 150652, 732482, 693235,
        237068, 3.94917e+06, 218858, 361613, 19896.1, 199995,
    ),
}  # fmt: skip


def data():
    """A weight (rows, cols), and the second moment (1, cols, cols) of correlated inputs."""
    rows = 1 + seeded_normal((ROWS, 1), 0, "rows").abs()
    inputs = seeded_normal((900, COLS), 0, "inputs").double()
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    inputs *= torch.linspace(0.5, 2, COLS, dtype=torch.float64)
    return seeded_normal((ROWS, COLS), 0, "weight") * rows + 0.2, (inputs.T @ inputs)[None].float()


def error(kind, name):
    """Squared error of the weight; of the outputs for gptq, and weighted by the inputs' squares for "importance"."""
    weight, moment = data()
    if kind == "importance":
        squares = moment[0].diagonal().expand_as(weight)
        rounded = clip_search(weight, parse_format(name), importance=squares)
        return float(((dequantize(rounded) - weight).square() * squares).sum())
    rounded = method_named(kind)(weight, parse_format(name), moment)
    difference = (dequantize(rounded) - weight).double()
    return float(
        ((difference @ moment[0].double()) * difference).sum() if kind == "gptq" else difference.square().sum()
    )


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_those_of_today(kind):
    found = [error(kind, name) for name in FORMATS]
    assert found == pytest.approx(ERRORS[kind], rel=1e-3 if kind == "gptq" else 1e-4)
