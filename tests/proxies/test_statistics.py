"""Statistics against direct computation, on every kind of layer; files and caches."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "sensitivity"))
from small_models import (
    Convolutions,
    Routed,
    TiedLanguageModel,
    class_batches,
    make_task,
    mlp,
    seed_weights,
    token_batches,
)

from mpq.core.errors import MpqError
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import cross_entropy, mean_loss, next_token_loss, samples_in, split_batch
from mpq.network.layers import find_layers, weight_matrix
from mpq.proxies import PROXIES
from mpq.proxies.collect import collect_statistics
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.formulas import parse
from mpq.proxies.programs import INPUTS
from mpq.proxies.statistics import Statistics, expected_length

SCHEMES = ("int2-channel", "int4-g32")
CASES = {
    "mlp": (mlp, lambda: class_batches((5,)), cross_entropy),
    "convolutions": (lambda: seed_weights(Convolutions()), lambda: class_batches((4, 6, 6)), cross_entropy),
    "language": (lambda: seed_weights(TiedLanguageModel()), token_batches, next_token_loss),
}


def collected(case="mlp", **options) -> tuple[torch.nn.Module, tuple, Statistics]:
    make, batches, loss_fn = CASES[case]
    model, data = make().eval(), batches()
    return model, data, collect_statistics(model, data, loss_fn, SCHEMES, **options)


def matrices(model, tensors):
    """Matrices of the layers, by name."""
    for layer, tensor in zip(find_layers(model), tensors, strict=True):
        yield (tensor.t() if layer.kind == "transformers-conv1d" else tensor.flatten(1)).numpy()


def flat(model, tensors):
    return np.concatenate([matrix.reshape(-1) for matrix in matrices(model, tensors)])


@pytest.mark.parametrize("case", list(CASES))
def test_weights_are_paired_with_their_gradients(case):
    model, batches, statistics = collected(case)
    loss_fn = CASES[case][2]
    weights = [model.get_submodule(layer.name).weight for layer in find_layers(model)]
    total = sum(loss_fn(model, batch) * samples_in(batch) for batch in batches)
    loss = total / sum(map(samples_in, batches))
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    assert np.allclose(statistics.get("weight"), flat(model, [weight.detach() for weight in weights]))
    assert np.allclose(statistics.get("grad"), flat(model, [g.detach() for g in gradients]), atol=1e-6)
    squares = [torch.zeros_like(weight) for weight in weights]
    for sample in [sample for batch in batches for sample in split_batch(batch)]:
        for square, gradient in zip(squares, torch.autograd.grad(loss_fn(model, sample), weights), strict=True):
            square += gradient**2 / sum(map(samples_in, batches))
    assert np.allclose(statistics.get("fisher"), flat(model, squares), rtol=1e-4, atol=1e-8)
    for index, scheme in enumerate(SCHEMES):
        task = make_task(model, batches, loss_fn)
        errors = [task.weight_error(layer, parse_scheme(scheme)).reshape(-1).numpy() for layer in find_layers(model)]
        assert np.allclose(statistics.get("error")[index], np.concatenate(errors))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_second_derivatives_and_virtual_gradients():
    model, batches, statistics = collected("mlp")
    weights = [model.get_submodule(layer.name).weight for layer in find_layers(model)]
    expected = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:  # two of the same size: each batch's own H g
        gradients = torch.autograd.grad(cross_entropy(model, batch), weights, create_graph=True)
        half = 0.5 * sum((gradient**2).sum() for gradient in gradients)
        for total, part in zip(expected, torch.autograd.grad(half, weights), strict=True):
            total += part / 2
    assert np.allclose(statistics.get("hessgrad"), flat(model, expected), rtol=1e-4, atol=1e-7)
    virtual = torch.autograd.grad(model(torch.ones(1, 5)).sum(), weights)
    assert np.allclose(statistics.get("virtual"), flat(model, virtual), rtol=1e-5, atol=1e-7)


def test_activations_are_paired_with_their_gradients():
    model, batches, statistics = collected("convolutions")
    outputs = []
    handles = [
        model.get_submodule(layer.name).register_forward_hook(lambda m, a, out: outputs.append(out))
        for layer in find_layers(model)
    ]
    loss = CASES["convolutions"][2](model, batches[0])
    for handle in handles:
        handle.remove()
    kept = [output.clone() for output in outputs]
    space = statistics.spaces["activation"]
    assert np.array_equal(space.all_rows, [6] * 4)
    assert np.allclose(statistics.get("act"), np.concatenate([k.detach().numpy().reshape(-1) for k in kept]), atol=1e-6)
    last = torch.autograd.grad(loss, outputs[-1])[0] * 6
    assert np.allclose(statistics.get("actgrad")[0, -18:], last.numpy().reshape(-1), atol=1e-6)


@pytest.mark.parametrize("case", list(CASES))
def test_statistics_survive_saving_and_loading(case, tmp_path):
    _, _, statistics = collected(case)
    assert set(statistics.numbers) == set(INPUTS)
    for name, numbers in statistics.numbers.items():
        schemes = len(SCHEMES) if INPUTS[name][0].by_scheme else 1
        assert numbers.shape == (schemes, expected_length(name, statistics.spaces, len(statistics.layers)))
        assert np.isfinite(numbers).all(), name
    statistics.save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz")
    assert loaded.layers == statistics.layers
    assert loaded.provenance == statistics.provenance
    assert all(np.array_equal(loaded.numbers[name], numbers) for name, numbers in statistics.numbers.items())
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-40])
    with pytest.raises(MpqError, match=r"collect them again|cannot read"):
        Statistics.load(tmp_path / "s.npz")


def test_a_cache_serves_the_same_model_and_refuses_another(tmp_path):
    path = tmp_path / "cache.npz"
    model, batches, statistics = collected("mlp", cache=path, wanted=("weight", "bits"))
    calls = []
    again = collect_statistics(
        model, batches, lambda m, b: calls.append(1) or cross_entropy(m, b), SCHEMES, cache=path, wanted=("weight",)
    )
    assert not calls
    assert np.array_equal(again.get("weight"), statistics.get("weight"))
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(MpqError, match="of another model"):
        collect_statistics(model, batches, cross_entropy, SCHEMES, cache=path)
    with pytest.raises(MpqError, match="hold no 'trace'"):
        Evaluator(statistics).table(parse("trace * bits"))
    with pytest.raises(MpqError, match="unknown statistic 'trase'"):
        collect_statistics(model, batches, cross_entropy, SCHEMES, wanted=["trase"])


def test_sampled_rows_and_columns_estimate_the_whole():
    """Sums are scaled up; over many seeds their mean is the full sum, within four standard errors."""
    model, batches, whole = collected("convolutions", wanted=("weight",))
    program = parse("l1(weight)")
    exact = Evaluator(whole).table(program)[:, 0]
    for layer, value in zip(find_layers(model), exact, strict=True):
        assert value == pytest.approx(weight_matrix(model.get_submodule(layer.name)).abs().sum().item(), rel=1e-5)
    sums = []
    for seed in range(60):
        part = collect_statistics(model, batches, cross_entropy, SCHEMES, wanted=("weight",), samples=12, seed=seed)
        assert (part.spaces["weight"].counts <= 12).all()
        sums.append(Evaluator(part).table(program)[:, 0])
    error = np.std(sums, 0) / np.sqrt(60)
    assert (np.abs(np.mean(sums, 0) - exact) <= 4 * error + 1e-4 * exact).all()


def test_layers_that_see_parts_of_samples():
    model = seed_weights(Routed()).eval()
    statistics = collect_statistics(model, class_batches((5, 4)), cross_entropy, SCHEMES, wanted=("act", "weight"))
    assert np.isfinite(statistics.get("act")).all()
    assert mean_loss(model, class_batches((5, 4)), cross_entropy) > 0


def test_every_known_proxy_suits_a_small_network():
    _, _, statistics = collected("convolutions")
    evaluator = Evaluator(statistics)
    for name, (text, _) in PROXIES.items():
        if name != "emq":
            assert evaluator.finite_table(parse(text)).shape == (4, 2), name
