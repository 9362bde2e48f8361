"""Every tool's file is read back as written, by our reader and, if the tool is installed, by its own rules."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters.configurations import (
    TOOLS,
    read_configuration,
    tool_named,
    write_configuration,
)
from mpq.exporters.holding import restrict, unscored

NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = tuple(Layer(f"model.layers.{i}.{name}", "linear", 64, 1024) for i in (0, 1, 10) for name in NAMES)
SCHEMES = (
    "int2-g64", "int3-g64", "int4-g32", "int4-g128", "int4-g64-asym", "int8-channel", "int8-g32", "mxfp4", "nvfp4",
    "fp8-e4m3", "fp8-e4m3-channel", "q4_k", "q6_k", "iq4_nl", "bf16",
)  # fmt: skip


def held(tool):
    return [name for name in SCHEMES if not tool_named(tool).refusal(LAYERS[0], parse_scheme(name))]


@pytest.mark.parametrize("tool", TOOLS)
@settings(deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(tool, data):
    choices = st.sampled_from([name for name in held(tool) if tool != "mlx" or not name.endswith("-g32")])
    schemes = data.draw(st.lists(choices, min_size=len(LAYERS), max_size=len(LAYERS)))
    if set(schemes) == {"bf16"}:
        return
    allocation = Allocation(LAYERS, tuple(schemes))
    again = read_configuration(tool, write_configuration(tool, allocation), LAYERS)
    spelled = [tool_named(tool).spell(parse_scheme(name).weight) for name in again.schemes if name != "bf16"]
    wanted = [tool_named(tool).spell(parse_scheme(name).weight) for name in schemes if name != "bf16"]
    assert spelled == wanted
    assert [name == "bf16" for name in again.schemes] == [name == "bf16" for name in schemes]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_supports_integers_and_floats(tool):
    assert "bf16" in held(tool)
    assert len(held(tool)) > 3


def test_a_later_entry_of_modelopt_wins_and_wildcards_match():
    text = yaml.safe_dump({
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}},
            {"quantizer_name": "*o_proj*", "cfg": {"num_bits": 8, "axis": 0}},
            {"quantizer_name": "*layers.10.*", "enable": False},
        ]
    })  # fmt: skip
    found = read_configuration("modelopt", text, LAYERS).scheme_of
    assert found["model.layers.0.mlp.up_proj"].name == "int4-g128"
    assert found["model.layers.1.self_attn.o_proj"].name == "int8-channel"
    assert found["model.layers.10.self_attn.o_proj"].name == "bf16"


def test_brackets_in_names_are_escaped_for_modelopt():
    layers = tuple(Layer(name, "linear", 64, 128) for name in ("experts0", "experts[0]", "a*"))
    allocation = Allocation(layers, ("int4-g64", "int8-channel", "int4-g64"))
    text = write_configuration("modelopt", allocation)
    assert read_configuration("modelopt", text, layers).schemes == allocation.schemes


def test_lines_for_llama_quantize_name_one_tensor_each():
    allocation = Allocation(LAYERS, ("q4_k",) * len(LAYERS))
    lines = write_configuration("llama-quantize", allocation).splitlines()
    assert lines[0] == r"^blk\.0\.attn_q\.weight$=q4_k"
    mixed = read_configuration("llama-quantize", lines[4], LAYERS)
    assert [layer.name for layer, name in zip(LAYERS, mixed.schemes, strict=True) if name == "q4_k"] == [LAYERS[4].name]


def test_targets_of_llm_compressor_may_be_expressions():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["re:.*proj$"], "weights": weights}
    modifier = {"ignore": ["re:.*layers.10"], "config_groups": {"group_0": group}}
    text = yaml.safe_dump({"stage": {"modifiers": {"QuantizationModifier": modifier}}})
    schemes = read_configuration("llm-compressor", text, LAYERS).schemes
    assert schemes == ("int4-g128",) * 8 + ("bf16",) * 4


def test_unsupported_formats_are_reported():
    allocation = Allocation(LAYERS[:1], ("nf4-g64",))
    with pytest.raises(MpqError, match=r"gptqmodel does not support layer model\.layers\.0\S* in nf4-g64 .* is int4-g"):
        write_configuration("gptqmodel", allocation)
    held = restrict(unscored(LAYERS[:1], ["nf4-g64", "int4-g64"]), TOOLS["gptqmodel"])
    assert held.forbid == {LAYERS[0].name: ("nf4-g64",)}
    assert "left in floating point" in restrict(unscored(LAYERS[:1], ["nf4-g64"]), TOOLS["gptqmodel"]).sentence
    with pytest.raises(MpqError, match=r"unknown quantizer 'model-opt'.*modelopt"):
        tool_named("model-opt")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("text", ["", "[", "{}", "[1, 2]", "a: b: c", '{"quant_cfg": 3}'])
def test_damaged_files_give_one_sentence(tool, text):
    with pytest.raises(MpqError):
        read_configuration(tool, text, LAYERS)


def test_fused_layer_names_are_written_too():
    layers = tuple(Layer(f"m.{name}_proj", "linear", 64, 128, tie="m.qkv") for name in ("q", "k", "v"))
    others = (*LAYERS[1:4], *LAYERS[5:8])
    text = write_configuration("gptqmodel", Allocation((*layers, *others), ("int8-g64",) * 3 + ("int4-g64",) * 6))
    assert r"+:^m\.qkv_proj$" in yaml.safe_load(text)["dynamic"]
