"""Twelve architectures through the whole job: profile, search, simulate, export, load, equal outputs."""

import pytest

from experiments.benchmarks.model_matrix import is_causal, run_case
from experiments.models.model_cases import CASES, SAMPLED

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", SAMPLED)
def test_the_whole_job(name, tmp_path):
    row = run_case(CASES[name], tmp_path / "out")
    assert (row.status, row.layers > 5) == ("ok", True), row
    assert row.coverage > 0.8
    assert row.generates == is_causal(CASES[name])


def test_a_failing_model_becomes_a_row():
    def build():
        raise ValueError("no such thing\nat all")

    case = CASES["Llama"]
    row = run_case(type(case)("broken", build, case.batches, case.loss_fn), None)
    assert (row.status, row.reason) == ("failed", "ValueError: no such thing")
