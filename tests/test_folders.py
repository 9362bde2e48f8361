import json

import pytest

import mpq
from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.network.layers import find_layers


def folder_of(name, tmp_path):
    source = mpq.open_source(name, nsamples=4)
    layers = find_layers(source.model)
    allocation = Allocation(layers, ("int4-channel",) * len(layers), provenance={"model": name})
    return str(mpq.export(source.model, allocation, tmp_path / "out", recipe=source.recipe))


def test_eval_reports_reproducibility(tmp_path, capsys):
    folder = folder_of("tiny-lm", tmp_path)
    options = ["--nsamples", "16", "--eval-samples", "4", "--seqlen", "16", "--reproducible", "2"]
    assert main(["eval", folder, *options]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("bfloat16", "layercast", "float32", "Avg_Std@top1_prob", "bit-identical"))
    assert main(["eval", folder, *options, "--json"]) == 0
    spread = {one["precision"]: one["spread"] for one in json.loads(capsys.readouterr().out)["reproducibility"]}
    assert list(spread) == ["bfloat16", "layercast", "float32"]
    assert max(spread["layercast"], spread["float32"]) < 1e-5


def test_reproducibility_needs_a_language_model(tmp_path, capsys):
    folder = folder_of("tiny-cnn", tmp_path)
    assert main(["eval", folder, "--nsamples", "8", "--eval-samples", "8", "--reproducible"]) == 2
    assert "is not a language model" in capsys.readouterr().err


def test_layercast_is_a_public_verb():
    assert mpq.layercast(mpq.open_source("tiny-lm", nsamples=2).model).head.weight.dtype.itemsize == 2
    assert mpq.lowprecision.Recipe("nvfp4").format == "nvfp4"
    with pytest.raises(AttributeError):
        mpq.lowprecision.nothing  # noqa: B018
