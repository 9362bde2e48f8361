import csv
import html
import math
import re

import numpy as np
import pytest
import torch
from small_cnn import images, small_cnn

import mpq
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.problem import build_problem
from mpq.measuring import measuring
from mpq.network.calibration import cross_entropy, split_batch
from mpq.network.layers import find_layers
from mpq.pipeline import quantize_model
from mpq.quantized import simulate
from mpq.sensitivity.profile import profile
from mpq.sources import open_source
from packed_error import assert_close, room

FORMATS = ("int2-g32", "int4-g32", "int8-channel")


def test_the_public_verbs_run_the_whole_job(tmp_path):
    model, batches = small_cnn(), images()
    table = mpq.profile(model, batches, cross_entropy, formats=["int2-g64", "int4-g64", "fp8-e4m3"], progress=False)
    frontier = mpq.frontier(table)
    allocation = frontier.at(bits=5)
    simulated = mpq.simulate(model, allocation)
    mpq.export(model, allocation, tmp_path / "out")
    packed = mpq.load(tmp_path / "out", model=small_cnn())
    inputs = batches[0][0]
    with torch.no_grad():
        assert_close(packed(inputs), simulated.eval()(inputs), room(simulated, inputs))
    assert allocation.bits <= 5
    cross_entropy(simulated.train(), batches[0]).backward()
    assert all(parameter.grad is not None for parameter in simulated.parameters())


def test_what_is_written_has_the_tuned_scales(tmp_path):
    source = open_source("tiny-cnn", nsamples=128)
    settings = {"bits": 3, "formats": ("int2-channel", "int3-channel", "int4-channel"), "progress": False}
    plain = mpq.quantize(source, tmp_path / "plain", tuning_steps=0, **settings)
    tuned = mpq.quantize(source, tmp_path / "tuned", tuning_steps=30, **settings)
    assert plain.accepted.untuned is None
    assert tuned.accepted.untuned is not None
    assert tuned.allocation == plain.allocation
    assert tuned.measured[-1].size == plain.measured[-1].size
    assert tuned.measured[-1].quality.harm_above(plain.measured[-1].quality)[0] < 0


def test_quantize_does_the_whole_job_for_a_custom_model(tmp_path):
    batches = images()
    source = mpq.Source("mine", small_cnn(), batches, batches, cross_entropy)
    outcome = mpq.quantize(source, tmp_path / "out", bits=5, formats=FORMATS, metric="fisher", progress=False)
    assert outcome.allocation.bits <= 5
    assert len(repr(outcome)) < 1000
    assert outcome.measured[-1].size == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert not [file for file in (tmp_path / "out").iterdir() if "unfinished" in file.name]


def test_the_old_spelling_of_simulate_works_with_a_warning():
    model, batches = small_cnn(), images()
    table = mpq.profile(model, batches, cross_entropy, formats=FORMATS, metric="fisher", progress=False)
    allocation = mpq.frontier(table).at(bits=5)
    with pytest.warns(DeprecationWarning, match=r"is mpq\.simulate"):
        old = mpq.quantize(model, allocation, "nearest", None, trainable=False)
    new = mpq.simulate(model, allocation, "nearest", None, trainable=False)
    assert all(torch.equal(old.state_dict()[name], tensor) for name, tensor in new.state_dict().items())
    with pytest.raises(MpqError, match="needs data beside the model"):
        mpq.quantize(model, "out", bits=4)
    with pytest.raises(MpqError, match="the folder to write"):
        mpq.quantize("tiny-cnn")


def test_export_writes_for_every_target_and_names_unknown_options(tmp_path):
    model, batches = small_cnn(), images()
    table = mpq.profile(model, batches, cross_entropy, formats=["int8-channel"], metric="fisher", progress=False)
    allocation = mpq.frontier(table).allocation(0)
    with pytest.raises(MpqError, match="did you mean gguf"):
        mpq.export(model, allocation, tmp_path, to="gguff")
    with pytest.raises(MpqError, match="did you mean shard"):
        mpq.export(model, allocation, tmp_path, shards=3)
    pytest.importorskip("onnx")
    written = mpq.export(model, allocation, tmp_path / "onnx", to="onnx", inputs=batches[0][0][:2])
    assert list(written.glob("*.onnx"))


