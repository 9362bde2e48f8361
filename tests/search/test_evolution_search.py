"""Evolution keeps budgets, improves on its start, measures nothing twice, and survives failing workers."""

import csv
import logging
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from evolve import problem_within, true_loss
from postgresql import postgresql
from problems import every_choice, make_problem

from mpq.core.errors import MpqError
from mpq.core.frontier import non_dominated
from mpq.search.evolution import SAMPLERS, evolution
from mpq.search.exact import exact
from mpq.search.trials import LOST, OUTCOME, open_storage, retry


class Recorder:
    """An evaluation function that records its calls."""

    def __init__(self, loss=true_loss):
        self.loss, self.asked, self.allocations = loss, [], []

    def __call__(self, allocation, share):
        self.asked.append((allocation.schemes, share))
        self.allocations.append(allocation)
        return self.loss(allocation, share)


@pytest.mark.parametrize("sampler", ["switch", *SAMPLERS])
def test_budgets_hold_nothing_is_measured_twice_and_the_start_is_beaten(sampler):
    problem, evaluate = problem_within(), Recorder()
    found = evolution(problem, evaluate=evaluate, trials=40, sampler=sampler)
    assert len(set(evaluate.asked)) == len(evaluate.asked) == 40
    for one in found.evaluations:
        assert problem.totals(one.choices)["size"] <= problem.budgets["size"]
        assert one.measured == true_loss(problem.allocation(one.choices))
        assert one.predicted == pytest.approx(problem.allocation(one.choices).loss)
    assert found.evaluations[0].choices == tuple(exact(problem).choices[-1])
    best = found.allocation(len(found) - 1)
    assert found.losses[-1] == min(one.measured for one in found.evaluations) == best.provenance["measured_loss"]
    assert found.losses[-1] < found.evaluations[0].measured
    assert true_loss(best) == pytest.approx(best.provenance["measured_loss"])


def test_a_small_space_is_searched_exhaustively(caplog):
    problem = replace(make_problem(1, 2), budgets={"size": 1e9})
    with caplog.at_level(logging.WARNING):
        found = evolution(problem, evaluate=true_loss, trials=1000)
    every = every_choice(problem)
    assert {one.choices for one in found.evaluations} == {tuple(choices) for choices in every.tolist()}
    assert "ended early" in caplog.text


def test_several_budgets_at_once():
    problem = problem_within()
    budgets = {"size": problem.budgets["size"], "bitops": float(np.median(problem.costs["bitops"], 1).sum())}
    problem = replace(problem, budgets=budgets)
    found = evolution(problem, evaluate=true_loss, trials=20, cost="bitops")
    for one in found.evaluations:
        totals = problem.totals(one.choices)
        assert all(totals[name] <= budget for name, budget in budgets.items())


def test_survivors_are_measured_on_more_data():
    problem, evaluate = problem_within(), Recorder()
    found = evolution(problem, evaluate=evaluate, trials=40, shares=(0.25, 1.0))
    whole = [schemes for schemes, share in evaluate.asked if share == 1]
    part = [schemes for schemes, share in evaluate.asked if share == 0.25]
    assert len(part) == len(set(part)) == 40
    assert set(whole) < set(part)
    assert len(whole) == len(set(whole)) == len(found.evaluations) == 40 - found.dropped
    assert 5 <= found.dropped <= 34
    for choices in exact(problem).choices[-4:]:  # starting points are never dropped
        assert tuple(choices) in {one.choices for one in found.evaluations}


def test_nan_losses_are_skipped_and_reported(caplog):
    def fails(schemes):
        return sum(map(ord, " ".join(schemes))) % 4 == 0

    def loss(allocation, share):
        return math.nan if fails(allocation.schemes) else true_loss(allocation, share)

    problem = problem_within()
    evaluate = Recorder(loss)
    with caplog.at_level(logging.WARNING):
        found = evolution(problem, evaluate=evaluate, trials=30)
    bad = sum(fails(schemes) for schemes, _ in evaluate.asked)
    assert bad > 0
    assert found.failures == bad
    assert len(found.evaluations) == 30 - bad
    assert f"{bad} of 30 evaluations did not return a finite number" in caplog.text
    with pytest.raises(MpqError, match="none of 10 evaluations returned a finite number"):
        evolution(problem, evaluate=lambda allocation, share: math.nan, trials=10)


