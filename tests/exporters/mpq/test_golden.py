"""Checkpoint versions: earlier ones stay loadable, and none changes without a new version number."""

import json

import pytest
import torch
from safetensors import safe_open

from mpq.exporters.mpq.checkpoint import VERSION, load
from tests.golden.make import HOME, cases, found, written

GOLDEN = sorted(folder.relative_to(HOME) for folder in HOME.glob("v*/*") if folder.is_dir())
CLOSE = 1e-3  # compiled kernels give activations about 15 bits of the largest
BUMP = "the checkpoint's content changed: raise VERSION, keep reading the old one, and run python -m tests.golden.make"


@pytest.mark.parametrize("golden", GOLDEN, ids=str)
def test_golden_checkpoints_of_every_version_stay_loadable(golden):
    inputs = cases()[golden.name][2]
    expected = json.loads((HOME / golden.parent / f"{golden.name}.json").read_text())
    actual = found(load(HOME / golden, trust=True), inputs)
    assert actual["numbers"] == expected["numbers"]
    outputs, wanted = torch.tensor(actual["outputs"]), torch.tensor(expected["outputs"])
    assert (outputs - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize("name", list(cases()))
def test_output_changes_only_with_the_version(name, tmp_path):
    golden = HOME / f"v{VERSION}" / name
    assert golden.is_dir(), "run python -m tests.golden.make"
    folder = written(name, tmp_path / "out")
    assert contents(folder / "model.safetensors") == contents(golden / "model.safetensors"), BUMP
    ours, theirs = (json.loads((one / "config.json").read_text()) for one in (folder, golden))
    assert ours["quantization_config"] == theirs["quantization_config"], BUMP
    assert ours.get("recipe") == theirs.get("recipe")
    sums = [json.loads((one / "checksums.json").read_text()) for one in (folder, golden)]
    assert sums[0].keys() == sums[1].keys(), BUMP
    assert sums[0]["model.safetensors"] == sums[1]["model.safetensors"], BUMP


def contents(file):
    """Every tensor's dtype, shape and bytes, and the file's metadata."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        note = opened.metadata()
    return note, {name: (str(one.dtype), one.shape, one.view(torch.uint8).tolist()) if one.ndim else (one.item(),)
                  for name, one in tensors.items()}  # fmt: skip
