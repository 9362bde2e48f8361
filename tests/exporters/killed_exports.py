"""Kill an export after each rename, removal and write, then check that the same export completes; run by a test.

It forks, so it needs a separate process without threads.
"""

import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.files import DRAFT
from mpq.exporters import export, shards
from mpq.exporters.folder import WRITING
from mpq.exporters.mpq.checkpoint import load
from mpq.network.layers import find_layers

KILLED = 9
STEPS = [(os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "chmod"), (Path, "write_text"), (shards, "save_file")]
RANDOM_KILLS = 10


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


MODELS = {"old": (network(0), "int8-channel"), "new": (network(1), "int4-channel")}


def write(which: str, folder: Path) -> None:
    model, scheme = MODELS[which]
    layers = find_layers(model)
    shard = 300 if which == "old" else 10**9  # the old export has more files than the new one
    export(model, Allocation(layers, (scheme,) * len(layers)), folder, shard=shard)


def outputs(folder: Path) -> torch.Tensor | None:
    try:
        return load(folder, model=network(2))(torch.ones(1, 32))
    except MpqError:
        return None


def child(work: Callable[[], None]) -> int:
    """Exit status of the work in a forked process."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_after(step: int, folder: Path) -> None:
    """Export, and die after `steps` file operations."""
    left = step

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            result = function(*arguments, **options)
            left -= 1
            if left == 0:
                os._exit(KILLED)
            return result

        return call

    for owner, name in STEPS:
        setattr(owner, name, dying(getattr(owner, name)))
    write("new", folder)


def killed_in_child(step: int, folder: Path) -> int:
    return child(partial(killed_after, step, folder))


def killed_at(delay: float, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        write("new", folder)
        os._exit(0)
    time.sleep(delay)
    os.kill(pid, KILLED)
    os.waitpid(pid, 0)
    return KILLED


def check(home: Path, fresh: bool, kill: Callable[[Path], int], expected: dict[str, torch.Tensor]) -> int:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    folder = home / "out"
    if not fresh:
        shutil.copytree(home.parent / "old", folder)
        (folder / "mine.txt").write_text("mine")
    status = kill(folder)
    found = outputs(folder)
    assert found is None or any(torch.equal(found, other) for other in expected.values()), "a mixed folder loads"
    write("new", folder)
    after = outputs(folder)
    assert after is not None
    assert torch.equal(after, expected["new"])
    left = [str(path) for path in home.rglob("*") if DRAFT in path.name or path.name == WRITING]
    assert not left, left
    assert fresh or (folder / "mine.txt").read_text() == "mine"
    return status


def main(home: Path) -> None:
    expected = {}
    for which in MODELS:
        write(which, home / which)
        found = outputs(home / which)
        assert found is not None
        expected[which] = found
    for fresh in (True, False):
        step, status = 0, KILLED
        while status == KILLED:
            step += 1
            status = check(home / "case", fresh, partial(killed_in_child, step), expected)
        assert status == 0, status
        print(f"fresh {fresh}: {step - 1} kills")
    draw = random.Random(0)
    for i in range(RANDOM_KILLS):
        check(home / "case", bool(i % 2), partial(killed_at, draw.uniform(0, 0.03)), expected)
    print(f"{RANDOM_KILLS} random kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
