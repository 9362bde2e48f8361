"""Two processes over gloo: shares, sums, and tables equal to those of one process."""

import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from mpq.core.table import SensitivityTable
from mpq.network.parallel import gathered, processes, rank_and_count, share, total
from mpq.sensitivity.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    ("kronecker", {}, 5),
    ("output", {}, 5),
    ("fisher", {"labels": "model"}, 5),
    ("hessian", {"max_probes": 4, "target": 0.0, "settle": 0.0}, 3),
    ("hessian", {"max_probes": 2}, 1),  # fewer batches than processes: they split the probes
    ("eigenvalue", {"max_steps": 3}, 3),
    ("quadratic", {}, 3),
    ("linearity", {}, 3),
    ("loss", {}, 3),
    ("divergence", {}, 3),
]  # metric, options, batches
SCHEMES = ("int3-channel", "int4-g32+a:int8-token")
WEIGHTS_ONLY = ("fisher", "eigenvalue", "linearity")


def tables(folder: Path | None = None) -> list[np.ndarray]:
    from mpq.network.calibration import cross_entropy
    from mpq.sensitivity.profile import profile
    from tests.sensitivity.small_models import Convolutions, class_batches, seed_weights

    found = []
    for number, (metric, options, count) in enumerate(CASES):
        model = seed_weights(Convolutions())
        table = profile(
            model, class_batches((4, 6, 6), (4, 3, 4, 4, 2)[:count]), cross_entropy,
            SCHEMES[:1] if metric in WEIGHTS_ONLY else SCHEMES, metric=metric, options=options, progress=False,
            method="gptq" if metric == "kronecker" else "mse",
            resume=None if folder is None else folder / f"{number}.unfinished",
        )  # fmt: skip
        found.append(np.stack([table.scores, table.errors]))
    return found


def work(rank: int, count: int, folder: Path) -> None:
    """Work of each process; assertions fail the test."""
    torch.set_num_threads(1)
    import_module("torch.distributed.nn.functional")  # before there is a group, as in mpq.network.parallel
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    assert rank_and_count() == (0, 1)  # outside of the block there are no collectives
    with processes():
        assert rank_and_count() == (rank, count)
        assert share(range(5)) == range(rank, 5, 2)
        assert share(range(5), adjacent=True) == (range(2), range(2, 5))[rank]
        assert gathered({rank: rank, "last": rank}) == {0: 0, 1: 1, "last": 1}
        sums = total({"both": torch.ones(2), rank: torch.full((2, 3), 7)})
        assert sums["both"].tolist() == [2, 2]
        assert sums[0].tolist() == sums[1].tolist() == [[7] * 3] * 2
        found = tables(folder)
        assert list(folder.glob("*.unfinished*")) == [] or rank > 0
    np.savez(folder / f"{rank}.npz", *found)
    distributed.barrier()  # a process that leaves early can abort the other's threads
    distributed.destroy_process_group()


def test_two_processes_give_the_table_of_one(tmp_path):
    multiprocessing.spawn(work, (2, tmp_path), nprocs=2)
    both = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for number, (case, alone) in enumerate(zip(CASES, tables(), strict=True)):
        first, second = (file[f"arr_{number}"] for file in both)
        np.testing.assert_array_equal(first, second, err_msg=str(case))
        # Sums in another order: some hundred float32 roundings, larger where single losses are subtracted.
        np.testing.assert_allclose(first, alone, rtol=2e-4, atol=1e-6, err_msg=str(case))


def test_the_command_line_under_torchrun(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mpq.cli.main",
    ]
    profile = ["profile", "tiny-cnn", "--nsamples", "32", "--formats", "int3-channel,int4-channel", "-o"]
    two = subprocess.run(
        [*torchrun, *profile, str(tmp_path / "two.csv")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("two.csv") == 1
    one = subprocess.run([sys.executable, "-m", "mpq.cli", *profile, str(tmp_path / "one.csv")], env=environment)
    assert one.returncode == 0
    first, second = (SensitivityTable.load(tmp_path / f"{name}.csv") for name in ("one", "two"))
    np.testing.assert_allclose(second.scores, first.scores, rtol=1e-5)
    np.testing.assert_allclose(second.errors, first.errors, rtol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "two.csv"]


LEFT_OVER = """
import sys
from importlib import import_module
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from mpq.network.parallel import processes, total
with processes():
    total({"both": torch.ones(2)})
    with FlopCounterMode(display=False):  # imports what would hold on to the group
        torch.ones(2, 2) @ torch.ones(2, 2)
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
sys.exit("gloo" in " ".join(names))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_no_thread_of_the_group_outlives_its_block():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", LEFT_OVER], env={**os.environ, **place, "RANK": rank}) for rank in "01"
    ]
    assert [process.wait() for process in started] == [0, 0]


def test_only_profiling_is_shared_by_processes(monkeypatch, capsys):
    from mpq.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["quantize", "tiny-cnn", "--bits", "4", "-o", "nowhere"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_a_single_process_needs_no_collectives():
    with processes():
        assert rank_and_count() == (0, 1)
        assert share([1, 2]) == [1, 2]
        assert total({"a": torch.ones(1)})["a"].item() == 1


def test_one_process_resumes_the_files_of_two(tmp_path):
    for rank, name in enumerate(("x", "x.1")):
        Journal(tmp_path / name, {"seed": 0}).note(f"of {rank}", [float(rank)])
    found = Journal(tmp_path / "x", {"seed": 0})
    assert found.agree(["of 0", "of 1"]) == [[0.0], [1.0]]
    found.close()
    assert list(tmp_path.iterdir()) == []
