"""Allocations of other tools: read from every kind of file, measured as by hand, compared with ours of equal size."""

import json
import math

import pytest

from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.evaluation import Reference
from mpq.exporters.configurations import TOOLS, tool_of, write_configuration
from mpq.exporters.holding import FLOAT
from mpq.judge_files import judge_files, read_contestant
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from mpq.sensitivity.profile import profile
from mpq.sources import open_source

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int8-channel", "bf16")
LLAMA = tuple(Layer(f"model.layers.{i}.mlp.{name}_proj", "linear", 64, 256) for i in (0, 1) for name in ("up", "down"))


@pytest.fixture(scope="module")
def source():
    return open_source("tiny-lm", nsamples=4, seqlen=64, batch_size=4, evaluation_samples=4)


@pytest.fixture(scope="module")
def table(source):
    return profile(source.model, source.calibration, source.loss_fn, FORMATS, metric="fisher", progress=False)


def mixed(layers):
    """A hand-made allocation: outer blocks in eight bits, the others in three; ties kept."""
    return Allocation(
        layers,
        tuple(
            FLOAT if layer.kind == "embedding" else "int8-channel" if ".0." in layer.name else "int3-g64"
            for layer in layers
        ),
    )


@pytest.mark.parametrize("tool", ["modelopt", "gptqmodel", "llm-compressor"])
def test_an_allocation_of_another_tool_is_measured_beside_ours(tool, source, table, tmp_path):
    theirs = mixed(find_layers(source.model))
    file = tmp_path / "file"
    file.write_text(write_configuration(tool, theirs))
    original, measured, ours = judge_files(source, [str(file)], table=table, method="mse", progress=False)
    assert measured.allocation.schemes == theirs.schemes
    by_hand = Reference(source.model, source.evaluation, source.kind, source.loss_fn).measure(
        simulate(source.model, theirs, trainable=False)
    )
    assert measured.quality.loss == pytest.approx(by_hand.loss, rel=1e-6)
    assert measured.increase == pytest.approx(by_hand.loss - original.quality.loss, abs=1e-6)
    assert ours.size <= measured.size
    assert measured.allocation.loss > ours.allocation.loss
    assert ours.allocation.scheme_of["embed"].name == FLOAT


@pytest.mark.parametrize("tool", TOOLS)
def test_files_are_recognized(tool, tmp_path):
    scheme = "q4_k" if tool == "llama-quantize" else "int4-g64"
    text = write_configuration(tool, Allocation(LLAMA, (scheme, FLOAT, scheme, FLOAT)))
    assert tool_of(text) == tool
    (tmp_path / "file").write_text(text)
    for file in (tmp_path / "file", f"{tool}={tmp_path / 'file'}"):
        found = read_contestant(str(file), LLAMA)
        assert found.holder.name == tool
        assert [name == FLOAT for name in found.allocation.schemes] == [False, True, False, True]


@pytest.mark.parametrize(("tool", "extra"), [("gptqmodel", {"quant_method": "gptq"}), ("llm-compressor", {})])
def test_the_config_of_a_quantized_checkpoint_is_read(tool, extra, tmp_path):
    import yaml

    config = yaml.safe_load(write_configuration(tool, Allocation(LLAMA, ("int4-g64", FLOAT, "int8-channel", FLOAT))))
    if tool == "llm-compressor":
        config = config["quant_stage"]["quant_modifiers"]["GPTQModifier"]
        for group in config["config_groups"].values():  # as written in a checkpoint
            group["weights"] |= {"dynamic": False, "observer": "minmax", "actorder": None}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "quantization_config": {**config, **extra}}))
    assert read_contestant(str(file), LLAMA).allocation.schemes == ("int4-g64", FLOAT, "int8-channel", FLOAT)


def test_the_types_of_a_gguf_file_are_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kinds = (gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K)
    for name, kind in zip(("blk.0.ffn_up.weight", "blk.1.ffn_down.weight"), kinds, strict=True):
        data = gguf.quants.GGML_QUANT_SIZES[kind][1] * 64
        writer.add_tensor(name, np.zeros((64, data // 64), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_contestant(str(tmp_path / "m.gguf"), LLAMA)
    assert found.allocation.schemes == ("q4_k", FLOAT, FLOAT, "q6_k")


def test_allocations_are_read_and_other_files_refused(tmp_path):
    mine = Allocation(LLAMA[:2], ("nf4-g64", "int4-g64"))
    mine.save(tmp_path / "allocation.json")
    assert read_contestant(str(tmp_path / "allocation.json"), LLAMA).allocation.schemes[2:] == (FLOAT, FLOAT)
    (tmp_path / "note").write_text("no configuration at all")
    with pytest.raises(MpqError, match=r"no configuration of modelopt.* is recognized: name the quantizer"):
        read_contestant(str(tmp_path / "note"), LLAMA)
    with pytest.raises(MpqError, match="none of the layers"):
        read_contestant(str(tmp_path / "allocation.json"), (Layer("other", "linear", 4, 4),))


def test_the_command_line_prints_both(source, table, tmp_path, capsys):
    (tmp_path / "file").write_text(write_configuration("modelopt", mixed(find_layers(source.model))))
    table.save(tmp_path / "table.csv")
    few = ["--nsamples", "4", "--seqlen", "64", "--eval-samples", "4", "--table", str(tmp_path / "table.csv")]
    job = ["judge", "tiny-lm", *few, "--config", str(tmp_path / "file")]
    assert main([*job, "--json"]) == 0
    _, theirs, ours = json.loads(capsys.readouterr().out)["measured"]
    assert ours["bytes"] <= theirs["bytes"]
    assert not math.isnan(theirs["divergence"])
    assert main([*job, str(tmp_path / "none.json")]) == 2
    assert "cannot read the configuration" in capsys.readouterr().err
