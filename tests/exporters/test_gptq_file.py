import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.layer import Layer
from mpq.exporters import export
from mpq.exporters.gptq import gptq_tensors
from mpq.exporters.holding import check
from mpq.exporters.rules import served_names
from mpq.exporters.targets import TARGETS
from mpq.kernels.layout import pack
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.rounding.reference import dequantize, quantize
from tests.sensitivity.small_models import seed_weights


def unpacked(words, bits, along):
    """Unpack AutoGPTQ's layout one value at a time: value i starts at bit i * bits of the words along a dimension."""
    words = words if along == 0 else words.t()
    columns = []
    for column in words.t().tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(column))
        columns.append([stream >> (bits * i) & (2**bits - 1) for i in range(32 * len(column) // bits)])
    numbers = torch.tensor(columns).t()
    return numbers if along == 0 else numbers.t()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from(["g32", "g64", "channel"]), st.integers(1, 2), st.integers(1, 2))
def test_the_documented_formula_matches_our_dequantization(bits, size, rows, cols):
    format = parse_format(f"int{bits}-{size}")
    weight = torch.randn(32 * rows, 64 * cols, generator=seeded(0, rows, cols))
    quantized = quantize(weight, format)
    tensors = gptq_tensors(pack(quantized))
    codes = unpacked(tensors["qweight"], bits, 0)  # (in, out)
    zeros = unpacked(tensors["qzeros"], bits, 1) + 1  # (groups, out), stored less one
    group = tensors["g_idx"].long()
    theirs = tensors["scales"].float()[group] * (codes - zeros[group])
    assert torch.equal(theirs.t(), dequantize(quantized))


def test_dynamic_lists_every_layers_settings(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=64)  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.1)
    layers = find_layers(model)
    schemes = tuple(
        "bf16" if layer.kind == "embedding" or layer.name == "lm_head" else "int8-channel" if "0.mlp" in layer.name
        else "int4-g32" for layer in layers
    )  # fmt: skip
    folder = export(model, Allocation(layers, schemes), tmp_path / "out", to="gptq")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    for layer, scheme in zip(layers, schemes, strict=True):
        rules = [rule for key, rule in quantization["dynamic"].items() if re.match(key[2:], layer.name)]
        skipped = any(key[0] == "-" and re.match(key[2:], layer.name) for key in quantization["dynamic"])
        assert skipped == (layer.name == "lm_head")
        expected = {"int8-channel": [{"bits": 8, "group_size": -1}], "int4-g32": []}
        assert skipped or rules == expected.get(scheme, [])
        served = [name for name in served_names(layer.name) if name != layer.name]
        assert all(
            [rule for key, rule in quantization["dynamic"].items() if re.match(key[2:], name)] == rules
            for name in served
        )
        assert (f"{layer.name}.qweight" in tensors) == (scheme != "bf16")


@pytest.mark.parametrize(
    ("layer", "scheme", "message"),
    [
        (Layer("a", "linear", 64, 64), "int5-g64", r"2, 3, 4 and 8 bits.* is int4-g32"),
        (Layer("a", "linear", 64, 100), "int4-g64", "do not|fill whole"),
        (Layer("a", "linear", 3, 64), "int4-g64", "3 x 64 codes of 4 bits do not fill whole 32-bit words"),
        (Layer("a", "linear", 64, 64), "int4-g64-asym", "symmetric"),
    ],
)
def test_formats_that_the_layout_lacks_are_refused(layer, scheme, message):
    with pytest.raises(MpqError, match=message):
        check(TARGETS["gptq"], Allocation((layer,), (scheme,)))
