"""Who is taken for dead, and who is not."""

import time

import pytest
from optuna.trial import TrialState

from mpq.search.trials import BEAT, CONFIRMING_BEATS, LOST, MISSED_BEATS, OUTCOME, Watch, open_study, trials_of

INTERVAL = 0.05


@pytest.fixture
def study():
    return open_study(None, "one", "settings")


def test_only_a_worker_that_stays_silent_under_suspicion_is_dead(study):
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


def test_a_late_sign_of_life_clears_a_worker(study):
    trial = study.ask()
    trial.set_user_attr(BEAT, time.time() - 2 * MISSED_BEATS * INTERVAL)
    watch = Watch(study, INTERVAL)
    watch.retire_dead()
    # As late as the journal was locked, which is why its clock reads what looks like silence too.
    trial.set_user_attr(BEAT, time.time() - 1.5 * MISSED_BEATS * INTERVAL)
    time.sleep(1.1 * CONFIRMING_BEATS * INTERVAL)
    watch.retire_dead()
    assert [one.state for one in trials_of(study)] == [TrialState.RUNNING]
    trial.set_user_attr(BEAT, time.time())
    watch.retire_dead()
    assert not watch.suspects


def test_a_running_trial_without_a_sign_of_life_counts_from_its_start(study):
    study.ask()
    Watch(study, 60.0).retire_dead()
    assert trials_of(study)[0].state is TrialState.RUNNING
