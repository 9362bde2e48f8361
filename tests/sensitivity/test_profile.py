"""`profile`: complete, resumable, deterministic by seed, without changing the model."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from small_models import Convolutions, TiedLanguageModel, class_batches, mlp, seed_weights, token_batches
from torch import nn

from mpq.core.errors import MpqError
from mpq.core.registry import Metric
from mpq.core.table import SensitivityTable
from mpq.network.calibration import cross_entropy, mean_loss, next_token_loss
from mpq.sensitivity import METRICS, metric_named
from mpq.sensitivity.profile import profile

SCHEMES = ("int2-channel", "int4-g32", "bf16")
ALL = sorted(METRICS)


def run(metric, loss_fn=cross_entropy, model=None, **options):
    model = seed_weights(Convolutions()) if model is None else model
    options = {"progress": False, **options}
    return profile(model, class_batches((4, 6, 6), (6, 5)), loss_fn, SCHEMES, metric=metric, **options)


@pytest.mark.parametrize("metric", ALL)
def test_every_metric_gives_a_whole_table(metric, tmp_path):
    model = seed_weights(Convolutions()).train()
    state = deepcopy(model.state_dict())
    table = run(metric, model=model)
    assert [layer.name for layer in table.layers] == ["first", "depthwise", "line", "head"]
    assert table.schemes == SCHEMES
    assert np.isfinite(table.scores).all()
    assert (table.errors >= 0).all()
    assert table.layers[0].macs == 6 * 36 * 18
    if metric not in ("loss", "wrong"):
        assert (table.scores[:, 0] > table.scores[:, 1]).all()
        assert (table.scores[:, 1] > table.scores[:, 2]).all()
        assert (table.scores >= 0).all()
    assert model.training
    assert model.drop.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    table.save(tmp_path / "table.csv")
    assert SensitivityTable.load(tmp_path / "table.csv") == table


@pytest.mark.parametrize("metric", ALL)
def test_train_mode_changes_nothing(metric):
    """Dropout is off and batch statistics are the stored ones, whatever mode the model came in."""
    assert run(metric, model=seed_weights(Convolutions()).train()) == run(
        metric, model=seed_weights(Convolutions()).eval()
    )


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("stop", [7, 9, 11, 22])
def test_an_interrupted_run_resumes_to_the_same_table(metric, stop, tmp_path):
    calls = 0

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    whole = run(metric)
    path = tmp_path / "partial"
    try:
        run(metric, interrupted, resume=path)
    except KeyboardInterrupt:
        assert path.exists()
        done = len(path.read_text().splitlines())
        calls = stop + 1
        assert run(metric, interrupted, resume=path) == whole
        assert done >= 1
    assert not path.exists()


def test_finished_layers_are_not_measured_again(tmp_path):
    calls = []

    def counted(model, batch):
        calls.append(len(calls))
        if len(calls) == 20:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run("loss", counted, resume=tmp_path / "partial")
    first = len(calls)
    run("loss", counted, resume=tmp_path / "partial")
    # One pass counts operations, two check that the loss is a mean, two give the reference, two more the oracle's;
    # then 3 schemes x 2 batches per layer.
    assert len(calls) - first == 7 + 6 * (4 - 2)


class Interruptible:
    """Cross-entropy that stops at the first pass with gradients, when told to."""

    stop = True

    def __call__(self, model, batch):
        """The loss."""
        if torch.is_grad_enabled() and self.stop:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)


def with_statistics(mean):
    model = seed_weights(Convolutions())
    model.norm.running_mean.fill_(mean)
    return model


def other_batch(model, batch):
    return cross_entropy(model, (batch[0], batch[1].flip(0)))


@pytest.mark.parametrize(
    ("named", "other"),
    [
        ("seed", {"seed": 1}),
        ("options", {"options": {"max_probes": 4}}),
        ("weights, loss", {"model": seed_weights(Convolutions(), 0.5)}),
        ("weights, loss", {"model": with_statistics(3.0)}),  # a buffer
        ("loss", {"loss_fn": other_batch}),
    ],
)
def test_other_settings_data_and_losses_do_not_resume(tmp_path, named, other):
    loss_fn = Interruptible()
    with pytest.raises(KeyboardInterrupt):
        run("hessian", loss_fn, resume=tmp_path / "partial")
    loss_fn.stop = False
    with pytest.raises(MpqError, match=rf"other settings \({named}\)"):
        run("hessian", other.pop("loss_fn", loss_fn), resume=tmp_path / "partial", **other)


@pytest.mark.parametrize(("named", "other"), [("seed", {"seed": 1}), ("granularity", {"granularity": "row"})])
def test_other_settings_are_refused_before_the_model_runs(tmp_path, named, other):
    with pytest.raises(KeyboardInterrupt):
        run("kl-curvature", Interruptible(), resume=tmp_path / "partial")
    with pytest.raises(MpqError, match=rf"other settings \({named}\)"):
        run("kl-curvature", lambda model, batch: pytest.fail("the model ran"), resume=tmp_path / "partial", **other)


def test_a_different_loss_of_the_same_name_does_not_resume(tmp_path):
    def made(scale, stop):
        def loss_fn(model, batch):
            if torch.is_grad_enabled() and stop:
                raise KeyboardInterrupt
            return scale * cross_entropy(model, batch)

        return loss_fn

    with pytest.raises(KeyboardInterrupt):
        run("hessian", made(1.0, True), resume=tmp_path / "partial")
    with pytest.raises(MpqError, match=r"other settings \(loss\)"):
        run("hessian", made(1.1, False), resume=tmp_path / "partial")
    assert run("hessian", made(1.0, False), resume=tmp_path / "partial") == run("hessian")


def test_the_seed_decides_the_probes():
    assert run("hessian", seed=1) == run("hessian", seed=1)
    assert run("hessian", seed=1) != run("hessian", seed=2)


@pytest.mark.parametrize("metric", ALL)
def test_tied_embeddings_are_scored_once(metric):
    model = seed_weights(TiedLanguageModel())
    table = profile(model, token_batches(), next_token_loss, SCHEMES, metric=metric, progress=False)
    assert [layer.name for layer in table.layers] == ["embed", "mix", "twice"]
    assert table.layers[0].aliases == ("head",)
    assert model.head.weight is model.embed.weight


def test_rounding_methods_that_look_at_inputs_get_them():
    nearest, gptq = (run("loss", method=method) for method in ("nearest", "gptq"))
    assert gptq.scores[:, 0].sum() < nearest.scores[:, 0].sum()


def test_the_table_says_how_it_was_made():
    table = run("output", options={"weighted": False}, provenance={"model": "small"}, include=["first", "head"])
    model, batches = seed_weights(Convolutions()).eval(), class_batches((4, 6, 6), (6, 5))
    facts = dict(table.provenance)
    assert facts.pop("reference_loss") == pytest.approx(mean_loss(model, batches, cross_entropy))
    weights = sum(layer.params for layer in table.layers)
    other = sum(tensor.nbytes for tensor in model.state_dict().values()) - 4 * weights
    assert facts.pop("coverage")["quantized"] == weights
    assert facts == {
        "metric": "output", "options": {"weighted": False}, "method": "mse", "seed": 0, "nsamples": 11,
        "overhead": other, "model": "small",
    }  # fmt: skip


def test_nan_losses_name_the_batch():
    model = seed_weights(Convolutions())

    def broken(model, batch):
        return cross_entropy(model, batch) * (float("nan") if len(batch[0]) == 5 else 1)

    with pytest.raises(MpqError, match="loss of calibration batch 1 is nan"):
        run("fisher", broken, model=model)


def nan_scores(task):
    """A metric that fails for the second layer's last scheme."""
    scores = np.ones((len(task.layers), len(task.schemes)))
    scores[1, 2] = np.nan
    return scores, np.zeros_like(scores)


