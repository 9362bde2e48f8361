"""Every primitive on flat arrays against torch, layer by layer; and proxies as metrics."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "sensitivity"))
from hypothesis import assume, given, settings
from small_models import Convolutions, class_batches, seed_weights
from test_formulas import programs

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.network.calibration import cross_entropy
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.formulas import parse
from mpq.proxies.programs import BINARY, INPUTS, UNARY, Input, Number, kind_of
from mpq.proxies.statistics import Space, Statistics
from mpq.sensitivity import metric_named
from mpq.sensitivity.profile import profile

SHAPES = {"weight": [(2, 3), (4, 2)], "activation": [(3, 2), (3, 5)]}
TORCH = {
    "log": torch.log, "abs": torch.abs, "square": torch.square, "exp": torch.exp, "relu": torch.relu,
    "invert": torch.reciprocal, "sigmoid": torch.sigmoid, "sqrt": torch.sqrt, "neg": torch.neg, "sign": torch.sign,
    "abslog": lambda x: torch.where(x == 0, torch.ones_like(x), x).abs().log(),
    "softmax": lambda x: x.flatten().softmax(0).reshape(x.shape),
    "logsoftmax": lambda x: x.flatten().log_softmax(0).reshape(x.shape),
    "normalize": lambda x: (x - x.mean()) / x.std(correction=0),
    "minmax": lambda x: (x - x.min()) / (x.max() - x.min()),
    "mean": torch.mean, "std": lambda x: x.std(correction=0), "sum": torch.sum, "l1": lambda x: x.abs().sum(),
    "norm": torch.norm, "add": torch.add, "subtract": torch.sub, "multiply": torch.mul,
    "matmul": lambda x, y: x @ y.T,
}  # fmt: skip


def statistics() -> Statistics:
    """Random numbers for two layers and two schemes."""
    random = np.random.default_rng(0)
    spaces = {
        name: Space(*(np.array([shape[axis] for shape in shapes]) for axis in (0, 1, 0, 1)))
        for name, shapes in SHAPES.items()
    }
    numbers = {}
    for name, (kind, _) in INPUTS.items():
        count = 2 if kind.space == "layer" else int(spaces[kind.space].counts.sum())
        values = random.normal(size=(2 if kind.by_scheme else 1, count))
        numbers[name] = values if kind.space == "layer" else values.astype(np.float32)
    layers = (Layer("a", "linear", 2, 3), Layer("b", "linear", 4, 2))
    return Statistics(layers, ("int2-channel", "int4-channel"), spaces, numbers)


STATISTICS = statistics()
EVALUATOR = Evaluator(STATISTICS)


def slow(program, layer: int, scheme: int) -> torch.Tensor:
    """Evaluate the program for one layer and scheme by torch in float64."""
    if isinstance(program, Number):
        return torch.tensor(program.value, dtype=torch.float64)
    if isinstance(program, Input):
        numbers, space = STATISTICS.get(program.name), INPUTS[program.name][0].space
        row = torch.from_numpy(numbers[min(scheme, len(numbers) - 1)]).double()
        if space == "layer":
            return row[layer]
        start = sum(rows * cols for rows, cols in SHAPES[space][:layer])
        rows, cols = SHAPES[space][layer]
        return row[start : start + rows * cols].reshape(rows, cols)
    return TORCH[program.operation](*(slow(argument, layer, scheme) for argument in program.arguments))


def test_the_torch_reference_has_every_primitive():
    assert set(TORCH) == {*UNARY, *BINARY}


@settings(max_examples=300, deadline=None)
@given(programs(depth=3))
def test_programs_are_what_torch_computes_layer_by_layer(program):
    """Elements are float32: a primitive errs by 2**-24, and the exponential of 15 by 15 times that; a few in a row."""
    expected = np.array([[slow(program, i, j).mean().item() for j in range(2)] for i in range(2)])
    table = EVALUATOR.table(program)
    assert table.shape == (2, 2)
    assume(np.isfinite(table).all() and np.isfinite(expected).all() and np.abs(expected).max() < 1e6)
    parts = [slow(part, i, j) for part in _parts(program) for i in range(2) for j in range(2)]
    largest = max(part.abs().max().item() for part in parts)
    smallest = min(part.abs().min().item() for part in parts)
    assume(largest < 100 and smallest > 1e-2)  # beyond that float32 loses digits by cancellation or overflows
    assert np.allclose(table, expected, rtol=2e-3, atol=2e-3)


def _parts(program):
    from mpq.proxies.programs import walk

    return walk(program)


@pytest.mark.parametrize("name", sorted(UNARY))
def test_each_primitive_alone(name):
    program = parse(f"{name}(abs(weight) + 1)")
    expected = [[slow(program, i, j).mean().item() for j in range(2)] for i in range(2)]
    assert np.allclose(EVALUATOR.table(program), expected, rtol=1e-5)


def test_cancelling_terms_are_zero():
    assert (EVALUATOR.table(parse("normalize(weight)")) == 0).all()
    assert (EVALUATOR.table(parse("sum(weight - mean(weight))")) == 0).all()


def test_matrix_products_are_scaled_to_all_columns():
    space = Space(np.array([2]), np.array([3]), np.array([2]), np.array([6]))
    numbers = {"weight": np.arange(6, dtype=np.float32)[None], "bits": np.array([[2.0]])}
    half = Statistics((Layer("a", "linear", 2, 6),), ("int2-channel",), {"weight": space}, numbers)
    matrix = torch.arange(6.0).reshape(2, 3)
    expected = (matrix @ matrix.T * 2).sum().item()
    assert Evaluator(half).table(parse("sum(weight @ weight)"))[0, 0] == pytest.approx(expected)
    assert Evaluator(half).table(parse("sum(softmax(weight))"))[0, 0] == pytest.approx(1)


def test_results_do_not_depend_on_the_memory_limit():
    small = Evaluator(STATISTICS, memory=3000)
    for text in ("mean(exp(weight) * exp(error))", "sum(abs(weight @ grad))", "mean(exp(weight))", "bits * norm(act)"):
        assert np.array_equal(small.table(parse(text)), EVALUATOR.table(parse(text)))
        assert small.used <= 3000


def run(metric: str):
    model = seed_weights(Convolutions())
    return profile(
        model, class_batches((4, 6, 6)), cross_entropy, ("int2-channel", "int4-g32"), metric=metric, progress=False
    )


@pytest.mark.parametrize(
    ("proxy", "metric", "factor"),
    [
        ("proxy:hawq-v2", "hessian", 2),
        ("proxy:trace / params * sum(square(error))", "hessian", 2),
        ("proxy: sum(fisher * square(error)) / 2", "fisher", 1),
        ("proxy:eigenvalue/params * sum(square(error))", "eigenvalue", 2),
    ],
)
def test_a_proxy_works_as_a_metric(proxy, metric, factor):
    mine, known = run(proxy), run(metric)
    assert mine.metric == proxy
    assert np.allclose(mine.scores, factor * known.scores, rtol=1e-4)


def test_invalid_proxies_are_refused():
    with pytest.raises(MpqError, match="character 8"):
        metric_named("proxy:trace *")
    with pytest.raises(MpqError, match=r"log\(error\) is nan for layer first in int2-channel"):
        run("proxy:log(error)")
    with pytest.raises(MpqError, match="unknown metric 'prox"):
        metric_named("prox:bits")


def test_kinds_and_values_agree():
    for text in ("weight @ grad", "act * bits", "softmax(error)", "bits", "norm(virtual)"):
        program = parse(text)
        assert EVALUATOR.value(program).space == kind_of(program).space
