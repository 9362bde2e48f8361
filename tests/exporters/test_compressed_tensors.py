import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.exporters.compressed_tensors import compress, group_entry
from mpq.exporters.rules import compressed_tensors_format
from mpq.exporters.targets import TARGETS
from mpq.kernels.layout import pack
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from mpq.rounding.reference import dequantize, quantize
from tests.sensitivity.small_models import seed_weights

pytest.importorskip("compressed_tensors")
CONSUMER = TARGETS["compressed-tensors"]
WEIGHTS = sorted({name for name in CONSUMER.schemes if not parse_scheme(name).weight.is_float_copy})


def decompressed(packed, scheme, dtype):
    """Weights decompressed by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    theirs = QuantizationScheme(targets=["x"], **group_entry(scheme))
    state = compress(packed, compressed_tensors_format(scheme))
    state = {name: tensor.to(dtype) if name == "weight_scale" and tensor.dtype.itemsize > 1 else tensor
             for name, tensor in state.items()}  # fmt: skip
    return BaseCompressor.get_value_from_registry(theirs.format).decompress(state, theirs)["weight"]


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(WEIGHTS), st.integers(1, 9), st.integers(1, 140), st.sampled_from(["random", "zero", "constant"])
)
def test_compressed_tensors_decompression_matches_ours(name, rows, cols, content):
    scheme = parse_scheme(name)
    if scheme.weight.granularity == "group":
        cols = -(-cols // scheme.weight.group_size) * scheme.weight.group_size
    assert not CONSUMER.objection(Layer("x", "linear", rows, cols), scheme)
    weight = torch.randn(rows, cols, generator=seeded(0, rows, cols))
    weight = {"random": weight, "zero": weight * 0, "constant": weight * 0 + 0.37}[content]
    quantized = quantize(weight, scheme.weight)
    theirs = decompressed(pack(quantized), scheme, torch.float32)
    # compressed-tensors decompresses mx and nvfp4 weights in bfloat16, rounding scale and product once each
    tolerance = 2**-7 if theirs.dtype == torch.bfloat16 else 2**-22
    torch.testing.assert_close(theirs.float(), dequantize(quantized), rtol=tolerance, atol=1e-30)


def llama(tied=False, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    return seed_weights(LlamaForCausalLM(config), 0.1).eval().to(dtype)


def allocate(model, schemes):
    """q/k/v, gate/up and the others take the schemes in turn; embeddings are copies."""
    layers = find_layers(model)
    keys = list(dict.fromkeys(layer.tie or layer.name for layer in layers))
    turn = {key: schemes[index % len(schemes)] for index, key in enumerate(keys)}
    copies = [layer.kind == "embedding" or bool(layer.aliases) for layer in layers]
    picked = ("bf16" if copy else turn[layer.tie or layer.name] for layer, copy in zip(layers, copies, strict=True))
    return Allocation(layers, tuple(picked))


TOKENS = torch.randint(0, 64, (2, 12), generator=seeded(5))
# Zero points are left to the test above: transformers 5.24 expects them unpacked and refuses the packed ones that
# compressed-tensors itself writes. Blocks of floats are decompressed to bfloat16, no match for a float32 model.
MIXES = {
    "integers": ("int4-g128", "int2-g32", "int8-channel", "int3-g64", "int5-channel", "int6-g128"),
    "floats": ("mxfp4", "nvfp4", "fp8-e4m3-channel", "mxfp8-e4m3", "fp8-e4m3", "mxfp6-e2m3"),
    "one": ("int4-g128",),
}


@pytest.mark.parametrize(
    ("mix", "dtype"),
    [("integers", torch.float32), ("integers", torch.bfloat16), ("floats", torch.bfloat16), ("one", torch.float32)],
)
def test_transformers_loads_the_folder_and_computes_our_logits(mix, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama(tied=mix == "floats", dtype=dtype)
    allocation = allocate(model, MIXES[mix])
    folder = export(model, allocation, tmp_path / "out", to="compressed-tensors")
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ours = simulate(model, allocation, trainable=False)
    with torch.no_grad():
        theirs, expected = served(TOKENS).logits.float(), ours(TOKENS).logits.float()
    if dtype == torch.float32:
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    else:  # weights, and in bfloat16 all activations, are rounded to 8 bits of mantissa: some roundings of 2**-8 add up
        error = (theirs - expected).norm() / expected.norm()
        assert error < 2**-5, error
    unquantized = model(TOKENS).logits.float()
    assert (theirs - expected).norm() < 0.5 * (theirs - unquantized).norm()


@pytest.mark.parametrize(
    "scheme", ["int8-channel+a:int8-token", "fp8-e4m3-channel+a:fp8-e4m3-token", "fp8-e4m3+a:fp8-e4m3"]
)
def test_activations_in_eight_bits(scheme, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama()
    allocation = allocate(model, (scheme,))
    ranges = {layer.name: (-4.0, 4.0) for layer in allocation.layers} if scheme.endswith("+a:fp8-e4m3") else None
    folder = export(model, allocation, tmp_path / "out", to="compressed-tensors", ranges=ranges)
    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] is (ranges is None)
    served = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs, expected = served(TOKENS).logits, simulate(model, allocation, trainable=False)(TOKENS).logits
    # compressed-tensors' int8 scale is absmax / 127.5 (ours: / 127) and a static range is not the batch's own: values
    # differ by one rounding of the activations, 2**-7 and 2**-4 relative.
    assert (theirs - expected).norm() < (2**-5 if "int8" in scheme else 2**-3) * expected.norm()


def test_the_file_has_the_predicted_size(tmp_path):
    model = llama()
    allocation = allocate(model, MIXES["integers"])
    overhead = sum(tensor.nbytes for name, tensor in model.state_dict().items() if "norm" in name)
    size = (export(model, allocation, tmp_path / "out", to="compressed-tensors") / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    shapes = 16 * sum(not scheme.weight.is_float_copy for scheme in allocation.scheme_of.values())
    assert abs(size - header - shapes - allocation.size - overhead) <= 0.01 * allocation.size


@pytest.mark.parametrize(
    ("layer", "scheme", "message"),
    [
        (Layer("a", "linear", 64, 100), "int4-g64", r"a in int4-g64 \(its rows of 100 .* of 64\).* is int4-channel"),
        (Layer("a", "linear", 64, 128), "nf4-g64", r"a in nf4-g64 \(it has no such scheme\).* supports is int4-g64"),
        (Layer("c", "conv2d", 8, 72), "int8-channel", r"c in int8-channel .*not conv2d.* is (bf16|fp16)"),
        (Layer("e", "embedding", 64, 128, aliases=("h",)), "int4-g128", r"e in int4-g128 .*not embedding"),
        (Layer("a", "linear", 64, 128), "fp8-e5m2", r"a in fp8-e5m2 .* is fp8-e4m3"),
    ],
)
def test_unsupported_formats_are_refused_with_the_nearest(layer, scheme, message, tmp_path):
    from mpq.exporters.holding import check

    with pytest.raises(MpqError, match=message):
        check(CONSUMER, Allocation((layer,), (scheme,)))


def test_fused_layers_in_two_schemes_are_refused(tmp_path):
    model = llama()
    layers = find_layers(model, include="*_proj")
    schemes = tuple("int8-channel" if layer.name.endswith("k_proj") else "int4-g128" for layer in layers)
    with pytest.raises(MpqError, match=r"q_proj and .*k_proj, so they must share a scheme, not int4-g128"):
        export(model, Allocation(layers, schemes), tmp_path / "out", to="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_only_transformers_models():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(MpqError, match="supports transformers models, not Sequential"):
        export(model, Allocation(find_layers(model), ("int4-g32",)), "nowhere", to="compressed-tensors")
