"""Allocations for other quantizers and targets, from the command line."""

import json

import numpy as np
import pytest

from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.core.layer import Layer
from mpq.core.table import SensitivityTable
from mpq.exporters.configurations import read_configuration

LAYERS = (
    Layer("model.embed_tokens", "embedding", 64, 128),
    *(Layer(f"model.layers.{i}.{name}", "linear", 128, 128, tie=tie) for i in range(4)
      for name, tie in (("self_attn.q_proj", f"{i}.qkv"), ("self_attn.k_proj", f"{i}.qkv"), ("mlp.down_proj", ""))),
)  # fmt: skip
SCHEMES = ("int2-g64", "int4-g64", "int8-channel", "nf4-g64")


@pytest.fixture
def table(tmp_path):
    scores = np.random.default_rng(0).uniform(0.5, 2, (len(LAYERS), 1)) * np.array([[1.0, 0.1, 0.001, 0.01]])
    found = SensitivityTable(LAYERS, SCHEMES, scores, scores / 10, "made up", {"overhead": 1000})
    found.save(tmp_path / "table.csv")
    return str(tmp_path / "table.csv")


@pytest.mark.parametrize(
    "tool", ["modelopt", "llm-compressor", "autoround", "gptqmodel", "llama-quantize", "mlx"]
)  # fmt: skip
def test_an_allocation_is_written_as_another_quantizers_configuration(tool, table, tmp_path, capsys):
    job = ["allocate", table, "--bits", "8"]
    if tool == "llama-quantize":
        found = SensitivityTable.load(table)
        renamed = SensitivityTable(LAYERS, ("q4_1", "iq4_nl", "int8-g32"), found.scores[:, :3], found.errors[:, :3], "")
        renamed.save(table)
    assert main([*job, "--emit", tool]) == 0
    text, words = capsys.readouterr()
    assert "nf4" not in text
    assert "bits per weight" in words
    chosen, file = tmp_path / "allocation.json", tmp_path / "file"
    assert main([*job, "--emit", f"{tool}={file}", "-o", str(chosen)]) == 0
    assert file.read_text() == text
    allocation, again = Allocation.load(chosen), read_configuration(tool, text, LAYERS)
    assert again.bits == pytest.approx(allocation.bits, abs=0.3)  # mlx has a 16-bit minimum in every group
    if tool not in ("llama-quantize", "mlx"):
        assert again.schemes == allocation.schemes
        assert allocation.scheme_of["model.embed_tokens"].name == "bf16"


def test_a_target_restricts_the_search_and_reports_it(table, capsys):
    assert main(["allocate", table, "--bits", "8", "--for", "vllm", "--no-ties", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bits"] <= 8
    assert "nf4-g64" not in facts["schemes"].values()
    assert facts["schemes"][LAYERS[1].name] == facts["schemes"][LAYERS[2].name]
    assert main(["allocate", table, "--bits", "8", "--target", "vllm"]) == 0
    assert "vllm supports model.embed_tokens in none of the formats" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--bits", "2.3", "--for", "vllm"],
            "for vllm, 2.8 bits (vllm supports model.embed",
        ),
        (["--bits", "5", "--for", "vlm"], "unknown export target 'vlm': did you mean vllm"),
        (["--bits", "5", "--emit", "gptq"], "unknown quantizer 'gptq': did you mean gptqmodel"),
        (["--bits", "5", "--for", "vllm:cpu", "--emit", "mlx", "--pin", "*=int2-g64"], "no scheme is left"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(table, arguments, message, capsys):
    assert main(["allocate", table, *arguments]) == 2
    assert message in capsys.readouterr().err
