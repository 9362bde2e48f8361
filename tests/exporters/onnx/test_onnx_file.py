import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.exporters.holding import check
from mpq.exporters.onnx import reader
from mpq.exporters.onnx.file import file_size
from mpq.exporters.onnx.operators import nbits_block
from mpq.exporters.onnx.reader import read_back
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.network.ranges import input_ranges
from mpq.quantized import quantized_layers, simulate
from mpq.rounding.reference import dequantize
from tests.exporters.architectures import model_of
from tests.sensitivity.small_models import Convolutions, TiedLanguageModel, seed_weights

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
IMAGES = torch.randn(3, 4, 6, 6, generator=seeded(4))
TOKENS = torch.randint(0, 7, (3, 5), generator=seeded(3))
WEIGHTS = [name for name in TARGETS["onnx"].schemes if "+" not in name]


def allocate(model, schemes):
    layers = find_layers(model)
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


def run(folder, *inputs, optimized=True):
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (part.numpy() for part in inputs), strict=True)))[0])


@pytest.mark.parametrize("start", range(0, len(WEIGHTS), 4))
@pytest.mark.parametrize(("build", "inputs"), [(Convolutions, IMAGES), (TiedLanguageModel, TOKENS)])
def test_onnxruntime_computes_what_was_simulated(build, inputs, start, tmp_path):
    model = seed_weights(build()).eval()
    allocation = allocate(model, WEIGHTS[start : start + 4])
    folder = export(model, allocation, tmp_path / "out", to="onnx", inputs=inputs)
    expected = simulate(model, allocation, trainable=False)(inputs)
    torch.testing.assert_close(run(folder, inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(folder, inputs[:1]), expected[:1], rtol=1e-4, atol=1e-4)  # the batch is dynamic


class Linears(nn.Module):
    """Linear layers with and without a bias, on matrices and batches of them, one used twice: (n, t, 40) -> (n, 7)."""

    def __init__(self):
        super().__init__()
        self.mix = Conv1D(32, 40)
        self.twice = nn.Linear(32, 32)
        self.bare = nn.Linear(32, 48, bias=False)
        self.head = nn.Linear(48, 7)

    def forward(self, x):
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.mix(x)))))
        return self.head(torch.tanh(self.bare(x)).mean(1))


SEQUENCES = torch.randn(3, 5, 40, generator=seeded(6))
NBITS = ("int2-g16", "int4-g32-asym", "int8-channel", "int4-g32", "int8-g64", "int2-g32-asym", "int4", "int8-g16-sbf16")


@pytest.mark.parametrize("start", range(0, len(NBITS), 4))
def test_weights_alone_go_into_matmulnbits(start, tmp_path):
    model = seed_weights(Linears(), 0.3).eval()
    allocation = allocate(model, NBITS[start : start + 4])
    folder = export(model, allocation, tmp_path / "out", to="onnx", inputs=SEQUENCES)
    used = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    in_blocks = all(nbits_block(layer, allocation.scheme_of[layer.name]) for layer in allocation.layers)
    assert (used.count("MatMulNBits"), used.count("DequantizeLinear")) == ((5, 0) if in_blocks else (4, 1))
    assert not {"MatMul", "Gemm"} & set(used) or not in_blocks
    expected = simulate(model, allocation, trainable=False)(SEQUENCES)
    torch.testing.assert_close(run(folder, SEQUENCES), expected, rtol=1e-4, atol=1e-4)
    assert (folder / "model.onnx").stat().st_size == file_size(model, allocation, SEQUENCES)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([*WEIGHTS, *NBITS]), st.integers(1, 9), st.integers(1, 70), st.booleans(),
    st.sampled_from(["random", "zero", "constant"]),
)  # fmt: skip
def test_any_shape_and_content(name, rows, cols, bias, content):
    model = nn.Sequential(nn.Linear(cols, rows, bias)).eval()
    with torch.no_grad():
        weight = torch.randn(rows, cols, generator=seeded(0, rows, cols))
        model[0].weight.copy_({"random": weight, "zero": weight * 0, "constant": weight * 0 + 0.37}[content])
    allocation = allocate(model, (name,))
    inputs = torch.randn(3, cols, generator=seeded(1, cols))
    with tempfile.TemporaryDirectory() as folder:
        served = run(export(model, allocation, Path(folder) / "out", to="onnx", inputs=inputs), inputs)
    torch.testing.assert_close(served, simulate(model, allocation, trainable=False)(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8-channel+a:int8", "int2-channel+a:int8", "fp8-e4m3-channel+a:fp8-e4m3"])
@pytest.mark.parametrize(("build", "inputs"), [(Convolutions, IMAGES), (Linears, SEQUENCES)])
def test_static_activations(build, inputs, scheme, tmp_path):
    model = seed_weights(build(), 0.3).eval()
    allocation = allocate(model, (scheme,))
    ranges = input_ranges(model, allocation.layers, [inputs], lambda model, batch: model(batch))
    folder = export(model, allocation, tmp_path / "out", to="onnx", inputs=inputs, ranges=ranges)
    expected = simulate(model, allocation, trainable=False, ranges=ranges)(inputs)
    floating = simulate(model, allocate(model, (scheme.partition("+")[0],)), trainable=False)(inputs)
    torch.testing.assert_close(run(folder, inputs, optimized=False), expected, rtol=1e-4, atol=1e-4)
    # The optimized graph rounds biases to multiples of the scales' product, and inputs once more, by block, where it
    # multiplies them by integers of 2 bits: at most about as much again as was rounded.
    assert (run(folder, inputs) - expected).norm() < 1.5 * (expected - floating).norm()
    doubled = 2 * inputs  # values beyond the calibrated ranges are clipped
    clipped = simulate(model, allocation, trainable=False, ranges=ranges)(doubled)
    torch.testing.assert_close(run(folder, doubled, optimized=False), clipped, rtol=1e-4, atol=1e-4)
    with pytest.raises(MpqError, match=r"layer \w+ has (int8|fp8-e4m3) activations: pass the ranges"):
        export(model, allocation, tmp_path / "other", to="onnx", inputs=inputs)


def test_the_file_has_the_predicted_size(tmp_path):
    model = seed_weights(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 300))).eval()
    allocation = allocate(model, ("int4-g128", "int8-channel"))
    size = (
        (export(model, allocation, tmp_path / "out", to="onnx", inputs=torch.zeros(2, 512)) / "model.onnx")
        .stat()
        .st_size
    )
    assert size == file_size(model, allocation, torch.zeros(2, 512))
    promised = allocation.size + 4 * 812
    assert promised < size < promised + 1000