def test_nouns_parse_their_names():
    assert mpq.Format.parse("int4-g64") == mpq.parse_format("int4-g64")
    assert mpq.Scheme.parse("int4-g64+a:int8-token") == mpq.parse_scheme("int4-g64+a:int8-token")


def test_every_public_name_exists():
    assert set(mpq.__all__) <= set(dir(mpq))
    for name in mpq.__all__:
        assert getattr(mpq, name) is not None
    with pytest.raises(AttributeError, match="nobody"):
        _ = mpq.nobody


@pytest.mark.parametrize("method", ["mse", "gptq"])
def test_the_packed_model_is_as_good_as_it_was_simulated(method, tmp_path):
    source = open_source("tiny-cnn", nsamples=32)
    outcome = quantize_model(
        source, tmp_path / "out", bits=4.5, formats=FORMATS, metric="fisher", method=method, progress=False
    )
    before, _, *uniform, packed = outcome.measured
    assert before.quality.value > 0.95
    assert packed.quality.value > 0.95
    compared = ["int4-g32", "int4-channel", "int3-channel", "int2-g32"]  # nearest, usual, the best that fits
    assert [found.name for found in uniform] == [f"all {name}" for name in compared]
    assert math.isnan(uniform[2].allocation.loss)
    assert packed.quality.divergence.mean()[0] < uniform[-1].quality.divergence.mean()[0]
    assert uniform[-1].quality.value < packed.quality.value
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert packed.size == written


def test_a_size_budget_holds_for_the_file(tmp_path):
    source = open_source("tiny-cnn", nsamples=16)
    outcome = quantize_model(source, tmp_path / "out", size=70_000, formats=FORMATS, metric="fisher", progress=False)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 60_000 < written <= 70_000
    assert outcome.measured[-1].size == written


def test_the_same_seed_gives_the_same_allocation(tmp_path):
    def run(name: str):
        source = open_source("tiny-cnn", nsamples=16, seed=3)
        return quantize_model(source, tmp_path / name, bits=4, formats=FORMATS, metric="fisher", seed=3, progress=False)

    assert run("a").allocation == run("b").allocation
    for name in ("model.safetensors", "table.csv", "frontier.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    reports = [
        re.sub(r"<td>seconds</td><td>\d+</td>", "", (tmp_path / name / "report.html").read_text()) for name in "ab"
    ]
    assert reports[0] == reports[1]


def test_measured_points_stand_beside_the_predicted_frontier(tmp_path):
    source = open_source("tiny-cnn", nsamples=32)
    outcome = quantize_model(source, tmp_path / "out", bits=4.5, formats=FORMATS, metric="fisher", progress=False)
    with (tmp_path / "out" / "frontier.csv").open(newline="") as stream:
        assert stream.readline().startswith("# ")
        rows = [row for row in csv.DictReader(stream) if row["divergence"]]
    found = sorted(outcome.points.items())
    assert len(found) >= 1
    assert [float(row["divergence"]) for row in rows] == [candidate.harm() for _, candidate in found]
    assert [float(row["loss"]) for row in rows] == [candidate.allocation.loss for _, candidate in found]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "measured divergence" in report
    assert "torch " + torch.__version__ in report
    for sentence in outcome.words():
        assert html.escape(sentence) in report
    assert "uniform format within" in " ".join(outcome.words())


