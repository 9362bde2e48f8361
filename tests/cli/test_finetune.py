"""`mpq finetune`: from a packed folder to a better one, or one sentence."""

import json
import time

import pytest

import mpq
from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.finetuned_folder import _start
from mpq.folders import open_folder
from mpq.network.layers import find_layers
from mpq.quantized import simulate

FEW = ["--nsamples", "64", "--batch-size", "16", "--eval-samples", "64"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    source = mpq.open_source("tiny-cnn", nsamples=4)
    layers = find_layers(source.model)
    allocation = Allocation(layers, ("int2-channel",) * len(layers), provenance={"model": "tiny-cnn"})
    folder = tmp_path_factory.mktemp("packed") / "out"
    return mpq.export(source.model, allocation, folder, recipe=source.recipe, method="mse")


def test_a_folder_is_fine_tuned_into_a_better_one(packed, tmp_path, capsys):
    out = tmp_path / "better"
    assert main(["finetune", str(packed), "--steps", "20", "--lr", "1e-3", *FEW, "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kept"]
    assert facts["harm_after"] < 0.5 * facts["harm_before"]
    assert facts["after"] > facts["before"]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["rounding"] == "mse, trained"
    assert not (tmp_path / "better.unfinished").exists()
    assert main(["eval", str(out), "--nsamples", "4", "--eval-samples", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quality"] == pytest.approx(facts["after"])
    again = tmp_path / "again"  # a fine-tuned folder can be fine-tuned again
    assert main(["finetune", str(out), "--steps", "1", "--lr", "1e-9", *FEW, "-o", str(again)]) == 0
    said = capsys.readouterr().out
    assert "original  accuracy" in said
    assert "harm on acceptance data" in said


def test_training_starts_from_the_folders_codes(packed):
    model, source, allocation, _ = open_folder(packed, nsamples=4)
    rounder, start = _start(model, source.model, allocation, "mse")
    inputs = source.evaluation[0][0]
    student = simulate(start, allocation, rounder, learned=True).eval()
    for layer in allocation.layers:
        numbers = model.get_submodule(layer.name).weight.dequantize()
        assert (student.get_submodule(layer.name).weight.flatten(1) == numbers.flatten(1)).all()
    assert (student(inputs) - model(inputs)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a packed model"),
        (["PACKED", "--steps", "0"], "at least 1"),
        (["PACKED", "--lr", "nan"], "invalid lr"),
        (["PACKED", "--kl", "0"], "one of them positive"),
        (["PACKED", "--dataset", "missing.txt"], "no such file: missing.txt"),
        (["PACKED", "-o", "PACKED"], "its own source"),
    ],
)
def test_invalid_arguments_are_reported_before_any_work(packed, arguments, message, capsys):
    begun = time.monotonic()
    assert main(["finetune", *(argument.replace("PACKED", str(packed)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert time.monotonic() - begun < 5
