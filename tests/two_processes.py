"""A function called on each of two gloo processes, for tests of distributed work."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.nn.functional  # before there is a group, as in mpq.network.parallel
from torch import distributed, multiprocessing


def on_two_processes(function: Callable[[int], Any]) -> list[Any]:
    """Results of `function(rank)`, defined at a module's top level, on both ranks of a group of two processes."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (function, folder), nprocs=2)
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(2)]


def _work(rank: int, function: Callable[[int], Any], folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(function(rank), Path(folder) / str(rank))
    distributed.destroy_process_group()
