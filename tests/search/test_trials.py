"""Which workers count as dead."""

import threading
import time

import pytest
from optuna.trial import TrialState

from mpq.search.trials import (
    BEAT,
    CONFIRMING_BEATS,
    DUPLICATE,
    KEY,
    LOST,
    MISSED_BEATS,
    OUTCOME,
    Watch,
    claim,
    open_study,
    retry,
    settle,
    trials_of,
)

INTERVAL = 0.05


@pytest.fixture
def study():
    return open_study(None, "one", "settings")


def test_only_a_suspected_worker_without_a_heartbeat_is_dead(study):
    study.ask().set_user_attr(BEAT, time.time() - 2 * MISSED_BEATS * INTERVAL)
    watch = Watch(study, INTERVAL)
    watch.retire_dead()
    watch.retire_dead()
    assert trials_of(study)[0].state is TrialState.RUNNING
    time.sleep(1.1 * CONFIRMING_BEATS * INTERVAL)
    watch.retire_dead()
    lost, again = trials_of(study)
    assert [lost.state, again.state] == [TrialState.FAIL, TrialState.WAITING]
    assert lost.user_attrs[OUTCOME] == LOST
    assert again.user_attrs["retry_of"] == lost.number


def test_a_late_heartbeat_clears_a_worker(study):
    trial = study.ask()
    trial.set_user_attr(BEAT, time.time() - 2 * MISSED_BEATS * INTERVAL)
    watch = Watch(study, INTERVAL)
    watch.retire_dead()
    # The journal was locked, so that its clock is late, too.
    trial.set_user_attr(BEAT, time.time() - 1.5 * MISSED_BEATS * INTERVAL)
    time.sleep(1.1 * CONFIRMING_BEATS * INTERVAL)
    watch.retire_dead()
    assert [one.state for one in trials_of(study)] == [TrialState.RUNNING]
    trial.set_user_attr(BEAT, time.time())
    watch.retire_dead()
    assert not watch.suspects


def test_a_trial_without_a_heartbeat_counts_from_its_start(study):
    study.ask()
    Watch(study, 60.0).retire_dead()
    assert trials_of(study)[0].state is TrialState.RUNNING


def claim_both(study, ending):
    """Two trials claim an allocation at the same moment and the second ends in a given state; the first one's claim."""
    first, second = study.ask(), study.ask()
    first.set_user_attr(KEY, "1 2")
    second.set_user_attr(KEY, "1 2")
    found = []
    waiting = threading.Thread(target=lambda: found.append(claim(study, first, "1 2", Watch(study, INTERVAL))))
    waiting.start()
    ending(second)
    waiting.join(60)
    return found


def test_of_two_claims_in_the_same_moment_one_is_granted(study):
    def gives_way(trial):
        other = claim(study, trial, "1 2", Watch(study, INTERVAL))
        assert other is not None
        assert other.number == 0
        settle(study, trial, DUPLICATE)

    assert claim_both(study, gives_way) == [None]


def test_a_claim_outlives_a_rival_that_dies(study):
    assert claim_both(study, lambda trial: retry(study, trials_of(study)[trial.number])) == [None]


def test_claimed_allocations_are_not_granted_again(study):
    first, second = study.ask(), study.ask()
    assert claim(study, second, "1 2", Watch(study, INTERVAL)) is None
    other = claim(study, first, "1 2", Watch(study, INTERVAL))
    assert other is not None
    assert other.number == second.number
