"""The three jobs, from a model to a table, on a small network."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "sensitivity"))
from small_models import Convolutions, class_batches, seed_weights

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy
from mpq.proxies import PROXIES
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.formulas import load_formulas
from mpq.proxies.history import load_history
from mpq.proxies.ranking import rankings
from mpq.proxies.runs import run_bench, run_evolve, run_show, table_of

DATA = class_batches((4, 6, 6), (20, 20))


def model():
    return seed_weights(Convolutions()).eval()


def test_a_benchmark_is_measured_then_evolved_on_then_shown(tmp_path):
    file, folder = tmp_path / "bench.csv", tmp_path / "run"
    benchmark = run_bench(model(), DATA, cross_entropy, file, rows=60, progress=False)
    assert Benchmark.load(file).to_csv() == benchmark.to_csv()
    assert not Path(f"{file}.part").exists()
    options = {"generations": 3, "population": 10, "offspring": 4, "progress": False}
    result, found = run_evolve(model(), DATA, cross_entropy, file, folder, **options)
    assert load_formulas(folder / "best.txt")["evolved"] == result.best.program
    assert load_history(folder / "history.csv") == result.history
    assert (folder / "history.png").stat().st_size > 0
    assert "evolved" in [standing.name for standing in found]
    assert [standing.values.mean() for standing in found] == sorted((s.values.mean() for s in found), reverse=True)
    again, _ = run_evolve(model(), DATA, cross_entropy, file, folder, **options)
    assert again == result
    longer, _ = run_evolve(model(), DATA, cross_entropy, file, folder, **{**options, "generations": 5})
    assert longer.history[:4] == result.history


def test_standings_are_the_rankings_with_their_intervals(tmp_path):
    file = tmp_path / "bench.csv"
    benchmark = run_bench(model(), DATA, cross_entropy, file, rows=40, progress=False)
    found = run_show(model(), DATA, cross_entropy, file, ["size", "-bits * params"], progress=False)
    by_name = {standing.name: standing for standing in found}
    losses = -benchmark.sizes.astype(float)
    expected = rankings(losses, benchmark.quality, benchmark.sizes.astype(float))
    assert by_name["size"].values == pytest.approx(expected)
    assert (by_name["size"].low <= by_name["size"].values + 1e-9).all()
    assert len(table_of(found).splitlines()) == 3
    every = run_show(model(), DATA, cross_entropy, file, progress=False)
    assert {"hawq-v2", "snip", "ompq", "grasp"} <= {standing.name for standing in every} <= set(PROXIES)
    assert all(np.isfinite(standing.values).all() for standing in every)


def test_bad_requests(tmp_path):
    file = tmp_path / "bench.csv"
    run_bench(model(), DATA, cross_entropy, file, rows=20, progress=False)
    other = model()
    with torch.no_grad():
        other.head.weight += 1
    for job in (
        lambda: run_show(other, DATA, cross_entropy, file, progress=False),
        lambda: run_evolve(other, DATA, cross_entropy, file, tmp_path, progress=False),
    ):
        with pytest.raises(MpqError, match="other weights"):
            job()
    with pytest.raises(MpqError, match=r"is nan for layer first"):
        run_show(model(), DATA, cross_entropy, file, ["log(error)"], progress=False)
    with pytest.raises(MpqError, match="character 6"):
        run_show(model(), DATA, cross_entropy, file, ["size ^"], progress=False)
