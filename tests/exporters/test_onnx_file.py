import pytest
import torch
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.calibration import seeded
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.layers import find_layers
from mpq.core.scheme import parse_scheme
from mpq.exporters.consumers import CONSUMERS, check
from mpq.exporters.onnx_file import export
from mpq.exporters.ranges import input_ranges
from mpq.quantized import simulate
from tests.sensitivity.small_models import Convolutions, TiedLanguageModel, seed_weights

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
IMAGES = torch.randn(3, 4, 6, 6, generator=seeded(4))
TOKENS = torch.randint(0, 7, (3, 5), generator=seeded(3))
WEIGHTS = [name for name in CONSUMERS["onnx"].schemes if "+" not in name]


def allocate(model, schemes):
    layers = find_layers(model)
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


def run(folder, *inputs):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (part.numpy() for part in inputs), strict=True)))[0])


@pytest.mark.parametrize("start", range(0, len(WEIGHTS), 4))
@pytest.mark.parametrize(("build", "inputs"), [(Convolutions, IMAGES), (TiedLanguageModel, TOKENS)])
def test_onnxruntime_computes_what_was_simulated(build, inputs, start, tmp_path):
    model = seed_weights(build()).eval()
    allocation = allocate(model, WEIGHTS[start : start + 4])
    folder = export(model, allocation, tmp_path / "out", inputs=inputs)
    expected = simulate(model, allocation, trainable=False)(inputs)
    torch.testing.assert_close(run(folder, inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(folder, inputs[:1]), expected[:1], rtol=1e-4, atol=1e-4)  # the batch is open


def test_static_activations(tmp_path):
    model = seed_weights(Convolutions()).eval()
    allocation = allocate(model, ("int8-channel+a:int8",))
    ranges = input_ranges(model, allocation.layers, [IMAGES], lambda model, batch: model(batch))
    folder = export(model, allocation, tmp_path / "out", inputs=IMAGES, ranges=ranges)
    # On the calibration batch a static scale is the scale of the moment, but for the rounding of the layers before.
    expected = simulate(model, allocation, trainable=False)(IMAGES)
    floating = simulate(model, allocate(model, ("int8-channel",)), trainable=False)(IMAGES)
    served = run(folder, IMAGES)
    assert (served - expected).norm() < 0.02 * expected.norm()
    assert not torch.allclose(served, floating, rtol=1e-4, atol=1e-4)
    with pytest.raises(MpqError, match="layer first has int8 activations: pass the ranges"):
        export(model, allocation, tmp_path / "other", inputs=IMAGES)


def test_the_file_takes_the_promised_bytes(tmp_path):
    model = seed_weights(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 300))).eval()
    allocation = allocate(model, ("int4-g128", "int8-channel"))
    size = (export(model, allocation, tmp_path / "out", inputs=torch.zeros(2, 512)) / "model.onnx").stat().st_size
    promised = allocation.size + 4 * 812
    assert promised < size < promised + 6000  # the graph itself: a dozen nodes with the names of their origins


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("int3-channel", "4 or 8 bits.* is int4-channel"), ("nvfp4", "16- or 32-bit"), ("int8+a:int8-token", "static")],
)
def test_what_onnx_cannot_hold_is_refused(scheme, message):
    layer = Layer("a", "linear", 64, 64)
    assert CONSUMERS["onnx"].objection(layer, parse_scheme(scheme))
    with pytest.raises(MpqError, match=message):
        check(CONSUMERS["onnx"], Allocation((layer,), (scheme,)))


def test_inputs_are_needed():
    with pytest.raises(MpqError, match="pass the inputs"):
        export(nn.Sequential(nn.Linear(2, 2)), Allocation((), ()), "nowhere")
