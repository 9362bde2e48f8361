"""A benchmark's rows match quantizing by hand; files are complete, resumable and belong to one model."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import cross_entropy, mean_loss, next_token_loss, seeded
from mpq.network.layers import find_layers, matrix_to_weight, weight_matrix
from mpq.proxies.benchmark import Benchmark, spell
from mpq.proxies.measuring import build_benchmark, draw_configurations
from mpq.rounding import method_named
from mpq.rounding.reference import dequantize

SCHEMES = ("int2-channel", "int3-channel", "int4-channel")


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(0, name)))
    return model


def data():
    return tuple(
        (torch.randn((7, 5), generator=seeded(1, i)), torch.randint(0, 3, (7,), generator=seeded(2, i)))
        for i in range(2)
    )


def build(model=None, loss_fn=cross_entropy, **options) -> Benchmark:
    options = {"rows": 9, "fixed": {"0": "int8-channel"}, "progress": False, **options}
    return build_benchmark(network() if model is None else model, data(), loss_fn, SCHEMES, **options)


def test_rows_are_what_quantizing_by_hand_measures():
    model = network()
    before = deepcopy(model.state_dict())
    table = build(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(table) == 9
    assert len({spell(choice) for choice in table.choices}) == 9
    assert all(table.schemes[index] == "int8-channel" for index in table.choices[:, 0])
    for choice, loss, accuracy, size in zip(table.choices, table.losses, table.accuracies, table.sizes, strict=True):
        copy, stored = deepcopy(model), 0
        for layer, index in zip(table.layers, choice, strict=True):
            module, format = copy.get_submodule(layer.name), parse_scheme(table.schemes[index]).weight
            rounded = dequantize(method_named("mse")(weight_matrix(module), format, None))
            module.weight.data = matrix_to_weight(rounded, module).clone()
            stored += format.nbytes(layer.rows, layer.cols)
        assert loss == pytest.approx(mean_loss(copy, data(), cross_entropy), rel=1e-6)
        right = sum(int((copy(inputs).argmax(1) == labels).sum()) for inputs, labels in data())
        assert accuracy == right / 14
        assert size == stored
    assert table.provenance["reference_loss"] == pytest.approx(mean_loss(model, data(), cross_entropy))


def test_benchmarks_survive_saving_and_damaged_files_are_refused(tmp_path):
    table = build(provenance={"model": "tiny"})
    path = tmp_path / "benchmark.csv"
    table.save(path)
    loaded = Benchmark.load(path)
    assert loaded.layers == table.layers
    assert loaded.schemes == table.schemes
    assert loaded.provenance == table.provenance
    for name in ("choices", "losses", "accuracies", "sizes", "bitops"):
        assert np.array_equal(getattr(loaded, name), getattr(table, name)), name
    text = path.read_text()
    for broken in (text[:-3], "\n".join(text.splitlines()[:-1]) + "\n", text[2:], text.replace("int3", "int5", 1), ""):
        path.write_text(broken)
        if "int5" in broken:
            assert Benchmark.load(path).schemes != table.schemes
            continue
        with pytest.raises(MpqError, match="not a valid benchmark"):
            Benchmark.load(path)
    with pytest.raises(MpqError, match="cannot read"):
        Benchmark.load(tmp_path / "none.csv")


def test_another_model_is_refused():
    table, model = build(provenance={"model": "tiny"}), network()
    table.check_model(model)
    with torch.no_grad():
        model[2].weight[0, 0] += 1e-3
    with pytest.raises(MpqError, match="measured on tiny with other weights"):
        table.check_model(model)


def test_an_interrupted_build_resumes_to_the_same_table(tmp_path):
    whole, calls, path = build(), 0, tmp_path / "part"

    def interrupted(model, batch):
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    with pytest.raises(KeyboardInterrupt):
        build(loss_fn=interrupted, resume=path)
    done = len(path.read_text().splitlines())
    assert done > 1
    calls = 100
    resumed = build(loss_fn=interrupted, resume=path)
    assert resumed.to_csv() == whole.to_csv()
    assert calls - 100 < 3 + 2 + 2 * (9 - (done - 1)) + 1
    assert not path.exists()
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        build(loss_fn=interrupted, resume=path)
    with pytest.raises(MpqError, match="other settings"):
        build(resume=path, method="nearest")


def test_configurations_are_distinct_evenly_spread_and_keep_ties():
    layers = find_layers(Attention())
    assert len({layer.tie for layer in layers if layer.tie}) == 1
    few = draw_configurations(layers, [[0, 1, 2]] * 4, 5, seed=3)
    many = draw_configurations(layers, [[0, 1, 2]] * 4, 9, seed=3)
    assert np.array_equal(few, many[:5])
    assert len({tuple(row) for row in many}) == 9
    assert (many[:, 0] == many[:, 1]).all()
    assert (many[:, 0] == many[:, 2]).all()
    assert not np.array_equal(many, draw_configurations(layers, [[0, 1, 2]] * 4, 9, seed=4))
    with pytest.raises(MpqError, match="there are only 9"):
        draw_configurations(layers, [[0, 1, 2]] * 4, 10, seed=0)
    with pytest.raises(MpqError, match="share a scheme"):
        draw_configurations(layers, [[0], [0, 1], [0, 1], [0, 1]], 2, seed=0)
    free = draw_configurations(find_layers(network()), [[0, 1, 2]] * 3, 27, seed=0)
    assert (np.array([np.bincount(column) for column in free.T]) == 9).all()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(4, 4, bias=False) for _ in range(4))


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def test_language_models_are_ranked_by_loss():
    tokens = torch.randint(0, 7, (3, 5), generator=seeded(0))
    table = build_benchmark(LanguageModel(), [tokens], next_token_loss, SCHEMES, 4, progress=False)
    assert np.isnan(table.accuracies).all()
    assert np.array_equal(table.quality, -table.losses)


def test_halves_share_no_row_and_depend_on_the_seed():
    table = build()
    seen, held_out = table.halves()
    assert (len(seen), len(held_out)) == (5, 4)
    spelt = {spell(choice) for choice in (*seen.choices, *held_out.choices)}
    assert len(spelt) == 9
    again, other = table.halves()[0], build(rows=9).halves(seed=1)[0]
    assert np.array_equal(seen.choices, again.choices)
    assert not np.array_equal(seen.choices, other.choices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed": {"conv": "int8"}}, "matches nothing"),
        ({"fixed": {"0": "int8+a:int8"}}, "weight formats only"),
        ({"method": "gptq"}, "needs calibration data"),
    ],
)
def test_unmeasurable_models_are_refused(options, message):
    with pytest.raises(MpqError, match=message):
        build(**options)