def test_table_and_text_compare_with_the_same_uniform_format(tmp_path):
    source = open_source("tiny-cnn", nsamples=32)
    uniform = Allocation(find_layers(source.model), ("int4-g32",) * len(find_layers(source.model)))
    outcome = quantize_model(
        source, tmp_path / "out", bits=uniform.bits, formats=FORMATS, metric="fisher", progress=False
    )
    assert outcome.allocation.size < uniform.size  # the budget is met exactly by the uniform format alone
    verdict, *_, compared, _ = outcome.words()
    assert "of all int4-g32, the best uniform format within the budget" in verdict
    assert compared.startswith("All int4-g32, the best uniform format within the budget, has ")


def test_conflicting_budgets_and_foreign_folders_are_refused(tmp_path):
    source = open_source("tiny-cnn", nsamples=16)
    with pytest.raises(MpqError, match="name one budget"):
        quantize_model(source, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(MpqError, match="was not written by an earlier export"):
        quantize_model(source, tmp_path / "mine", bits=4)
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"


def test_a_consumer_gets_its_export_in_supported_formats(tmp_path):
    pytest.importorskip("onnx")
    source, formats = open_source("tiny-cnn", nsamples=16), ("int4-channel", "int8-channel", "int3-channel")
    outcome = quantize_model(
        source, tmp_path / "out", bits=5, formats=formats, target="onnxruntime", metric="fisher", progress=False
    )
    assert "int3-channel" not in outcome.allocation.schemes
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert outcome.measured[-1].name == "mpq, simulated"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "for ONNX Runtime" in card
    assert "| mpq, simulated |" in card


def test_calibrated_ranges_travel_into_the_graph(tmp_path):
    onnx = pytest.importorskip("onnx")
    source, formats = open_source("tiny-cnn", nsamples=16), ("int4-channel+a:int8", "int8-channel+a:int8")
    quantize_model(
        source, tmp_path / "out", bits=6, formats=formats, target="onnxruntime", metric="output", progress=False
    )
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    scales = [part.float_data or part.raw_data for part in graph.initializer if part.name.endswith(".input.scale")]
    assert len(scales) == len(set(map(bytes, scales))) == len(find_layers(source.model))


def test_models_unknown_to_a_consumer_are_refused_before_any_work(tmp_path):
    source = open_source("tiny-cnn", nsamples=4)
    with pytest.raises(MpqError, match=r"llama\.cpp supports transformers' .* models, not TinyCNN: export to mpq"):
        quantize_model(source, tmp_path / "out", bits=5, target="llama.cpp", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_what_evolution_measures_is_the_paired_increase_with_its_error(share):
    source = open_source("tiny-cnn", nsamples=32, batch_size=8)
    table = profile(source.model, source.calibration, source.loss_fn, ("int2-g32", "int4-g32"), metric="fisher")
    allocation = dict(build_problem(table).uniform())["int2-g32"]
    found, error = measuring(source, "mse")(allocation, share)
    model = simulate(source.model, allocation, "mse", trainable=False)
    samples = [one for batch in source.calibration[: round(4 * share)] for one in split_batch(batch)]
    added = [source.loss_fn(model, one).item() - source.loss_fn(source.model, one).item() for one in samples]
    # A loss of a few in float32, in batches and alone: rounding is below 1e-5.
    assert found == pytest.approx(np.mean(added), abs=1e-5)
    assert error == pytest.approx(np.std(added, ddof=1) / len(added) ** 0.5, rel=1e-3)


def test_a_nan_loss_fails_only_its_allocation():
    source = open_source("tiny-cnn", nsamples=8)
    table = profile(source.model, source.calibration, source.loss_fn, ("int2-g32", "int4-g32"), metric="fisher")
    allocation = dict(build_problem(table).uniform())["int2-g32"]

    # A copy of the model keeps the hook, and only the original gives numbers.
    source.model.register_forward_hook(lambda model, args, out: out if model is source.model else out * math.nan)
    loss, error = measuring(source, "mse")(allocation, 1.0)
    assert math.isnan(loss)
    assert math.isnan(error)
