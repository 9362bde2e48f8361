"""Allocations that a target does not support: solved again under its rules, measured, or refused."""

import json

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.table import SensitivityTable
from mpq.exporters.holding import check
from mpq.exporters.targets import TARGETS
from mpq.models import bundled_model
from mpq.network.layers import find_layers
from mpq.resolving import held_or_resolved, table_beside
from mpq.search import frontier_of
from tests.sensitivity.small_models import seed_weights

FORMATS = ("int2-g32", "int3-g32", "int4-g32", "int8-g32")
LAYERS = (Layer("embed", "embedding", 96, 64), *(Layer(f"layer{i}", "linear", 64, 64) for i in range(6)))


def table_of(layers):
    losses = np.outer(np.arange(1, len(layers) + 1), [1.0, 0.3, 0.1, 0.001])
    return SensitivityTable(layers, FORMATS, losses, losses * 0.01, "kl-curvature", {"overhead": 128})


def test_the_budget_is_kept_beside_what_stays_in_floating_point():
    table = table_of(LAYERS)
    before = frontier_of(table).at(bits=5)
    resolved = held_or_resolved(TARGETS["vllm:cpu"], before, table)
    check(TARGETS["vllm:cpu"], resolved.allocation)
    assert resolved.floats == 1
    assert resolved.allocation.scheme_of["embed"].name == "bf16"
    linear = [Allocation(LAYERS[1:], one.schemes[1:]).size for one in (before, resolved.allocation)]
    assert linear[1] <= linear[0]
    assert "vllm:cpu does not support layer embed in" in resolved.sentence()
    assert f"of {len(LAYERS)} layers have other formats, 1 of them in floating point" in resolved.sentence()
    assert resolved.allocation.loss > before.loss


def test_solving_again_is_optimal_at_the_same_bytes():
    layers = LAYERS[1:]
    table = table_of(layers)
    before = Allocation(layers, ("int8-g32", "int3-g32") * 3)
    resolved = held_or_resolved(TARGETS["gguf"], before, table).allocation  # gguf has no type for int2 and int3
    assert resolved.schemes == frontier_of(table, forbid={"*": ("int2-*", "int3-*")}).at(cost=before.size).schemes


def test_supported_allocations_are_kept_and_strict_refuses_others():
    four = Allocation(LAYERS[1:], ("int4-g32",) * 6)
    assert held_or_resolved(TARGETS["gguf"], four, table_of(LAYERS[1:])) is None
    three = Allocation(LAYERS[1:], ("int3-g32",) * 6)
    with pytest.raises(MpqError, match=r"gguf does not support layer layer0 in int3-g32 .*nearest"):
        held_or_resolved(TARGETS["gguf"], three, table_of(LAYERS[1:]), strict=True)
    with pytest.raises(MpqError, match=r"name the table .*--table"):
        held_or_resolved(TARGETS["gguf"], three, None)
    with pytest.raises(MpqError, match=r"nor any format of its table: quantize with --for mlx"):
        held_or_resolved(TARGETS["mlx"], three, table_of(LAYERS[1:]))
    with pytest.raises(MpqError, match="its table has other layers"):
        held_or_resolved(TARGETS["gguf"], three, table_of(LAYERS))
    nearest = held_or_resolved(TARGETS["gguf"], three, table_of(LAYERS[1:]))
    assert set(nearest.allocation.schemes) == {"int4-g32"}
    assert "4.500 bits instead of 3.500" in nearest.sentence()


def test_the_command_line_solves_again_and_measures(tmp_path, capsys):
    pytest.importorskip("gguf")
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.1)
    model.save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "tokens.npz", input_ids=np.random.default_rng(0).integers(0, 512, (10, 32)))
    table_of(find_layers(model)).save(tmp_path / "table.csv")
    chosen, data = tmp_path / "a.json", ["--dataset", str(tmp_path / "tokens.npz"), "--nsamples", "4"]
    assert main(["allocate", str(tmp_path / "table.csv"), "--bits", "5", "-o", str(chosen)]) == 0
    assert table_beside(Allocation.load(chosen), chosen).schemes == FORMATS
    job = ["export", str(tmp_path / "model"), str(chosen), "--to", "gguf", *data, "-o"]
    assert main([*job, str(tmp_path / "strict"), "--strict"]) == 2
    assert "gguf does not support layer" in capsys.readouterr().err
    assert not (tmp_path / "strict").exists()
    assert main([*job, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "Solved again from the table" in said
    assert "Measured on unseen data: perplexity" in said
    written = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert written["provenance"]["solved_for"] == "gguf"
    page = (tmp_path / "out" / "README.md").read_text()
    assert "llama-cli -m ./model.gguf" in page
    assert "| before it was solved again |" in page
    assert "| mpq, simulated |" in page
    assert "Solved again from the table" in page
    assert "report.html" not in page


def test_an_unmeasured_export_is_marked(tmp_path, capsys):
    layers = find_layers(bundled_model("tiny-cnn"))
    allocation = Allocation(layers, ("int8-channel",) * len(layers))
    allocation.save(tmp_path / "a.json")
    job = ["export", "tiny-cnn", str(tmp_path / "a.json"), "-o", str(tmp_path / "out"), "--method", "nearest"]
    assert main([*job, "--no-measure"]) == 0
    page = (tmp_path / "out" / "README.md").read_text()
    assert "was not measured" in page
    assert "| original |" not in page
    assert "was not measured" in capsys.readouterr().out
    assert main([*job, "--force"]) == 0
    assert "| original |" in (tmp_path / "out" / "README.md").read_text()
