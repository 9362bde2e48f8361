import numpy as np
import pytest

from mpq.core import consumers
from mpq.core.allocation import Allocation
from mpq.core.consumers import Consumer
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.problem import build_problem
from mpq.core.registry import Target
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable
from mpq.exporters import exporter_named
from mpq.exporters.holding import check, nearest, restrict, unscored, warn_about_versions
from mpq.exporters.targets import TARGETS, formats_of

LINEAR = Layer("a", "linear", 64, 256)
CONV = Layer("c", "conv2d", 64, 72)
EMBEDDING = Layer("embed", "embedding", 256, 64)


def test_every_target_has_a_writer():
    assert all(callable(TARGETS.named(name).load()) for name in TARGETS)
    with pytest.raises(MpqError, match="unknown export target 'gguff': did you mean gguf"):
        exporter_named("gguff")
    assert TARGETS.named("vllm:cpu").command == "vllm serve {folder}"


@pytest.mark.parametrize("target", [target for target in TARGETS.values() if target.schemes], ids=lambda it: it.name)
def test_every_target_supports_its_well_known_schemes(target):
    assert not [name for name in target.schemes if target.objection(LINEAR, parse_scheme(name))]
    assert all(parse_scheme(name).name == name for name in target.schemes)
    check(target, Allocation((LINEAR,), (nearest(target, LINEAR, parse_scheme("int5-g99")),)))


def test_a_program_may_support_fewer_formats_than_its_file():
    three = Allocation((LINEAR,), ("int3-g64",))
    check(TARGETS["vllm"], three)
    with pytest.raises(MpqError, match=r"vllm:cpu does not support layer a in int3-g64 .*4-bit.* is int4"):
        check(TARGETS["vllm:cpu"], three)
    with pytest.raises(
        MpqError, match=r"transformers does not support layer a in int4-g128-asym .*zero points.* is int4-g128"
    ):
        check(TARGETS["transformers"], Allocation((LINEAR,), ("int4-g128-asym",)))
    with pytest.raises(
        MpqError, match=r"openvino does not support layer a in int4-g96 .*blocks must divide rows.* 256"
    ):
        check(TARGETS["openvino"], Allocation((LINEAR,), ("int4-g96",)))
    with pytest.raises(MpqError, match=r"openvino does not support layer a in int2-g32 .*no 2-bit"):
        check(TARGETS["openvino"], Allocation((LINEAR,), ("int2-g32",)))


@pytest.mark.parametrize(
    ("scheme", "cols", "instead"),
    [("q4_k", 640, "int5-g32"), ("q2_k", 640, "iq4_nl"), ("q6_k", 172, "fp16"), ("int4-g32", 1, "fp16")],
)
def test_llama_cpps_own_fallback_is_named(scheme, cols, instead):
    """As llama.cpp's quantizer: Q4_K becomes Q5_0, Q2_K IQ4_NL, Q6_K Q8_0, and F16 where rows do not divide by 32."""
    layer = Layer("down", "linear", 1, cols)
    with pytest.raises(MpqError, match=f"does not support layer down in {scheme} .*{cols} .*: .* is {instead}"):
        check(TARGETS["gguf"], Allocation((layer,), (scheme,)))
    assert restrict(unscored((layer, LINEAR), (scheme, "fp16")), TARGETS["gguf"]).forbid == {"down": (scheme,)}


def test_searches_are_restricted_to_supported_formats():
    table = unscored((LINEAR, CONV), ("int4-g128", "int3-g64", "nf4-g64", "fp16"))
    held = restrict(table, TARGETS["gptq"])
    assert held.forbid == {"a": ("nf4-g64",), "c": ("int4-g128", "int3-g64", "nf4-g64")}
    assert held.sentence.startswith("gptq supports c in none of the formats")
    assert restrict(unscored((LINEAR,), ("int4-g128", "fp16")), TARGETS["gptq"]).sentence == ""
    assert restrict(table, TARGETS["mpq"]).forbid == {}


