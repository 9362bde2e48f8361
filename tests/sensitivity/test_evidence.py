"""Scores without evidence are NaN with a reason, whatever the cause."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable
from mpq.network.calibration import cross_entropy
from mpq.network.layers import find_layers
from mpq.network.ranges import input_ranges
from mpq.sensitivity.evidence import FLAT, NO_GRADIENT, UNCHANGED, UNREACHED
from mpq.sensitivity.profile import profile

DERIVATIVES = ["kl-curvature", "kronecker", "fisher", "output", "gradient", "quadratic", "hessian", "eigenvalue"]
BATCH = (torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3)


class Experts(nn.Module):
    """Two of three experts are chosen, by an argmax; the third is called with no rows, or not at all."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gate, self.out, self.always = nn.Linear(8, 2), nn.Linear(8, 3), always

    def forward(self, x):
        """Class logits."""
        chosen, hidden = self.gate(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if self.always or len(rows):
                hidden = hidden.index_copy(0, rows, expert(x[rows]))
        return self.out(torch.tanh(hidden))


class Frozen(nn.Module):
    """A backbone that runs under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        """Class logits."""
        with torch.no_grad():
            hidden = torch.relu(self.body(x))
        return self.head(hidden)


def table_of(model, metric, loss_fn=cross_entropy, formats=("int3-channel",), batch=BATCH):
    return profile(model, [batch], loss_fn, list(formats), metric=metric, progress=False)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("metric", [*DERIVATIVES, "gptq", "curvature"])
def test_experts_without_tokens(metric, always, caplog, tmp_path):
    formats = ["int3-channel+a:int4-token"] if metric in ("kronecker", "gptq", "kl-curvature") else ["int3-channel"]
    table = table_of(Experts(always), metric, formats=formats)
    assert table.reasons["experts.2"] == UNREACHED
    if metric != "gptq":
        assert table.reasons["gate"] == NO_GRADIENT  # an argmax lies behind it
    without = np.array([layer.name in table.reasons for layer in table.layers])
    assert np.isnan(table.scores[without]).all()
    assert (table.scores[~without] > 0).all()
    assert f"have no score ({UNREACHED}): experts.2" in caplog.text
    table.save(tmp_path / "table.csv")
    assert SensitivityTable.load(tmp_path / "table.csv") == table


MEASURED = ["loss", "divergence", "wrong", "linearity"]


@pytest.mark.parametrize("metric", MEASURED)
def test_a_measured_zero_is_evidence_where_a_sample_reached_the_layer(metric):
    table = table_of(Experts(False), metric, formats=["int8-channel"])
    assert table.reasons == {"experts.2": UNREACHED}
    assert np.isfinite(table.scores[[layer.name != "experts.2" for layer in table.layers]]).all()


class Gated(nn.Module):
    """A branch that is multiplied by zero, and a gate so far from its threshold that no format moves it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lost, self.gate, self.out = nn.Linear(8, 8), nn.Linear(8, 1, bias=False), nn.Linear(8, 3)
        nn.init.constant_(self.gate.weight, 100.3)
        self.gate.weight.data[:, 1:] *= 0.01

    def forward(self, x):
        """Class logits."""
        opened = (self.gate(x.abs()) > 0).float()
        return self.out(torch.tanh(opened * x + 0.0 * self.lost(x)))


@pytest.mark.parametrize("metric", MEASURED)
def test_a_loss_that_a_layer_cannot_change_is_no_evidence(metric, caplog):
    """The gate's zero is measured: other weights would close it. Nothing brings the lost branch back."""
    table = table_of(Gated(), metric, formats=["int2-channel", "int8-channel"])
    assert table.reasons == {"lost": UNCHANGED}
    assert np.isnan(table.scores[0]).all()
    assert table.scores[1].tolist() == [0.0, 0.0]
    assert np.isfinite(table.scores[2]).all()
    assert f"1 of 3 layers have no score ({UNCHANGED}): lost" in caplog.text


@pytest.mark.parametrize("metric", ["loss", "linearity"])
@pytest.mark.parametrize("constant", [0.0, 2.5])
def test_a_loss_that_no_layer_changes_is_refused(metric, constant):
    with pytest.raises(MpqError, match="or a loss that depends on the model's outputs"):
        table_of(Gated(), metric, lambda model, batch: 0.0 * model(batch[0]).sum() + constant)


@pytest.mark.parametrize("metric", [*DERIVATIVES, "gptq", "curvature"])
@pytest.mark.parametrize("constant", [0.0, 2.5])
def test_a_constant_loss_is_no_evidence_for_derivatives(metric, constant):
    """Those that need the loss say so; those of the model's own predictions or outputs have evidence without it."""
    try:
        table = table_of(Gated(), metric, lambda model, batch: 0.0 * model(batch[0]).sum() + constant)
    except MpqError:
        return
    assert not (table.scores == 0).any()


@pytest.mark.parametrize("always", [False, True])
def test_ranges_of_experts_without_tokens(always):
    model = Experts(always)
    assert sorted(input_ranges(model, find_layers(model), [BATCH], cross_entropy)) == [
        "experts.0", "experts.1", "gate", "out",
    ]  # fmt: skip


@pytest.mark.parametrize("metric", DERIVATIVES)
def test_a_backbone_under_no_grad(metric):
    table = table_of(Frozen(), metric)
    assert table.reasons == {"body": NO_GRADIENT}
    assert np.isnan(table.scores[0]).all()
    assert (table.scores[1] > 0).all()


def test_output_errors_need_no_gradient():
    assert table_of(Frozen(), "gptq").reasons == {}


class Hidden(torch.autograd.Function):
    """A custom reentrant checkpoint: its inner graph is not visible from outside."""

    @staticmethod
    def forward(ctx, function, x):
        """The function's value."""
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        """None of it."""
        return None, gradient


def test_a_checkpoint_that_hides_its_graph():
    model = Frozen()
    model.forward = lambda x: model.head(Hidden.apply(model.body, x.requires_grad_()))
    assert table_of(model, "kronecker", batch=(BATCH[0].clone(), BATCH[1])).reasons == {"body": NO_GRADIENT}
    assert checkpoint.CheckpointFunction.__module__ == "torch.utils.checkpoint"


@pytest.mark.parametrize("noise", [0.0, 1e-7])
@pytest.mark.parametrize("metric", ["kl-curvature", "kronecker", "fisher", "gradient"])
def test_a_distance_to_the_models_own_outputs(metric, noise):
    """Rounding noise in the outputs, as from another batch size, is not a gradient."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    with torch.no_grad():
        own = model(BATCH[0]) * (1 + noise)
    table = table_of(
        model, metric, lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]), batch=(BATCH[0], own)
    )
    assert table.reasons == {"0": FLAT, "2": FLAT}
    other = table_of(
        model, metric, lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]), batch=(BATCH[0], 2 * own)
    )
    assert (other.scores > 0).all()


def test_a_layer_that_no_format_changes_scores_zero():
    model = Frozen()
    nn.init.zeros_(model.body.weight)
    table = table_of(model, "kronecker")
    assert table.reasons == {}
    assert table.scores[0].tolist() == [0.0]
