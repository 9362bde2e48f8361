"""Budgets of other costs than bytes in the whole job."""

import re
from pathlib import Path

import numpy as np
import pytest

import mpq
from mpq.cli.main import main
from mpq.core.errors import MpqError
from mpq.core.latency import Latency, LatencyTable
from mpq.memory import live_in
from mpq.search.budgets import Budgets
from mpq.search.choice import allocate
from mpq.sensitivity.profile import profile
from mpq.sources import Source, open_source

FORMATS = ("int4-g32", "int8-channel", "int8-channel+a:int8-token")
SETTINGS = {"formats": FORMATS, "progress": False, "tuning_steps": 0, "bits": 8.2}


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("tiny-cnn", nsamples=32)


@pytest.fixture(scope="module")
def table(source: Source) -> mpq.SensitivityTable:
    return profile(source.model, source.calibration, source.loss_fn, FORMATS, metric="output", progress=False)


def test_bit_operations_buy_activation_formats(source: Source, table: mpq.SensitivityTable, tmp_path: Path) -> None:
    free = mpq.quantize(source, tmp_path / "free", table=table, effort="fast", **SETTINGS).allocation
    limit = 0.6 * free.bitops
    outcome = mpq.quantize(source, tmp_path / "out", table=table, budgets={"bitops": limit}, **SETTINGS)
    chosen = outcome.allocation
    assert chosen.bitops <= limit
    assert chosen.bits <= 8.2
    assert any("+a:" in scheme for scheme in chosen.schemes)
    assert not any("+a:" in scheme for scheme in free.schemes)
    assert all(Budgets({"bitops": limit}).keep(candidate.allocation) for candidate in outcome.accepted.candidates)
    assert mpq.Allocation.load(tmp_path / "out" / "allocation.json").schemes == chosen.schemes


@pytest.mark.parametrize(
    ("budgets", "sentence"),
    [
        ({"bitops": 1.0}, "below the smallest"),
        ({"bitops": np.nan}, "expected a finite number"),
        ({"latency": 1.0}, "needs measured seconds"),
        ({"watts": 1.0}, "unknown cost 'watts'"),
    ],
)
def test_impossible_budgets_are_refused_by_name(
    source: Source, table: mpq.SensitivityTable, tmp_path: Path, budgets: dict[str, float], sentence: str
) -> None:
    with pytest.raises(MpqError, match=sentence):
        mpq.quantize(source, tmp_path / "out", table=table, budgets=budgets, **SETTINGS)
    with pytest.raises(MpqError, match=r"unknown cost|below|finite|seconds|excludes other"):
        mpq.quantize(source, tmp_path / "out", table=table, max_kl=0.1, budgets=budgets, formats=FORMATS)


def test_missing_latencies_are_reported_before_the_profile(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq.pipeline.profile", lambda *_, **__: pytest.fail("profiled"))
    measured = tuple(Latency(name, 8, 8, 1, 1e-6) for name in FORMATS[:2])
    for table in (LatencyTable(measured), LatencyTable((*measured, Latency(FORMATS[2], 8, 8, 4, 1e-6)))):
        with pytest.raises(MpqError, match=r"no measured latency for int8-channel\+a:int8-token at batch 1"):
            mpq.quantize(source, tmp_path / "out", latencies=table, budgets={"latency": 1.0}, **SETTINGS)


def test_an_activation_budget_quantizes_the_layers_at_the_peak(tmp_path: Path) -> None:
    text = open_source("tiny-lm", nsamples=2, seqlen=32, evaluation_samples=2)
    table = profile(text.model, text.calibration, text.loss_fn, FORMATS, metric="output", progress=False)
    live = live_in(text, table.layers, 4, 200, None)
    assert live is not None
    floats = live.peak({})
    limit = floats - 4 * 200 * 128
    free = allocate(table, bits=8.1).allocation
    assert not any("+a:" in scheme for scheme in free.schemes)
    settings = {**SETTINGS, "bits": 8.1, "effort": "fast", "granularity": "layer", "context": 200, "batch": 4}
    found = mpq.quantize(text, tmp_path / "out", table=table, budgets={"activations": limit}, **settings)
    peak = found.activations.peak(found.allocation.scheme_of)
    assert peak <= limit
    said = f"at most {peak:,} bytes at once for 4 x 200 tokens"
    assert any(said in sentence and f"{floats:,} in floating point" in sentence for sentence in found.words())
    chosen = allocate(table, bits=8.1, budgets={"activations": limit}, activations=live).allocation
    assert chosen.schemes == found.allocation.schemes
    assert any("+a:" in scheme for scheme in chosen.schemes)
    with pytest.raises(MpqError, match="too small: the smallest formats take"):
        mpq.quantize(text, tmp_path / "no", table=table, budgets={"activations": floats / 4}, **settings)
    with pytest.raises(MpqError, match="needs the model"):
        allocate(table, bits=8.1, budgets={"activations": limit})


def test_the_command_line_takes_a_budget_of_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["tiny-lm", "--nsamples", "2", "--seqlen", "32", "-q"]
    table, names = str(tmp_path / "table.csv"), ",".join(FORMATS)
    main(["profile", *common, "--formats", names, "--metric", "output", "-o", table])
    budget = ["--bits", "8.2", "--context", "100", "--batch", "2", "--budget", "activations=3kB"]
    assert main(["allocate", table, *budget]) == 2
    needed = re.search(r"smallest formats take ([\d,]+) for 2 x 100 tokens", capsys.readouterr().err)
    assert needed is not None
    budget[-1] = f"activations={needed[1].replace(',', '')}"
    assert main(["allocate", table, *budget, "-o", str(tmp_path / "some.json")]) == 0
    assert any("+a:" in name for name in mpq.Allocation.load(tmp_path / "some.json").schemes)
