"""Integer-only networks: near the float network, exact by hand, and bit-identical in ONNX Runtime."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mpq
from mpq.integer_only import integer_program, residual_ties, run
from mpq.integer_only.program import dyadic, rescaled
from mpq.network.layers import find_layers


class Residual(nn.Module):
    """Every operation that has an integer form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.norm1 = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16)
        self.shortcut, self.norm3 = nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.norm(self.stem(x))))
        inside = functional.relu6(self.norm1(self.conv1(x)))
        x = functional.relu(self.norm2(self.depthwise(inside)) + self.norm3(self.shortcut(x)))
        padded = functional.pad(x[:, 4:12], (0, 0, 0, 0, 4, 4))
        return self.head(functional.relu(self.last(x) + padded))


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, images = Residual(), torch.randn(64, 3, 16, 16)
    for _ in range(5):
        model(images)  # statistics of the batch normalizations
    return model.eval(), images


def uniform(model: nn.Module, images: Tensor, scheme: str) -> mpq.Allocation:
    layers = residual_ties(model, find_layers(model), images)
    return mpq.Allocation(layers, (scheme,) * len(layers))


@pytest.mark.parametrize(
    ("scheme", "most"), [("int8-channel+a:int8", 0.05), ("int8-tensor+a:int8", 0.06), ("int4-channel+a:int8", 0.3)]
)
def test_near_the_float_network(network, scheme, most):
    model, images = network
    program = integer_program(model, uniform(model, images, scheme), images)
    with torch.no_grad():
        wanted = model(images)
    assert (program(images) - wanted).norm() < most * wanted.norm()


@pytest.mark.parametrize("scheme", ["int8-channel+a:int8", "int4-channel+a:int4"])
def test_onnx_runtime_computes_the_same_bits(network, scheme, tmp_path):
    pytest.importorskip("onnxruntime")
    from mpq.exporters.onnx.integer import export_integer, run_onnx

    model, images = network
    program = integer_program(model, uniform(model, images, scheme), images[:32])
    codes = program.codes(images * 1.3)  # some beyond the calibrated range
    path = export_integer(program, tmp_path / "model.onnx", codes)
    assert torch.equal(run_onnx(path, program, codes), run(program, codes))


def test_a_channel_dominated_by_its_bias_keeps_the_bias(network, tmp_path):
    pytest.importorskip("onnxruntime")
    from mpq.exporters.onnx.integer import export_integer, run_onnx

    model, images = copy.deepcopy(network[0]), network[1]
    with torch.no_grad():
        model.norm.weight[2], model.norm.bias[2] = 1e-12, 1.5
        wanted = model(images)
    program = integer_program(model, uniform(model, images, "int8-channel+a:int8"), images)
    assert (program(images) - wanted).norm() < 0.05 * wanted.norm()
    codes = program.codes(images)
    path = export_integer(program, tmp_path / "model.onnx", codes)
    assert torch.equal(run_onnx(path, program, codes), run(program, codes))


def test_the_graph_holds_no_floats(network, tmp_path):
    onnx = pytest.importorskip("onnx")
    from mpq.exporters.onnx.integer import export_integer

    model, images = network
    program = integer_program(model, uniform(model, images, "int8-channel+a:int8"), images)
    graph = onnx.load(export_integer(program, tmp_path / "model.onnx", images)).graph
    kinds = {onnx.TensorProto.DataType.Name(part.data_type) for part in graph.initializer}
    assert kinds == {"UINT8", "INT32", "INT64"}


def test_sums_of_branches_are_rounded_once():
    multipliers, shift = dyadic([torch.tensor([0.5, 0.25]), torch.tensor([0.25])], [1e6, 127.0])
    left, right = torch.tensor([[3, 3], [-3, -2]]), torch.tensor([[1, 1], [1, 1]])
    total = rescaled(left, right, multipliers=multipliers, shift=shift, low=-2, high=1)
    assert total.tolist() == [[1, 1], [-1, 0]]  # 1.75 clipped, 1; -1.25, -0.25
    halves = torch.tensor([[1, 3], [-1, -3]])
    multipliers, shift = dyadic([torch.tensor([0.5])], [3.0])
    assert rescaled(halves, multipliers=multipliers, shift=shift, low=-9, high=9).tolist() == [[1, 2], [0, -1]]


def test_ratios_are_as_exact_as_sums_allow():
    ratio = torch.tensor([1e-5, 0.7e-5], dtype=torch.float64)
    multipliers, shift = dyadic([ratio], [2.0**31])
    assert torch.allclose(multipliers[0].double() / 2.0**shift, ratio, rtol=1e-8)
    assert float(multipliers[0].max()) < 2**31
    assert torch.equal(dyadic([-ratio], [2.0**31])[0][0], -multipliers[0])
    assert float(multipliers[0].max()) * 2.0**31 < 2**62


def test_layers_that_must_agree_are_tied(network):
    model, images = network
    ties = {layer.name: layer.tie for layer in residual_ties(model, find_layers(model), images)}
    together = {"conv1", "shortcut", "depthwise"}  # read the same values; outputs are added
    assert len({ties[name] for name in together}) == 1
    assert all((ties[name] != "") == (name in together) for name in ties)


def test_operations_without_an_integer_form_are_refused_by_name(network):
    model, images = network
    layers = find_layers(model)
    for scheme in ("int8-channel", "int8-channel+a:int8-token", "fp8-e4m3-channel+a:int8", "int4-g32+a:int8"):
        with pytest.raises(mpq.MpqError, match="integers alone take"):
            integer_program(model, mpq.Allocation(layers, (scheme,) * len(layers)), images)
    schemes = ["int8-channel+a:int4" if layer.name == "conv1" else "int8-channel+a:int8" for layer in layers]
    with pytest.raises(mpq.MpqError, match=r"conv1, shortcut read the same values|shortcut, conv1 read the same"):
        integer_program(model, mpq.Allocation(layers, tuple(schemes)), images)
    curved = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1))
    with pytest.raises(mpq.MpqError, match="gelu"):
        integer_program(curved, uniform(curved, images, "int8-channel+a:int8"), images)
    some = mpq.Allocation(layers[1:], ("int8-channel+a:int8",) * (len(layers) - 1))
    with pytest.raises(mpq.MpqError, match="stem"):
        integer_program(model, some, images)
