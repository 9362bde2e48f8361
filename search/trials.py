"""Trials in a storage shared by workers: claimed once, kept alive by a heartbeat, retried when a worker dies."""

import json
import logging
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from mpq.core.errors import MpqError
from mpq.core.files import refusals
from mpq.core.reading import DAMAGE, reading

log = logging.getLogger(__name__)

CHECKSUM = "crc32"  # key of the checksum in each line of a journal file, of the line and all before it
TAIL = 65536  # bytes read to find the last line of a journal file, unless it is longer
FIRST = b'{"op_code"'  # first bytes of a journal file
WAITS = (0.2, 1.0, 3.0)  # seconds between attempts to make the tables of a database
MISSED_BEATS = 5  # missed heartbeats after which a worker is suspected
CLAIM_WAIT = 0.05  # seconds between checks of another worker's claim
CONFIRMING_BEATS = 3  # further missed heartbeats after which it is considered dead
TAKEN_FOR_DEAD = "trial %d missed its heartbeats and was given to another worker: its result is dropped"

# User attributes of trials.
KEY = "key"  # the allocation that is measured
HELD = "held"  # it holds the claim on the allocation
BEAT = "beat"  # seconds since 1970 of the last heartbeat
ERROR = "error"  # standard error of the measured loss, if known
START = "start"  # a starting point, which is never dropped
OUTCOME = "outcome"  # how the trial ended: one of those below
MEASURED, DROPPED, NO_NUMBER, DUPLICATE, LOST = "measured", "dropped", "no number", "duplicate", "lost"


def open_storage(storage: str | os.PathLike[str] | None) -> BaseStorage:
    """Memory for None, a database for a URL ("postgresql://..."), else a journal file, which workers may share."""
    if storage is None:
        return InMemoryStorage()
    name = os.fspath(storage)
    if "://" in name:
        try:
            return _database(name)
        except Exception as error:  # exceptions of SQLAlchemy and the drivers
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            remedy = "expected e.g. sqlite:///FILE, or postgresql:// with mpq[postgresql] installed"
            raise MpqError(f"the storage {name} cannot be opened ({reason}): {remedy}") from error
    with refusals(name):
        os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
    with reading(name, "journal of a search", "delete it to start again"):
        return JournalStorage(CheckedJournal(name))


def _database(url: str) -> RDBStorage:
    """The database, PostgreSQL's through psycopg2 where it is installed.

    Workers that start at the same time conflict while they create its tables, so that is retried.
    """
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql") and find_spec("psycopg2") is not None:
        url = f"postgresql+psycopg2{separator}{rest}"  # SQLAlchemy's own default differs between versions
    for wait in WAITS:
        try:
            return RDBStorage(url)
        except Exception as error:
            if "already exists" not in str(error) and "duplicate key" not in str(error):
                raise
            time.sleep(wait)
    return RDBStorage(url)


