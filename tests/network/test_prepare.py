"""Computed weights (parametrizations) become stored weights in every verb."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import mpq
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.exporters.mpq.checkpoint import load
from mpq.network.calibration import cross_entropy, seeded
from mpq.network.layers import find_layers
from mpq.network.prepare import prepared
from mpq.quantized import pack_model, simulate
from mpq.sensitivity.profile import profile


def legacy_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight_norm(module)


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "legacy weight norm": legacy_weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "legacy spectral norm": spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", amount=0.3),
}
X = torch.randn(8, 32, generator=seeded(0, "x"))


def net(wrap):
    torch.manual_seed(0)
    return nn.Sequential(wrap(nn.Linear(32, 24)), nn.ReLU(), nn.Linear(24, 4)).eval()


@pytest.mark.parametrize("name", COMPUTED)
def test_every_verb_stores_computed_weights(name, tmp_path):
    model = net(COMPUTED[name])
    expected = model(X).detach()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    layers = find_layers(model)
    allocation = Allocation(layers, ("int2-g16", "int8-channel"))
    rounded = simulate(model, allocation, trainable=False)(X)
    change = (rounded - expected).norm() / expected.norm()
    assert change > 0.05  # two bits change the outputs
    torch.testing.assert_close(simulate(model, allocation)(X), rounded)
    room = 2e-3 * rounded.abs().max().item()
    torch.testing.assert_close(pack_model(model, allocation)(X), rounded, atol=room, rtol=0)
    export(model, allocation, tmp_path / "out", inputs=X)
    with torch.no_grad():
        loaded = load(tmp_path / "out", model=net(COMPUTED[name]))
    torch.testing.assert_close(loaded(X), rounded, atol=room, rtol=0)
    table = profile(
        model, [(X, torch.arange(8) % 4)], cross_entropy, ["int2-g16"], metric="loss", progress=False, method="nearest"
    )
    assert abs(table.scores[0, 0]) > 1e-6
    assert torch.equal(model(X), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_simulated_model_is_profiled_and_exported_as_it_computes(tmp_path):
    model = net(nn.Sequential)
    allocation = Allocation(find_layers(model), ("int3-g16", "int4-g16"))
    simulated = simulate(model, allocation)
    export(simulated, allocation, tmp_path / "out", inputs=X)
    loaded = load(tmp_path / "out", model=copy.deepcopy(model))
    torch.testing.assert_close(loaded(X), simulated(X), atol=1e-3, rtol=1e-3)


def test_plain_models_are_not_copied():
    model = net(nn.Sequential)
    assert prepared(model) is model


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_profiled_without_their_wrappers(whole):
    model = net(nn.Sequential)
    compiled = torch.compile(model) if whole else nn.Sequential(torch.compile(model), nn.Identity())
    plain = model if whole else nn.Sequential(model, nn.Identity())
    batches = [(X, torch.arange(8) % 4)]
    expected = profile(plain, batches, cross_entropy, ["int4-g16"], metric="output", progress=False)
    found = profile(compiled, batches, cross_entropy, ["int4-g16"], metric="output", progress=False)
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    assert (found.scores == expected.scores).all()


def test_modules_compiled_in_place_run_as_written_while_they_are_measured():
    model = net(nn.Sequential)
    batches = [(X, torch.arange(8) % 4)]
    expected = profile(model, batches, cross_entropy, ["int4-g16"], metric="output", progress=False)
    calls = []
    model.compile(backend=lambda graph, inputs: calls.append(graph) or graph.forward)
    compiled = model._compiled_call_impl
    found = profile(model, batches, cross_entropy, ["int4-g16"], metric="output", progress=False)
    assert (found.scores == expected.scores).all()
    assert not calls
    assert model._compiled_call_impl is compiled


def test_parameters_without_content_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(MpqError, match=r"0\.weight is on the device 'meta'"):
        mpq.profile(model, [X], lambda model, batch: model(batch).mean())


def test_sparse_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    with pytest.raises(MpqError, match=r"0\.weight is a sparse tensor \(torch\.sparse_coo\): make it dense first"):
        prepared(model)
