"""Environments of consumers are found, built, or refused with a reason."""

import subprocess
import sys

import pytest

from experiments.peers import environments
from experiments.peers.environments import Environment, Unavailable, python_of


def test_an_installed_program_needs_no_separate_environment(tmp_path):
    assert python_of("onnxruntime", tmp_path) == sys.executable
    assert not list(tmp_path.iterdir())


def test_an_existing_environment_is_reused(tmp_path, monkeypatch):
    monkeypatch.setitem(environments.ENVIRONMENTS, "json", Environment("json", ("no-such-package",)))
    (tmp_path / "json" / "bin").mkdir(parents=True)
    (tmp_path / "json" / "bin" / "python").symlink_to(sys.executable)
    assert python_of("json", tmp_path) == str(tmp_path / "json" / "bin" / "python")


def test_failed_installations_are_reported(tmp_path, monkeypatch):
    wanted = Environment("nothing", ("--no-index", "--find-links", str(tmp_path), "mpq-no-such-package"))
    monkeypatch.setitem(environments.ENVIRONMENTS, "nothing", wanted)
    with pytest.raises(Unavailable, match=r"nothing could not be installed within 1 minutes: .*mpq-no-such-package"):
        python_of("nothing", tmp_path, minutes=1)


def test_a_timed_out_installation_is_killed_with_its_children(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        environments._run(["bash", "-c", f"(sleep 2; touch {tmp_path}/late) & wait"], {}, 0.0)
    assert subprocess.run(["pgrep", "-f", f"touch {tmp_path}/late"], check=False).returncode