@pytest.mark.parametrize("sampler", ["switch", "nsga2", "nsga3", "tpe"])
@pytest.mark.parametrize("stop", [2, 22])
def test_an_interrupted_search_resumes_with_identical_results(tmp_path, sampler, stop):
    problem = problem_within()
    whole = evolution(problem, evaluate=true_loss, trials=26, sampler=sampler, seed=3, shares=(0.5, 1.0))
    asked = Recorder()

    def interrupted(allocation, share):
        if len(asked.asked) == stop:
            raise KeyboardInterrupt
        return asked(allocation, share)

    settings = {"trials": 26, "sampler": sampler, "seed": 3, "shares": (0.5, 1.0), "storage": tmp_path / "journal"}
    with pytest.raises(KeyboardInterrupt):
        evolution(problem, evaluate=interrupted, **settings)
    again = Recorder()
    resumed = evolution(problem, evaluate=again, **settings)
    assert sorted(one.choices for one in resumed.evaluations) == sorted(one.choices for one in whole.evaluations)
    assert resumed.losses.tolist() == whole.losses.tolist()
    finished = {schemes for schemes, share in asked.asked if share == 1}
    assert not finished & {schemes for schemes, _ in again.asked}
    untouched = Recorder()
    assert evolution(problem, evaluate=untouched, **settings).losses.tolist() == whole.losses.tolist()
    assert not untouched.asked


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3", "tpe"])
def test_without_budgets_loss_and_cost_fall_together(tmp_path, sampler):
    problem, evaluate = replace(problem_within(), budgets={}), Recorder()
    whole = evolution(problem, evaluate=evaluate, trials=40, sampler=sampler)
    assert len(set(evaluate.asked)) == len(evaluate.asked) == len(whole.evaluations) == 40
    costs = [problem.totals(one.choices)["size"] for one in whole.evaluations]
    ends = exact(problem)
    assert {costs[0], costs[11]} == {ends.costs[0], ends.costs[-1]}  # it starts from both ends of the exact frontier
    kept = non_dominated(costs, [one.measured for one in whole.evaluations])
    assert whole.costs.tolist() == [costs[i] for i in kept]
    assert len(whole) >= 5
    middle = whole.at(size=float(np.mean(costs)) + problem.overhead)
    assert true_loss(middle) == middle.provenance["measured_loss"]

    asked = Recorder()

    def interrupted(allocation, share):
        if len(asked.asked) == 27:
            raise KeyboardInterrupt
        return asked(allocation, share)

    settings = {"trials": 40, "sampler": sampler, "storage": tmp_path / "journal"}
    with pytest.raises(KeyboardInterrupt):
        evolution(problem, evaluate=interrupted, **settings)
    resumed = evolution(problem, evaluate=asked, resume=True, **settings)
    assert sorted(one.choices for one in resumed.evaluations) == sorted(one.choices for one in whole.evaluations)


def test_children_come_from_the_best_not_the_worst():
    """Level switches stay close to their parent: nearer to one of the four best so far than to any of the worst."""
    evaluate = Recorder()
    evolution(problem_within(layers=16), evaluate=evaluate, trials=40, sampler="switch", starts=1)
    asked = [schemes for schemes, _ in evaluate.asked]
    losses = [evaluate.loss(allocation) for allocation in evaluate.allocations]

    def apart(child, parents):
        return min(sum(one != other for one, other in zip(child, parent, strict=True)) for parent in parents)

    best, worst = 0, 0
    for number in range(12, 40):
        ranked = [asked[place] for place in np.argsort(losses[:number])]
        best += apart(asked[number], ranked[:4])
        worst += apart(asked[number], ranked[-4:])
    assert best < worst


@pytest.mark.parametrize("sampler", ["nsga2", "nsga3"])
def test_starting_points_are_parents_of_genetic_samplers(tmp_path, sampler):
    problem = replace(problem_within(), budgets={})
    settings = {"sampler": sampler, "storage": tmp_path / "journal"}
    evolution(problem, evaluate=true_loss, trials=20, **settings)
    study = optuna.load_study(study_name="mpq", storage=open_storage(tmp_path / "journal"))
    known = study._storage.get_study_system_attrs(study._study_id)
    assert {value for name, values in known.items() if ":parent:" in name for value in values} & set(range(12))


def test_a_measured_frontier_is_written_with_what_was_predicted_and_measured(tmp_path):
    found = evolution(replace(problem_within(), budgets={}), evaluate=true_loss, trials=12)
    found.save(tmp_path / "frontier.csv")
    with open(tmp_path / "frontier.csv", newline="") as stream:
        assert stream.readline().startswith("# ")
        rows = list(csv.DictReader(stream))
    assert [float(row["measured"]) for row in rows] == found.losses.tolist()
    assert [float(row["loss"]) for row in rows] == [allocation.loss for allocation in found]


