"""Files name models and data; code that a file names runs only with --trust."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.exporters import export
from mpq.folders import evaluate_folder
from mpq.models import bundled_model
from mpq.network.layers import find_layers
from mpq.sources import open_source

MARK = "called.txt"
CODE = f"open({MARK!r}, 'w').close()\ndef make():\n    raise RuntimeError('called')\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a module that creates a file when it is imported."""
    (tmp_path / "intruder.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "intruder", raising=False)
    return tmp_path


def folder_naming(folder: Path, **provenance: object) -> Path:
    model = bundled_model("tiny-cnn")
    layers = find_layers(model)
    allocation = Allocation(layers, ("int8-channel",) * len(layers), provenance=provenance)
    return export(model, allocation, folder, recipe={"kind": "bundled", "name": "tiny-cnn"})


def table_naming(path: Path, **provenance: object) -> Path:
    layers = find_layers(bundled_model("tiny-cnn"))
    scores = np.tile([1.0, 0.1], (len(layers), 1))
    schemes = ("int4-channel", "int8-channel")
    SensitivityTable(layers, schemes, scores, 0 * scores, "fisher", provenance).save(path)
    return path


HOSTILE = [{"model": "intruder:make"}, {"model": "tiny-cnn", "dataset": "intruder:make"}]


@pytest.mark.parametrize("provenance", HOSTILE)
@pytest.mark.parametrize("command", ["eval", "generate", "allocate"])
def test_names_in_files_are_imported_only_with_trust(command, provenance, here, capsys):
    if command == "allocate":
        table = table_naming(here / "table.csv", **provenance)
        arguments = ["allocate", str(table), "--bits", "6", "--by", "evolution", "--trials", "1"]
    else:
        extra = ["--prompt", "a"] if command == "generate" else []
        arguments = [command, str(folder_naming(here / "out", **provenance)), *extra]
    assert main(arguments) == 2
    assert not (here / MARK).exists()
    if command != "generate" or provenance["model"] != "tiny-cnn":
        assert "asks to import and call intruder:make" in capsys.readouterr().err
        with pytest.raises(RuntimeError, match="called"):
            main([*arguments, "--trust"])
        assert (here / MARK).exists()


def test_a_factory_on_the_command_line_needs_no_trust(tmp_path):
    names = ["sources.some_models:classifier", "--dataset", "sources.some_models:labelled"]
    options = ["--bits", "6", "--formats", "int4-channel,int8-channel", "--metric", "proxy:size", "--effort", "fast"]
    assert main(["-q", "quantize", *names, *options, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_names_on_the_command_line_need_no_trust(here):
    with pytest.raises(RuntimeError, match="called"):
        open_source("intruder:make")
    folder = folder_naming(here / "out", model="tiny-cnn", dataset="intruder:make")
    assert evaluate_folder(folder, "digits", nsamples=16)[0].value > 0.5


def test_names_that_are_not_text_are_refused(here, capsys):
    assert main(["eval", str(folder_naming(here / "out", model=["tiny-cnn"]))]) == 2
    assert "invalid name ['tiny-cnn'] of a model or data" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["eval"], ["generate", "--prompt", "a"], ["plot"]])
def test_an_altered_allocation_is_refused(command, here, capsys):
    path = folder_naming(here / "out", model="tiny-cnn") / "allocation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 0.125}))
    table_naming(here / "out" / "table.csv")
    assert main([command[0], str(here / "out"), *command[1:]]) == 2
    assert "allocation.json is not as it was exported" in capsys.readouterr().err


def test_transformers_refuses_an_altered_allocation(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("mpq.integrations.transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    layers = find_layers(model)
    folder = export(model, Allocation(layers, ("int8-channel",) * len(layers)), tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    replace(Allocation.load(folder / "allocation.json"), loss=1.0).save(folder / "allocation.json")
    with pytest.raises(MpqError, match=r"allocation.json is not as it was exported"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