def test_large_graphs_store_tensors_in_a_separate_file(tmp_path):
    model = seed_weights(Linears(), 0.3).eval()
    allocation = allocate(model, ("fp32", "int8-channel"))
    folder = export(model, allocation, tmp_path / "out", to="onnx", inputs=SEQUENCES, shard=1000)
    assert torch.equal(
        run(folder, SEQUENCES), run(export(model, allocation, folder / "all", to="onnx", inputs=SEQUENCES), SEQUENCES)
    )
    files = folder / "model.onnx", folder / "model.onnx.data"
    assert sum(file.stat().st_size for file in files) == file_size(model, allocation, SEQUENCES, shard=1000)
    files[1].write_bytes(files[1].read_bytes()[:-8])
    with pytest.raises(Exception, match=r"External initializer: \S+ .* out of bounds"):
        run(folder, SEQUENCES)
    export(model, allocation, folder, to="onnx", inputs=SEQUENCES)  # a single file again
    assert not files[1].exists()


def test_module_modes_are_restored(tmp_path):
    model = seed_weights(Convolutions()).train()
    model.norm.eval()  # frozen while the rest trains
    export(model, allocate(model, ["int8-channel"]), tmp_path / "out", to="onnx", inputs=IMAGES)
    assert model.training
    assert model.first.training
    assert not model.norm.training


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("int3-channel", "2, 4 or 8 bits.* is int2-g32"), ("nvfp4", "16- or 32-bit"), ("int8+a:int8-token", "static")],
)
def test_formats_that_onnx_lacks_are_refused(scheme, message):
    layer = Layer("a", "linear", 64, 64)
    assert TARGETS["onnx"].objection(layer, parse_scheme(scheme))
    with pytest.raises(MpqError, match=message):
        check(TARGETS["onnx"], Allocation((layer,), (scheme,)))


def test_inputs_are_needed():
    with pytest.raises(MpqError, match="pass the inputs"):
        export(nn.Sequential(nn.Linear(2, 2)), Allocation((), ()), "nowhere", to="onnx")