def test_a_killed_run_is_resumed_with_identical_results(tmp_path):
    whole = evolution(problem_within(), evaluate=true_loss, trials=16)
    storage, log = tmp_path / "journal", tmp_path / "log"
    settings = {"trials": 16, "storage": storage, "heartbeat": 0.1}
    with pytest.raises(MpqError, match=r"no study 'mpq' in .* to resume: nothing was begun there"):
        evolution(problem_within(), evaluate=true_loss, resume=True, **settings)
    assert not storage.exists()
    victim = run(storage, 16, log, 0.01, 9, tmp_path / "never")  # hangs in its tenth evaluation
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 10)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    asked = Recorder()
    resumed = evolution(problem_within(), evaluate=asked, resume=True, **settings)
    assert len(asked.asked) == 16 - 9  # the running evaluation was lost, and nothing else
    assert resumed.losses.tolist() == whole.losses.tolist()
    assert {one.choices for one in resumed.evaluations} == {one.choices for one in whole.evaluations}
    with pytest.raises(MpqError, match=r"no study 'other' in .* to resume: it holds 'mpq'"):
        evolution(problem_within(), evaluate=None, resume=True, study="other", storage=storage)
    with pytest.raises(MpqError, match="only a search with a storage can be resumed"):
        evolution(problem_within(), evaluate=None, resume=True)


def run(*arguments):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("evolve.py")), *map(str, arguments)]
    return subprocess.Popen(command, env=environment)


@pytest.fixture(params=["journal file", "PostgreSQL"])
def shared_storage(request, tmp_path):
    if request.param == "journal file":
        yield tmp_path / "journal"
    else:
        with postgresql() as url:
            yield url


def test_three_workers_share_a_study_and_one_is_killed(shared_storage, tmp_path):
    storage, log, killed = shared_storage, tmp_path / "log", tmp_path / "killed"
    victim = run(storage, 24, log, 0.02, 3, tmp_path / "never")  # hangs in its fourth evaluation
    others = []
    try:
        wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 4)
        others = [run(storage, 24, log, 0.1, 0, killed) for _ in range(2)]  # both start before either finishes
        wait_until(lambda: len({line.split()[0] for line in log.read_text().splitlines()}) == 3)
        os.kill(victim.pid, signal.SIGKILL)
        killed.touch()
        assert [worker.wait(120) for worker in others] == [0, 0]
    finally:
        for worker in (victim, *others):
            worker.kill()
            worker.wait()
    lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    lost = [allocation for pid, allocation in lines if pid == str(victim.pid)][3]
    measured = [allocation for _, allocation in lines]
    assert measured.count(lost) == 2  # the killed worker's evaluation was done again, by another
    measured.remove(lost)
    assert len(measured) == len(set(measured))  # and nothing else was repeated
    assert 24 <= len(measured) <= 25  # nor lost; both may begin the last one at the same moment
    trials = optuna.load_study(study_name="mpq", storage=open_storage(storage)).get_trials()
    assert sum(trial.user_attrs.get(OUTCOME) == LOST for trial in trials) == 1
    found = evolution(problem_within(), evaluate=None, trials=24, storage=storage)
    assert len(found.evaluations) == len(measured)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_databases_are_storages_too(tmp_path):
    settings = {"trials": 8, "storage": f"sqlite:///{tmp_path / 'study.db'}", "study": "one"}
    found = evolution(problem_within(), evaluate=true_loss, **settings)
    again = evolution(problem_within(), evaluate=None, **settings)
    assert again.evaluations == found.evaluations


def test_invalid_arguments_are_refused(tmp_path):
    problem = problem_within()
    free = replace(problem, budgets={})
    for wrong in ({"sampler": "switch"}, {"sampler": "nsga2", "shares": (0.5, 1.0)}):
        with pytest.raises(MpqError, match="need at least one budget"):
            evolution(free, evaluate=true_loss, **wrong)
    with pytest.raises(MpqError, match="unknown cost 'time'"):
        evolution(free, evaluate=true_loss, cost="time")
    with pytest.raises(MpqError, match="unknown sampler 'tp'"):
        evolution(problem, evaluate=true_loss, sampler="tp")
    with pytest.raises(MpqError, match=r"invalid shares of the data 0\.5, 0\.2"):
        evolution(problem, evaluate=true_loss, shares=(0.5, 0.2))
    with pytest.raises(MpqError, match="below the smallest"):
        evolution(replace(problem, budgets={"size": 1.0}), evaluate=true_loss)
    evolution(problem, evaluate=true_loss, trials=2, storage=tmp_path / "journal")
    with pytest.raises(MpqError, match="of another problem, seed or fidelity"):
        evolution(problem, evaluate=true_loss, trials=2, storage=tmp_path / "journal", seed=1)


def test_a_worker_presumed_dead_drops_its_result_and_continues(tmp_path, caplog):
    problem, storage = problem_within(), tmp_path / "journal"
    stolen = []

    def evaluate(allocation, share):
        if not stolen:
            study = optuna.load_study(study_name="mpq", storage=open_storage(storage))
            running = study.get_trials()[-1]
            stolen.append(running.number)
            retry(study, running)
        return true_loss(allocation, share)

    found = evolution(problem, evaluate=evaluate, trials=8, storage=storage)
    assert len(found.evaluations) == 8
    assert "trial 0 missed its heartbeat" in caplog.text