class CheckedJournal(JournalFileBackend):
    """Optuna's journal file with a chained checksum in each line; a torn last line of a killed worker is dropped."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._before = {0: 0}  # line number -> checksum of the line before it
        self._lock.acquire()
        try:
            content = Path(path).read_bytes()
            if content[: len(FIRST)] != FIRST[: len(content)]:
                raise ValueError("its first line is not a search's")
            os.truncate(path, content.rfind(b"\n") + 1)
        finally:
            self._lock.release()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write the lines at the end."""
        self._lock.acquire()
        try:
            with open(self._file_path, "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                before = _last_checksum(file, size, min(size, TAIL))
                for entry in logs:
                    before = _checksum(entry, before)
                    file.write(json.dumps({**entry, CHECKSUM: before}, separators=(",", ":")).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        finally:
            self._lock.release()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The lines from this one on; MpqError at an altered one."""
        start = log_number_from if log_number_from in self._before else 0
        for number, entry in enumerate(self._parsed(start), start):
            recorded = entry.pop(CHECKSUM, None)
            if recorded != _checksum(entry, self._before[number]):
                raise self._altered("a line's checksum differs")
            self._before[number + 1] = recorded
            if number >= log_number_from:
                yield entry

    def _parsed(self, start: int) -> Iterator[dict[str, Any]]:
        lines = super().read_logs(start)
        while True:
            try:
                entry = next(lines, None)
            except DAMAGE as error:
                raise self._altered("a line is no JSON") from error
            if entry is None:
                return
            if not isinstance(entry, dict):
                raise self._altered("a line is no JSON object")
            yield entry

    def _altered(self, reason: str) -> MpqError:
        return MpqError(f"{self._file_path} was altered ({reason}): delete it to start again")


def _last_checksum(file: BinaryIO, size: int, tail: int) -> int:
    """The checksum of the last whole line of a journal file, which is cut behind it and ready to be written there."""
    file.seek(size - tail)
    *lines, torn = file.read(tail).split(b"\n")
    if len(lines) < 2 and tail < size:
        return _last_checksum(file, size, size)
    file.seek(size - len(torn))
    file.truncate()
    return int(json.loads(lines[-1])[CHECKSUM]) if lines else 0


def _checksum(entry: Mapping[str, Any], before: int) -> int:
    """The checksum of a line's content, continuing that of the line before it."""
    return crc32(json.dumps(json.loads(json.dumps(entry)), sort_keys=True).encode(), before)


def open_study(
    storage: str | os.PathLike[str] | None, name: str, settings: str, *, objectives: int = 1, resume: bool = False
) -> optuna.Study:
    """The study of this name; a new one is created unless `resume` requires an existing one.

    Raises:
        MpqError: it was made with other settings, or is not there to be resumed.
    """
    if resume:
        _check_resumable(storage, name)
    study = optuna.create_study(
        storage=open_storage(storage), study_name=name, load_if_exists=True, directions=["minimize"] * objectives
    )
    recorded = study.user_attrs.get("settings")
    if recorded is None:
        study.set_user_attr("settings", settings)
    elif recorded != settings:
        raise MpqError(
            f"the study {name!r} in {storage} is of another problem, seed or fidelity: use the same ones to resume "
            "it, or choose another name for the new one"
        )
    made = spent(trials_of(study))
    if made and not resume:
        log.warning("resuming the study %r in %s after %d evaluations", name, storage, made)
    return study


def _check_resumable(storage: str | os.PathLike[str] | None, name: str) -> None:
    if storage is None:
        raise MpqError("only a search with a storage can be resumed: name the journal file or database it used")
    path = os.fspath(storage)
    known = [] if "://" not in path and not os.path.exists(path) else optuna.get_all_study_names(open_storage(path))
    if name not in known:
        others = f"it holds {', '.join(map(repr, known))}" if known else "nothing was begun there"
        raise MpqError(f"there is no study {name!r} in {path} to resume: {others}; leave resume out to begin it")


def trials_of(study: optuna.Study) -> list[FrozenTrial]:
    """All trials in the storage."""
    return study.get_trials(deepcopy=False)


def _running(study: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in trials_of(study) if trial.state is TrialState.RUNNING]


def settled(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Finished trials of any outcome, without lost ones, which are repeated."""
    return [trial for trial in trials if trial.user_attrs.get(OUTCOME, LOST) != LOST and trial.state.is_finished()]


def spent(trials: list[FrozenTrial]) -> int:
    """Evaluations made so far."""
    return sum(trial.user_attrs[OUTCOME] != DUPLICATE for trial in settled(trials))


def settle(study: optuna.Study, trial: Trial, outcome: str, values: Sequence[float] | None = None) -> None:
    """End a trial. If it was retired meanwhile, its result is dropped with a warning."""
    states = {NO_NUMBER: TrialState.FAIL, LOST: TrialState.FAIL, DROPPED: TrialState.PRUNED}
    state = TrialState.COMPLETE if values is not None else states.get(outcome, TrialState.PRUNED)
    try:
        trial.set_user_attr(OUTCOME, outcome)
        study.tell(trial, values, state=state)
    except (UpdateFinishedTrialError, ValueError):
        log.warning(TAKEN_FOR_DEAD, trial.number)


@contextmanager
def alive(trial: Trial, interval: float) -> Iterator[None]:
    """Send heartbeats for a trial while the block runs."""
    done = threading.Event()

    def beat() -> None:
        with suppress(UpdateFinishedTrialError):
            while not done.wait(interval):
                trial.set_user_attr(BEAT, time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Watch:
    """Finds dead workers and requeues their trials."""

    # Time alone is not enough: a worker killed during a write leaves the journal locked for half a minute, in which no
    # # heartbeats arrive. A suspect is therefore retired only after a write of ours succeeded and it missed further #
    # heartbeats.

    def __init__(self, study: optuna.Study, interval: float) -> None:
        self.study, self.interval = study, interval
        self.suspects: dict[int, tuple[float, float]] = {}  # trial number -> last heartbeat, suspected since

    def wait_for_signs(self) -> None:
        """Wait until every running trial has sent a heartbeat or was retired."""
        before = {trial.number: trial.user_attrs.get(BEAT) for trial in _running(self.study)}
        while any(before.get(trial.number, 0.0) == trial.user_attrs.get(BEAT) for trial in _running(self.study)):
            time.sleep(self.interval / 2)
            self.retire_dead()

    def retire_dead(self) -> None:
        """Suspect trials without heartbeats, and retire those suspected long enough."""
        suspects = {}
        for trial in _running(self.study):
            started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            beat = trial.user_attrs.get(BEAT, started)
            if time.time() - beat <= MISSED_BEATS * self.interval:
                continue
            known, since = self.suspects.get(trial.number, (None, 0.0))
            if known != beat:
                self.study.set_user_attr("watch", time.time())
                suspects[trial.number] = beat, time.monotonic()
            elif time.monotonic() - since > CONFIRMING_BEATS * self.interval:
                retry(self.study, trial)
            else:
                suspects[trial.number] = beat, since
        self.suspects = suspects


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Mark a running trial as lost, and queue its parameters, unless another worker did."""
    try:
        Trial(study, trial._trial_id).set_user_attr(OUTCOME, LOST)
        study.tell(trial.number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return
    log.warning("trial %d was lost with its worker: it is repeated", trial.number)
    kept = {START: True} if START in trial.user_attrs else {}
    enqueue(study, trial.params, {"retry_of": trial.number, **kept}, trial.system_attrs)


def claim(study: optuna.Study, trial: Trial, key: str, watch: Watch) -> FrozenTrial | None:
    """Reserve an allocation for this trial; returns None on success, else the trial that holds it.

    Writing precedes reading, so that of two workers at least one sees the other. It yields to a trial that holds the
    allocation and to claims of lower numbers, and waits for the outcome of claims of higher numbers.
    """
    trial.set_user_attr(KEY, key)
    trial.set_user_attr(BEAT, time.time())
    while rivals := [other for other in trials_of(study) if other.number != trial.number and _has(other, key)]:
        for other in rivals:
            if other.number < trial.number or HELD in other.user_attrs or other.state.is_finished():
                return other
        time.sleep(CLAIM_WAIT)
        watch.retire_dead()
    trial.set_user_attr(HELD, True)
    return None


def _has(trial: FrozenTrial, key: str) -> bool:
    """Whether the trial claims an allocation, holds it or has measured it."""
    return trial.user_attrs.get(KEY) == key and trial.user_attrs.get(OUTCOME) not in (DUPLICATE, LOST)


def enqueue(
    study: optuna.Study, params: Mapping[str, Any], attributes: Mapping[str, Any], marks: Mapping[str, Any]
) -> None:
    """`study.enqueue_trial`, with a sampler's system attributes, in which genetic samplers store the generation."""
    marks = {**marks, "fixed_params": dict(params)}
    study.add_trial(create_trial(state=TrialState.WAITING, system_attrs=marks, user_attrs=dict(attributes)))
