"""Block choices by device, tuning and timing, in the interpreter."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.kernels.gpu.triton.config import Config, default_config
from mpq.kernels.gpu.triton.linear import EMULATE
from mpq.kernels.gpu.triton.spec import spec_of
from mpq.kernels.gpu.triton.tables import bucket, config_for, provenance_of, table_of, tuned_path
from mpq.kernels.gpu.triton.tune import candidates, tune

DEVICE = torch.device("cpu" if EMULATE else "cuda")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table_of.cache_clear()
    config_for.cache_clear()


def test_batches_share_buckets() -> None:
    assert [bucket(tokens) for tokens in (1, 2, 3, 16, 17, 512, 4000)] == [1, 2, 4, 16, 32, 512, 512]


def test_tuned_choices_are_kept_and_used() -> None:
    choices = [Config(block_k=64), Config(block_k=32, split=2)]
    best = tune("int4-g64", 64, 128, 3, DEVICE, choices)
    assert best in choices
    assert config_for("int4-g64", "", 4, 64, 128, DEVICE) == best  # 3 and 4 tokens share a bucket
    unknown = config_for("int4-g64", "", 4, 64, 192, DEVICE)
    assert unknown.split == default_config(spec_of(parse_format("int4-g64")), 4, 64, 192, 1).split
    if EMULATE:
        assert json.loads(tuned_path("interpreter").read_text())["tuned"] is True


def test_the_shipped_table_is_marked_untuned() -> None:
    table = json.loads((files("mpq.kernels.gpu.triton") / "NVIDIA_H100_80GB_HBM3.json").read_text())
    assert table["tuned"] is False
    assert len(table_of("NVIDIA H100 80GB HBM3")) == len(table["configs"]) > 0


@pytest.mark.parametrize("name", ["int4-g128", "int4-g32", "nvfp4", "int8-channel"])
def test_candidates_keep_groups_whole(name: str) -> None:
    format = parse_format(name)
    found = candidates(format, 16, 4096, 4096, 132)
    assert len(set(found)) == len(found) > 5
    if format.group_size >= 32:
        assert all(format.group_size % config.block_k == 0 for config in found if config.backend == "triton")


def test_products_of_rounded_inputs_are_tuned_too() -> None:
    choices = [Config(block_k=32), Config(block_k=64)]
    best = tune("int4-g64+a:int8-token", 64, 128, 3, DEVICE, choices)
    assert config_for("int4-g64", "int8-channel", 3, 64, 128, DEVICE) == best
    with pytest.raises(MpqError, match="bf16"):
        tune("bf16", 64, 128, 3, DEVICE)


def test_tables_record_whether_they_were_measured() -> None:
    assert "never measured" in provenance_of("interpreter")
    tune("int4-g64", 64, 128, 3, DEVICE, [Config()])
    if EMULATE:
        assert "tuned here" in provenance_of("interpreter")
