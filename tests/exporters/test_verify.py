from importlib import import_module

import pytest
import torch
from torch import nn

import mpq
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.exporters import verify as verifying
from mpq.exporters.compressed_tensors import compress, uncompressed
from mpq.exporters.mpq import checkpoint
from mpq.exporters.rules import compressed_tensors_format
from mpq.kernels.layout import pack, unpack
from mpq.kernels.tolerance import kernel_error
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import pack_model, simulate
from mpq.rounding.reference import dequantize, quantize
from tests.sensitivity.small_models import Convolutions, TiedLanguageModel, seed_weights

TOKENS = torch.randint(0, 7, (3, 5), generator=seeded(3))
IMAGES = torch.randn(2, 4, 6, 6, generator=seeded(4))
CASES = [(Convolutions, IMAGES), (TiedLanguageModel, TOKENS)]
SCHEMES = [*sorted(FORMATS), "int4-channel+a:int8-token", "fp8-e4m3+a:fp8-e4m3", "int8-channel+a:int8-token"]


class Scaled(nn.Module):
    """Two layers and a scale that the file does not store."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(32, 48), nn.Linear(48, 8), scale

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * self.scale)


SCALES = iter(())


def scaled():
    return Scaled(next(SCALES))


def allocate(model, *schemes) -> Allocation:
    layers = find_layers(model)
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


def small():
    return seed_weights(Scaled()).eval(), torch.randn(5, 32, generator=seeded(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("build", "inputs"), CASES)
def test_correct_exports_pass(build, inputs, dtype, tmp_path):
    model = seed_weights(build())
    model = model.eval().to(dtype)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    for index, scheme in enumerate(SCHEMES):
        export(model, allocate(model, scheme), tmp_path / str(index), method="nearest", inputs=inputs)


def test_a_changed_weight_fails_with_its_layer_and_leaves_no_files(tmp_path, monkeypatch):
    model, _ = small()

    def altered(quantized):
        packed = honest(quantized)
        if packed.shape[0] == 8:
            packed.tensors["packed"][0, 0] ^= 1
        return packed

    honest = checkpoint.pack
    monkeypatch.setattr(checkpoint, "pack", altered)
    with pytest.raises(MpqError, match="layer second reads back other numbers"):
        mpq.export(model, allocate(model, "int4-g32"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_old_export_survives_one_that_fails(tmp_path):
    global SCALES
    model, inputs = small()
    allocation, recipe = allocate(model, "int4-g32"), {"kind": "factory", "path": f"{__name__}:scaled"}
    SCALES = iter((1.0, 1.5))
    export(model, allocation, tmp_path / "out", recipe=recipe, inputs=inputs)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(MpqError, match="the input of layer second is off by"):
        export(model, allocate(model, "int8-channel"), tmp_path / "out", recipe=recipe, inputs=inputs)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_outside_of_layers_are_compared(tmp_path, monkeypatch):
    model, _ = small()

    def careless(draft, specs, tensors, shard):
        return honest(draft, specs, ((name, t + 1 if name == "first.bias" else t) for name, t in tensors), shard)

    honest = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", careless)
    with pytest.raises(MpqError, match=r"the tensor first.bias of Scaled reads back changed"):
        export(model, allocate(model, "int4-g32"), tmp_path / "out")


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    return seed_weights(transformers.LlamaForCausalLM(config), 0.1).eval()


@pytest.mark.parametrize(
    ("target", "module", "function"),
    [
        ("compressed-tensors", "compressed_tensors", "compress"),
        ("gptq", "gptq", "gptq_tensors"),
        ("gguf", "gguf.file", "encode_blocks"),
    ],
)
def test_exports_for_other_programs_are_read_back(target, module, function, tmp_path, monkeypatch):
    pytest.importorskip(target.replace("-", "_") if target != "gptq" else "torch")
    model = llama()
    layers = find_layers(model)
    schemes = tuple("bf16" if layer.kind == "embedding" or "head" in layer.name else "int4-g32" for layer in layers)
    allocation = Allocation(layers, schemes)
    mpq.export(model, allocation, tmp_path / "honest", to=target)
    module = import_module(f"mpq.exporters.{module}")
    honest, count = getattr(module, function), 0

    def altered(*arguments):
        nonlocal count
        found, count = honest(*arguments), count + 1
        codes = found if not isinstance(found, dict) else found.get("weight_packed", found.get("qweight"))
        planned = isinstance(codes, torch.Tensor) and codes.device.type == "meta"
        if not planned and "int" in str(codes.dtype):
            codes[0, -1] ^= 1
        return found

    monkeypatch.setattr(module, function, altered)
    with pytest.raises(MpqError, match="reads back other numbers than were rounded"):
        mpq.export(model, allocation, tmp_path / "out", to=target)
    assert count
    assert [path.name for path in tmp_path.iterdir()] == ["honest"]


@pytest.mark.parametrize(
    "name", ["int4-g32", "int3-g64-asym", "int8-channel", "nvfp4", "mxfp4", "fp8-e4m3", "mxfp8-e4m3"]
)
def test_compressed_tensors_are_read_without_the_package(name):
    scheme = parse_scheme(name)
    storage = str(compressed_tensors_format(scheme))
    quantized = quantize(torch.randn(24, 128, generator=seeded(2, name)), scheme.weight)
    found = uncompressed(scheme.weight, storage, compress(pack(quantized), storage))
    torch.testing.assert_close(dequantize(unpack(found)), dequantize(quantized), rtol=2**-22, atol=0)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "function"])
def test_inputs_of_any_shape_are_compared(kind, tmp_path):
    model, inputs = small()
    given = {"tensor": inputs, "tuple": (inputs,), "mapping": {"x": inputs}, "function": lambda m: m(inputs).sum()}
    export(model, allocate(model, "int4-g32"), tmp_path / "out", inputs=given[kind])


@pytest.mark.parametrize("scheme", ["int4-g32", "nf4-g64", "int8-channel+a:int8-token"])
@pytest.mark.parametrize(("build", "inputs"), CASES)
def test_the_first_differing_layer_is_named(build, inputs, scheme):
    """The tolerance is tight: a relative error of a hundredth in a layer's outputs is detected."""
    model = seed_weights(build()).eval()
    allocation = allocate(model, scheme)
    packed = pack_model(model, allocation)
    name = allocation.layers[-1].names[-1]
    packed.get_submodule(name).register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(MpqError, match=rf"the output of layer ({allocation.layers[-1].name}|{name}) is off"):
        verifying.verify_outputs(model, packed, allocation, lambda model: model(inputs))


def test_kernel_errors_stay_within_the_tolerance():
    """The bound holds without being vacuous: errors are 0.001 to 0.7 of it."""
    used = []
    for name in sorted(FORMATS):
        layer = seed_weights(nn.Sequential(nn.Linear(96, 64)))
        x = torch.randn(16, 96, generator=seeded(1, name))
        allocation = allocate(layer, name)
        simulated, packed = simulate(layer, allocation, trainable=False), pack_model(layer, allocation)
        with torch.no_grad():
            expected = simulated(x)
            used.append(((packed(x) - expected).abs() / kernel_error(simulated[0], x, expected)).max().item())
    assert 1e-3 < max(used) < 0.9