def test_layers_without_a_supported_format_stay_in_bf16_with_a_report():
    table = SensitivityTable((EMBEDDING, LINEAR), ("int4-g64",), [[1.0], [2.0]], [[0.1], [0.1]], "x")
    held = restrict(table, TARGETS["vllm"])
    assert held.sentence.startswith("vllm supports embed in none of the formats (it quantizes linear layers")
    problem = build_problem(held.table, forbid=held.forbid)
    assert np.isfinite(problem.losses).tolist() == [[False, True], [True, False]]
    assert problem.allocation([1, 0]).loss == 2.0
    bits = problem.allocation([1, 0]).bits
    held.check_budget(bits=bits)
    with pytest.raises(MpqError, match=r"10 bits is below .* for vllm, 10\.125 bits .*: raise it, or exclude embed"):
        held.check_budget(bits=10)
    with pytest.raises(MpqError, match=r"40,000 bytes is below .* for vllm, 41,472 bytes"):
        held.check_budget(size=40_000)


def test_layers_tied_to_an_unsupported_one_stay_in_bf16():
    layers = tuple(Layer(name, "linear", 64, cols, tie="qkv") for name, cols in (("q", 64), ("k", 60)))
    held = restrict(unscored((*layers, LINEAR), ("int4-g64",)), TARGETS["vllm"])
    problem = build_problem(held.table, forbid=held.forbid)
    assert problem.uniform() == ()
    assert problem.allocation([1, 0]).schemes == ("bf16", "bf16", "int4-g64")
    check(TARGETS["vllm"], problem.allocation([1, 0]))


def test_layers_without_evidence_are_restricted_to_supported_formats():
    layers = (EMBEDDING, LINEAR, Layer("b", "linear", 64, 256))
    reasons = {"embed": "?", "b": "?"}
    scores = [[np.nan, np.nan], [1.0, 0.5], [np.nan, np.nan]]
    table = SensitivityTable(layers, ("int4-g64", "nf4-g64"), scores, np.zeros((3, 2)), "x", {}, reasons)
    held = restrict(table, TARGETS["vllm"])
    problem = build_problem(held.table, forbid=held.forbid)
    assert np.isfinite(problem.losses).tolist() == [[False, False, True], [True, False, False], [True, False, False]]


def test_a_plugin_may_be_a_function_without_rules():
    plugin = Target("mine", lambda *_, **__: None)
    check(plugin, Allocation((CONV,), ("nf4-g64",)))
    assert restrict(unscored((CONV,), ("nf4-g64",)), plugin).forbid == {}


def test_mixes_are_supported_by_our_checkpoint_only():
    layer, names = Layer("l", "linear", 64, 256), ("int4-g64", "int2-g64/int4-g64@3")
    for name, target in TARGETS.items():
        held = restrict(unscored((layer,), names), target)
        assert ("int2-g64/int4-g64@3" in held.forbid.get("l", ())) == (name != "mpq")
        if name != "mpq":
            with pytest.raises(MpqError, match="one format"):
                check(target, Allocation((layer,), names[1:]))


@pytest.mark.parametrize(("number", "warns"), [("1.0", True), ("0.32.7", False), ("0.33", False), ("0.31.9", True)])
def test_an_unmeasured_version_is_reported(number, warns, monkeypatch, caplog):
    monkeypatch.setattr(consumers, "version", lambda package: number)
    target = Target("mine", print, consumers=(Consumer("Mine", ("mine",), "0.32", "0.33", ""),))
    warn_about_versions(target)
    assert [f"Mine {number} is installed, while its rules here were measured with 0.32 to 0.33" in caplog.text] == [
        warns
    ]


def test_a_program_that_is_not_installed_is_not_reported(caplog):
    warn_about_versions(Target("mine", print, consumers=(Consumer("Mine", ("no-such-package",), "1", "2", ""),)))
    assert not caplog.text


def test_default_candidates_round_activations_only_where_weight_only_is_unsupported():
    assert "int8-channel+a:int8-token" in formats_of(TARGETS["vllm:cpu"])
    assert not [name for name in formats_of(TARGETS["vllm"]) if "+a:" in name]
    assert "nvfp4+a:fp4-e2m1-g16-se4m3" not in formats_of(TARGETS["modelopt"])
    assert "fp8-e4m3-channel+a:fp8-e4m3-token" in formats_of(TARGETS["modelopt"])