def test_nan_scores_name_the_layer(monkeypatch):
    monkeypatch.setitem(METRICS.entries, "broken", Metric("broken", nan_scores))
    with pytest.raises(MpqError, match="broken score of layer depthwise in bf16 is nan"):
        run("broken")


def test_nan_weights_name_the_layer():
    model = nn.Sequential(mlp(), nn.Identity())
    model.idle = nn.Linear(3, 3)
    model.idle.weight.data[0, 0] = float("nan")
    model.forward = model[0].forward
    with pytest.raises(MpqError, match="layer idle in int2-channel: a weight"):
        profile(model, class_batches((5,)), cross_entropy, SCHEMES, metric="fisher", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "hesian"}, "unknown metric 'hesian': did you mean hessian"),
        ({"method": "nearst"}, "unknown rounding method"),
        ({"include": ["frist"]}, "matches nothing: did you mean first"),
    ],
)
def test_unknown_names_are_reported(options, message):
    with pytest.raises(MpqError, match=message):
        run(**{"metric": "fisher", **options})


@pytest.mark.parametrize("metric", METRICS.names(activations=False))
def test_metrics_without_activation_scores_refuse_activation_formats(metric):
    with pytest.raises(MpqError, match=r"weight formats only, not int4-g32\+a:int8"):
        profile(mlp(), class_batches((5,)), cross_entropy, ["int4-g32+a:int8"], metric=metric, progress=False)


@pytest.mark.parametrize("metric", METRICS.names(activations=True))
def test_activations_are_scored(metric):
    schemes = ["int8-g32", "int8-g32+a:int8", "int8-g32+a:int2"]
    scores = profile(mlp(), class_batches((5,)), cross_entropy, schemes, metric=metric, progress=False).scores
    assert metric == "wrong" or (scores[:, 2] != scores[:, 1]).any()
    if metric not in METRICS.names(measured=True):
        assert (scores[:, 2] > scores[:, 1]).all()
        assert (scores[:, 1] > scores[:, 0]).all()


def test_no_data_and_no_formats_are_reported():
    with pytest.raises(MpqError, match="no calibration batches"):
        profile(mlp(), [], cross_entropy, SCHEMES)
    with pytest.raises(MpqError, match="no candidate formats"):
        profile(mlp(), class_batches((5,)), cross_entropy, [])


def test_metrics_are_found_by_name():
    for name in METRICS:
        assert callable(metric_named(name))
