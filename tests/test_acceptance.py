"""The result is no worse on acceptance data than any uniform format within its size, or it is that format."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mpq.acceptance import accept, candidate_of, with_tuned_scales
from mpq.core.errors import MpqError
from mpq.core.problem import build_problem
from mpq.core.table import SensitivityTable
from mpq.measuring import Measurer
from mpq.network.calibration import cross_entropy, seeded
from mpq.network.layers import find_layers
from mpq.rounding.store import RoundingStore
from mpq.search.exact import exact
from mpq.sources import Source, open_source
from mpq.training.tuned_scales import Tuning
from mpq.trial import Trial

FORMATS = ("int2-channel", "int3-channel", "int4-channel", "int8-channel")


def misled(source: Source, seed: int = 0) -> SensitivityTable:
    """Scores that depend on bits but not on layers: random factors up to e^4 either way."""
    layers = find_layers(source.model)
    random = np.random.default_rng(seed).lognormal(0, 2, (len(layers), 1))
    scores = random * 4.0 ** -np.arange(len(FORMATS))
    return SensitivityTable(layers, FORMATS, scores, 0 * scores, "misled", {})


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("tiny-cnn", nsamples=64)


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_no_uniform_format_within_the_size_is_better(source, effort):
    frontier = exact(build_problem(misled(source)))
    uniform = dict(frontier.uniform())
    size = uniform["int4-channel"].size
    measurer = Measurer(source, RoundingStore("nearest"))
    accepted = accept(frontier, size, measurer, effort=effort)
    assert accepted.established
    assert accepted.chosen.allocation.size <= size
    for name in ("int2-channel", "int3-channel", "int4-channel"):
        other = candidate_of(name, uniform[name], measurer)
        assert accepted.chosen.harm() <= other.harm()
    searched = next(one for one in accepted.candidates if one.name == "searched")
    assert accepted.chosen.harm() < searched.harm()  # the table was wrong
    assert "all int4-channel" in accepted.verdict()


def test_without_acceptance_data_nothing_is_established(source):
    frontier = exact(build_problem(misled(source)))
    accepted = accept(
        frontier, frontier.costs[-1], Measurer(replace(source, acceptance=()), RoundingStore("nearest")), effort="fast"
    )
    assert not accepted.established
    assert accepted.verdict().endswith("Not established on unseen data: the source has none to spare.")
    with pytest.raises(MpqError, match="did you mean normal"):
        accept(frontier, 1e6, Measurer(source, RoundingStore("nearest")), effort="normall")


def shifted() -> Source:
    """A network whose inputs are far from zero, so that rounding shifts its normalization's means."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.3, generator=seeded(0, name))
    batches = [
        (torch.randn(64, 3, 6, 6, generator=seeded(1, i)) + 4, torch.randint(0, 5, (64,), generator=seeded(2, i)))
        for i in range(3)
    ]
    model.train()
    model[1].momentum = None
    model(batches[0][0])
    model.eval()
    calibration, acceptance, evaluation = ((batch,) for batch in batches)
    return Source("shifted", model, calibration, evaluation, cross_entropy, "accuracy", {}, "", acceptance=acceptance)


def test_means_are_corrected_only_if_acceptance_data_improve():
    source = shifted()
    measurer = Measurer(source, RoundingStore("nearest"))
    uniform = dict(exact(build_problem(misled(source))).uniform())
    coarse = candidate_of("coarse", uniform["int2-channel"], measurer)
    assert set(coarse.means) == {"1"}
    gain, error = coarse.quality.harm_above(measurer.quality(coarse.allocation, "acceptance"))
    assert gain < -3 * error
    misfit = replace(source, calibration=((source.calibration[0][0] - 8, source.calibration[0][1]),))
    assert candidate_of("fine", uniform["int8-channel"], Measurer(misfit, RoundingStore("nearest"))).means == {}


def test_tuned_scales_are_kept_only_if_acceptance_data_improve(source):
    frontier = exact(build_problem(misled(source)))
    measurer = Measurer(source, RoundingStore("nearest"))
    size = dict(frontier.uniform())["int3-channel"].size
    accepted = accept(frontier, size, measurer, effort="fast")
    tuned = with_tuned_scales(accepted, measurer, Tuning(steps=20, samples=32, rate=1e-2))
    assert tuned.untuned is accepted.chosen
    assert tuned.chosen.allocation == accepted.chosen.allocation
    assert tuned.chosen.harm() < accepted.chosen.harm()
    assert tuned.uniform is accepted.uniform
    assert "Scales tuned" in tuned.corrections()[-1]
    harmful = with_tuned_scales(accepted, measurer, Tuning(steps=3, samples=32, rate=3.0))
    assert harmful is accepted
    assert with_tuned_scales(accepted, measurer, Tuning(steps=0)) is accepted


def test_a_trial_restores_its_rounding_after_another_allocation(source):
    frontier = exact(build_problem(misled(source)))
    measurer = Measurer(source, RoundingStore("nearest"))
    allocation = dict(frontier.uniform())["int3-channel"]
    tuned = measurer.tuned(allocation, Tuning(steps=2, rate=1e-1), {})
    fresh = Trial(source.model, measurer.store)
    for rounder in (None, tuned, None):
        held = measurer.trial.take_on(allocation, rounder=rounder).state_dict()
        expected = fresh.take_on(allocation).state_dict()
        same = all(torch.equal(held[name], tensor) for name, tensor in expected.items())
        assert same == (rounder is None)
