"""The forecast of a job's memory and time, and the limit that it is held against."""

import logging

import pytest

from mpq.core.errors import MpqError
from mpq.forecast import Forecast, available, forecast
from mpq.network.layers import find_layers
from mpq.pipeline import quantize_model
from mpq.sources import open_source
from mpq.training.tuned_scales import Tuning

GB = 10**9


@pytest.fixture(scope="module")
def source():
    return open_source("tiny-lm", nsamples=4)


def forecast_of(source, formats=9, method="gptq", effort="normal", steps=60):
    return forecast(source, find_layers(source.model), formats, method, effort, Tuning(steps))


def test_more_work_takes_more_time_and_no_tuning_no_memory(source):
    whole = forecast_of(source)
    assert whole.memory >= whole.profiling > forecast_of(source, formats=0).profiling
    assert forecast_of(source, steps=0).tuning == 0 < whole.measuring < whole.tuning
    assert 0 < forecast_of(source, formats=0, effort="fast", steps=0).seconds < whole.seconds


def test_a_job_beyond_the_allowed_memory_is_refused_before_the_profile(source, tmp_path):
    with pytest.raises(MpqError, match=r"takes about .* GB of memory .*, more than 0\.1: .*allow more \(ram\)"):
        quantize_model(source, tmp_path / "out", bits=4.25, ram="100MB", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limit", "cure"), [(1.5, "take 0 tuning steps"), (0.5, "shorten the samples")], ids=["tuning", "profile"]
)
def test_the_refusal_says_what_to_lower(limit, cure):
    with pytest.raises(MpqError, match=cure):
        Forecast(GB, GB // 2, 2 * GB, 60.0).announce(limit * GB, progress=False)
    Forecast(GB, GB // 2, 2 * GB, 60.0).announce(2 * GB, progress=False)


def test_without_a_limit_too_large_a_job_is_warned_about(capsys, caplog):
    with caplog.at_level(logging.WARNING):
        Forecast(1000 * available(), 0, 0, 130.0).announce(None)
    assert "GB of memory and 3 minutes" in capsys.readouterr().err
    assert "shorten the samples" in caplog.text