@pytest.fixture
def no_runtime(monkeypatch):
    monkeypatch.setattr(reader, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("build", "inputs", "schemes"),
    [
        (Convolutions, IMAGES, ("int8-channel", "int4-g32", "fp8-e4m3", "int2-g32")),
        (TiedLanguageModel, TOKENS, ("int4-channel", "int2-channel", "int4-g128-asym")),
        (lambda: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)), torch.ones(2, 64), ("int4-g32", "int2-g64-asym")),
    ],
)
def test_outputs_are_compared_without_onnxruntime(build, inputs, schemes, no_runtime, tmp_path, caplog):
    model = seed_weights(build()).eval()
    allocation = allocate(model, schemes)
    export(model, allocation, tmp_path / "out", to="onnx", inputs=inputs)
    assert "were not" not in caplog.text
    if build is not Convolutions:
        return
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    bias = next(one for one in graph.graph.initializer if one.name == "head.bias")
    bias.raw_data = bytes([0, 0, 0x80, 0x3F]) + bias.raw_data[4:]
    onnx.save(graph, tmp_path / "out" / "model.onnx")
    matrices = {layer.name: dequantize(quantized) for layer, _, quantized in quantized_layers(model, allocation, "mse")}
    with pytest.raises(MpqError, match="onnx's reference evaluator's outputs differ"):
        read_back(tmp_path / "out" / "model.onnx", model, allocation, matrices, (inputs,), None)


def test_graphs_that_no_reader_runs_are_reported(no_runtime, monkeypatch, tmp_path, caplog):
    def refuse(file, inputs):
        raise NotImplementedError("no Gelu")

    monkeypatch.setattr(reader, "reference_outputs", refuse)
    model = seed_weights(nn.Sequential(nn.Linear(64, 32))).eval()
    export(model, allocate(model, ("int8-channel",)), tmp_path / "out", to="onnx", inputs=torch.ones(2, 64))
    assert "its outputs were not: onnx's reference evaluator does not run it (no Gelu)" in caplog.text


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("bare.weight.codes", "layer bare reads back other numbers"),  # MatMulNBits
        ("mix.weight.codes", "layer mix reads back other numbers"),  # DequantizeLinear
        ("head.weight.scale", "layer head reads back other numbers"),
        ("head.bias", "ONNX Runtime's outputs differ from the simulated model"),
    ],
)
def test_a_graph_that_differs_is_refused(tensor, message, tmp_path):
    model = seed_weights(Linears(), 0.3).eval()
    allocation = allocate(model, ("int8-channel", "int4-g32"))
    folder = export(model, allocation, tmp_path / "out", to="onnx", inputs=SEQUENCES)
    matrices = {
        layer.name: dequantize(quantized) for layer, _, quantized in quantized_layers(model, allocation, "mse", None)
    }
    read_back(folder / "model.onnx", model, allocation, matrices, (SEQUENCES,), None)
    graph = onnx.load(folder / "model.onnx")
    changed = next(one for one in graph.graph.initializer if one.name == tensor)
    changed.raw_data = bytes([changed.raw_data[0] ^ 0x21, changed.raw_data[1] ^ 0x21]) + changed.raw_data[2:]
    if tensor == "head.bias":
        changed.raw_data = bytes([0, 0, 0x80, 0x3F]) + changed.raw_data[4:]
    onnx.save(graph, folder / "model.onnx")
    with pytest.raises(MpqError, match=message):
        read_back(folder / "model.onnx", model, allocation, matrices, (SEQUENCES,), None)


@pytest.mark.parametrize(("kind", "count"), [("qwen3", 1), ("gemma3_text", 2)])
def test_a_language_model_takes_texts_of_any_number_and_length(kind, count, tmp_path):
    model = model_of(kind, num_hidden_layers=2, hidden_size=64, intermediate_size=96)
    layers = find_layers(model)
    allocation = Allocation(layers, tuple(("int8-g32", "int4-g32")[i % 2] for i in range(len(layers))))
    tokens = torch.randint(3, 90, (count, 16), generator=seeded(0))
    export(model, allocation, tmp_path / "out", to="onnx", inputs=tokens)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    longer = torch.randint(3, 90, (3, 40), generator=seeded(1))
    found = session.run(None, {session.get_inputs()[0].name: longer.numpy()})
    with torch.no_grad():
        expected = simulate(model, allocation, trainable=False)(longer).logits
    assert len(found) == 1
    command = TARGETS.named("onnxruntime").serving(str(tmp_path / "out"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # 'python' is the one that runs this
    served = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    assert served.stdout.startswith("[array(")
    torch.testing.assert_close(torch.from_numpy(found[0]), expected, rtol=1e-4, atol=1e-4)
    assert model.config.use_cache


def test_untraceable_models_are_refused_in_one_sentence(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > 0 else x

    model = Branching()
    allocation = Allocation(find_layers(model), ("int8-channel",))
    with pytest.raises(MpqError, match=r"torch cannot export Branching as a graph \(.*export to mpq instead"):
        export(model, allocation, tmp_path / "out", to="onnx", inputs=torch.randn(2, 32))
