"""Evolution recovers a benchmark's formula, is deterministic, resumes, and refuses mismatched inputs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "sensitivity"))
from small_models import Convolutions, class_batches, seed_weights

from mpq.core.errors import MpqError
from mpq.network.calibration import cross_entropy
from mpq.proxies.benchmark import Benchmark
from mpq.proxies.collect import collect_statistics
from mpq.proxies.evaluate import Evaluator
from mpq.proxies.evolution import Individual, Settings, _State, evolve, evolve_across, random_search, valid_fraction
from mpq.proxies.formulas import parse
from mpq.proxies.genomes import COUPLINGS, SHAPES, SOURCES, Genome, Pool, cross, program_of
from mpq.proxies.history import curves, load_history, plot_history, save_history
from mpq.proxies.measuring import draw_configurations
from mpq.proxies.programs import formula, kind_of
from mpq.proxies.ranking import steady_fitness
from mpq.proxies.screening import Judge

SCHEMES = ("int2-channel", "int3-channel", "int4-channel")


def world(truth: str = "sum(fisher * square(error))", rows: int = 60):
    """A benchmark whose losses are a known formula's, and the statistics of its model."""
    model = seed_weights(Convolutions()).eval()
    statistics = collect_statistics(model, class_batches((4, 6, 6)), cross_entropy, SCHEMES)
    choices = draw_configurations(statistics.layers, [[0, 1, 2]] * 4, rows, seed=0)
    empty = np.zeros(rows)
    facts = {"weights": statistics.provenance["weights"]}
    benchmark = Benchmark(statistics.layers, SCHEMES, choices, empty, empty * np.nan, facts)
    losses = benchmark.totals(Evaluator(statistics).table(parse(truth)))
    return replace(benchmark, losses=losses), statistics


BENCHMARK, STATISTICS = world()
SMALL = Settings(population=20, generations=30, offspring=5, seed=1)


def run(settings=SMALL, **options):
    return evolve(BENCHMARK, STATISTICS, settings, progress=False, **options)


def test_evolution_finds_the_true_ranking_and_beats_random_search():
    result = run(replace(SMALL, generations=100))
    assert result.best.fitness > 0.95
    chance = [random_search(BENCHMARK, STATISTICS, result.fates["judged"], seed).fitness for seed in range(3)]
    assert result.best.fitness >= np.median(chance)
    assert result.best.fitness >= max(individual.fitness for individual in result.population)
    judge = Judge(BENCHMARK, Evaluator(STATISTICS))
    assert judge.fitness(result.best.genome) == pytest.approx(result.best.fitness)
    assert parse(result.best.formula) == result.best.program


def test_evolution_across_models_ranks_all_of_them():
    """The other model's losses follow another formula: the best on one model alone is not the best on both."""
    other = world("sum(fisher * square(error)) + 0.05 * sum(square(error))", rows=40)
    settings = replace(SMALL, generations=40)
    found = evolve_across([(BENCHMARK, STATISTICS), other], settings, progress=False)
    values = [
        steady_fitness(rows.totals(Evaluator(numbers).table(found.best.program)), rows)
        for rows, numbers in ((BENCHMARK, STATISTICS), other)
    ]
    assert found.best.fitness == pytest.approx(np.mean(values))
    assert found.best.fitness > 0.9
    assert found.fates["judged"] > 100
    assert found == evolve_across([(BENCHMARK, STATISTICS), other], settings, progress=False)
    with pytest.raises(MpqError, match="no models"):
        evolve_across([], settings)
    stranger = replace(BENCHMARK, provenance={"weights": "others"})
    with pytest.raises(MpqError, match="different models"):
        evolve_across([(stranger, STATISTICS)], settings)


@pytest.mark.parametrize("removal", ["worst", "oldest"])
def test_the_same_seed_gives_the_same_run(removal):
    settings = replace(SMALL, generations=8, removal=removal)
    one, two, other = run(settings), run(settings), run(replace(settings, seed=2))
    assert one == two
    assert one.history != other.history
    assert len(one.population) == 20
    assert [generation.best for generation in one.history] == sorted(generation.best for generation in one.history)


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path):
    whole, path = run(), tmp_path / "state.json"
    run(replace(SMALL, generations=11), resume=path)
    resumed = run(resume=path)
    assert resumed == whole
    assert run(resume=path) == whole
    with pytest.raises(MpqError, match="other settings \\(seed\\)"):
        run(replace(SMALL, seed=5), resume=path)
    with pytest.raises(MpqError, match=r"other settings \(rows\)"):
        evolve(BENCHMARK.take(range(30)), STATISTICS, SMALL, resume=path, progress=False)
    path.write_text(json.dumps({"settings": 1}))
    with pytest.raises(MpqError, match="not a valid state of an evolution"):
        run(resume=path)


def test_the_history_is_a_file_and_a_figure(tmp_path):
    history = run().history
    save_history(tmp_path / "history.csv", history)
    assert load_history(tmp_path / "history.csv") == history
    facts = curves(history)
    assert facts.best == tuple(generation.best for generation in history)
    assert facts.steps[-1][1:] == (history[-1].best, history[-1].formula)
    plot_history(history).savefig(tmp_path / "history.png")
    (tmp_path / "history.csv").write_text("a,b\n1,2\n")
    with pytest.raises(MpqError, match="not a history"):
        load_history(tmp_path / "history.csv")


