import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.lowprecision import Mask, Recipe, StableSPAM
from mpq.lowprecision.convert import LowPrecisionLayer
from mpq.lowprecision.study import Run, Setting, Task, added_share, compare, early_warning, gaps, mean_with_error, train
from mpq.network.calibration import seeded


def squared_error(model, batch):
    inputs, targets = batch
    return functional.mse_loss(model(inputs), targets)


def task(spoilt_from=10**6, **options):
    built = []

    def build(seed):
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        for name, parameter in model.named_parameters():
            parameter.data = 0.25 * torch.randn(parameter.shape, generator=seeded(seed, name))
        built.append(model)
        return model

    def batches(seed):
        step = 0
        while True:
            inputs = torch.randn(32, 16, generator=seeded(seed, step))
            yield inputs, inputs[:, :1] * (math.nan if step >= spoilt_from else 1)
            step += 1

    unseen = torch.randn(64, 16, generator=seeded(7))
    return built, Task(
        "line",
        build,
        batches,
        squared_error,
        lambda m: squared_error(m, (unseen, unseen[:, :1])).item(),
        0.01,
        **options,
    )


def test_settings_are_trained_with_the_same_data_and_paired():
    built, line = task(exclude=("2",))
    settings = {"full": Setting(), "mask": Setting(Mask(0)), "spam": Setting(Recipe("nvfp4"), StableSPAM)}
    reported = []
    runs = compare(line, settings, seeds=2, steps=60, report=reported.append)
    assert list(runs) == reported
    assert [(run.setting, run.seed) for run in runs[:3]] == [("full", 0), ("full", 1), ("mask", 0)]
    assert runs[0].losses[-1] < 0.3 * runs[0].losses[0]
    assert [isinstance(built[2][index], LowPrecisionLayer) for index in (0, 2)] == [True, False]
    assert train(line, "mask", settings["mask"], steps=60, seed=1) == runs[3]
    found = gaps(runs, "full")
    assert not found["full", 0.01].any()
    assert found["mask", 0.01].tolist() == [runs[2].loss - runs[0].loss, runs[3].loss - runs[1].loss]
    assert (found["mask", 0.01] > 0).all()
    assert mean_with_error(np.array([1.0, 3.0])) == (2.0, 1.0)
    with pytest.raises(MpqError, match="was not run at rate"):
        gaps(runs[2:], "full")


def test_rates_and_looks():
    calls = []
    _, line = task(sharpness=lambda model: float(len(calls) or calls.append(1) or 0))
    runs = compare(line, {"full": Setting()}, seeds=1, steps=12, rates=(0.01, 0.02))
    assert [run.rate for run in runs] == [0.01, 0.02]
    assert [step for step, _ in runs[0].sharpness] == [0, 2, 4, 6, 8, 10]
    assert runs[0].loss != runs[1].loss


def test_training_stops_where_the_loss_is_not_finite():
    run = train(task(spoilt_from=5)[1], "full", Setting(), steps=20)
    assert len(run.losses) == 6
    assert math.isnan(run.losses[-1])
    assert math.isfinite(run.loss)  # the broken step was not taken


def made(setting, seed, loss, sharp):
    return Run(setting, 0.1, seed, loss, (1.0,), ((0, 0.0), (1, sharp), (2, 9.0))[: 3 if sharp is not None else 0])


def test_a_warning_by_hand():
    base = [made("full", seed, 1.0, 0.0) for seed in range(6)]
    losses, sharp = [1.1, 1.2, 1.3, 2.5, 3.0, math.inf], [1.0, 3.0, 2.0, 2.5, 4.0, 5.0]
    runs = base + [
        made("mask", seed, loss, value) for seed, (loss, value) in enumerate(zip(losses, sharp, strict=True))
    ]
    warning = early_warning(runs, "full", far=1.0)
    assert (warning.failed, warning.runs) == (3, 6)
    assert warning.auc == pytest.approx(8 / 9)  # nine pairs, one in the wrong order
    assert warning.interval[0] <= warning.auc <= warning.interval[1]
    assert warning.correlation == pytest.approx(1 - 6 * (0 + 4 + 1 + 1 + 0 + 0) / (6 * 35))
    assert math.isnan(early_warning(runs[:9], "full", far=1.0).auc)  # none failed


def test_operations_count_for_the_layers_that_round():
    _, line = task(exclude=("2",))
    assert added_share(line, Setting()) == 0
    first = added_share(line, Setting(Recipe("nvfp4")))
    operations = 2 * 5 * (32 * 16 + 16 * 16 + 32 * 16)
    assert first == pytest.approx(operations / (6 * 32 * 16 * 16))