def test_parents_are_of_the_better_half():
    """Children keep the shape of a parent, here of the better half's."""
    random = np.random.default_rng(0)
    state = _State(Judge(BENCHMARK, Evaluator(STATISTICS)), SMALL)
    for number in range(10):
        shape = "branched" if number % 2 else "sequential"
        state.population.append(Individual(replace(SMALL.pool, shapes=(shape,)).draw(random), float(number % 2)))
    children = [child.genome.shape for child in (state.child(random) for _ in range(30)) if child is not None]
    assert len(children) > 5
    assert set(children) == {"branched"}


def genome(unary, inputs=("weight", "grad"), binary="multiply", coupling="bits") -> Genome:
    return Genome("branched", inputs, unary, (binary,), coupling)


def test_screening_names_the_reason():
    judge = Judge(BENCHMARK, Evaluator(STATISTICS))
    cases = {
        "kinds": [
            genome(("", "", "", ""), inputs=("weight", "act")),
            genome(("mean", "mean", "", "")),
            genome(("", "", "", ""), coupling="none"),
        ],
        "finite": [genome(("log", "", "", ""))],
        "constant": [genome(("sign", "", "", ""), inputs=("fisher", "weight"), binary="multiply")],
        "judged": [genome(("abs", "", "abs", ""))],
        "duplicate": [genome(("", "", "", ""), binary="multiply"), genome(("abs", "abs", "abs", ""))],
    }
    assert judge.fitness(cases["judged"][0]) is not None
    assert judge.fitness(cases["duplicate"][1]) is None
    assert judge.fates == {"judged": 1, "duplicate": 1}
    for case in cases["kinds"] + cases["finite"]:
        assert judge.fitness(case) is None
    assert judge.fates["kinds"] == 3
    assert judge.fates["finite"] == 1
    constant = genome(("relu", "neg", "relu", ""), inputs=("fisher", "fisher"), binary="matmul", coupling="bits")
    constant = replace(constant, unary=("neg", "relu", "", ""))
    assert judge.fitness(constant) is None
    assert judge.fates["constant"] == 1


def test_genes_decode_to_programs_of_their_shape():
    assert formula(program_of(genome(("softmax", "", "relu", "sqrt")))) == (
        "-bits * mean(softmax(weight) * sqrt(relu(grad)))"
    )
    line = Genome("sequential", ("trace",), ("log", "", "abs", ""), (), "error")
    assert formula(program_of(line)) == "abs(log(trace)) * sum(square(error))"
    graph = Genome("dag", ("trace", "params"), ("log", "", "", "", "", "", "", "abs", "neg"), (), "bits")
    first = "(log(trace) + params)"
    second = f"(trace + params + {first})"
    assert formula(program_of(graph)) == f"-bits * (trace + params + abs{first} + -{second})"


@pytest.mark.parametrize("prioritize", [False, True])
def test_drawn_crossed_and_mutated_genomes_are_of_the_pool(prioritize):
    pool, random = Pool(prioritize=prioritize, inputs=("weight", "trace")), np.random.default_rng(0)
    changed = 0
    for _ in range(300):
        one, other = pool.draw(random), pool.draw(random)
        mutant, child = pool.mutate(one, random), cross(one, other, random)
        for each in (one, mutant, child):
            assert (len(each.inputs), len(each.unary), len(each.binary)) == SHAPES[each.shape]
            assert set(each.inputs) <= {"weight", "trace"}
            assert each.coupling in COUPLINGS
        for mine, first, second in zip(child.unary, one.unary, other.unary, strict=False):
            assert mine in (first, second)
        changed += mutant != one
    assert changed > 200


def test_prioritization_makes_more_programs_valid():
    """Of 600 draws each; a share of 0.2 has a standard error of 0.016, so a gain of 0.05 is three of them."""
    plain, aided = (
        valid_fraction(BENCHMARK, STATISTICS, Pool(("branched",), prioritize=aid), 600) for aid in (False, True)
    )
    assert aided > plain + 0.05


def test_mismatched_inputs_are_refused():
    other = replace(STATISTICS, provenance={"weights": "others"})
    with pytest.raises(MpqError, match="different models"):
        evolve(BENCHMARK, other, SMALL)
    fewer = replace(STATISTICS, schemes=SCHEMES[:2])
    with pytest.raises(MpqError, match="other layers or schemes"):
        evolve(BENCHMARK, fewer, SMALL)
    partial = replace(STATISTICS, numbers={name: STATISTICS.get(name) for name in ("weight", "bits")})
    with pytest.raises(MpqError, match="hold no 'grad'"):
        evolve(BENCHMARK, partial, SMALL)
    for options, message in (({"population": 2}, "population of at least 4"), ({"removal": "best"}, "unknown removal")):
        with pytest.raises(MpqError, match=message):
            Settings(**options)
    with pytest.raises(MpqError, match="unknown gene 'wait'"):
        Pool(inputs=("wait",))
    assert set(SOURCES) < set(STATISTICS.numbers)
    assert kind_of(parse("mean(weight)")).space == "layer"
    assert torch.is_grad_enabled()
