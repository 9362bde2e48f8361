"""The sm_90a kernel: its source run on a CPU with emulated instructions, and compiled."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import emulator, problem, run

from mpq.kernels.gpu.cuda import hopper, nvrtc
from mpq.kernels.gpu.cuda.nvrtc import definitions

# tokens, group, zeros, bf16
CASES = [(16, 128, 0, 1), (32, 32, 1, 0), (64, 0, 1, 1), (128, 128, 1, 0), (128, 96, 0, 1)]


def macros_of(tokens: int, group: int, zeros: int, bf16: int) -> tuple[tuple[str, int], ...]:
    return definitions({"TOKENS": tokens, "GROUP": group, "ZEROS": zeros, "BF16": bf16, "STAGES": 8})


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("name", "dtype", "count", "rows", "cols", "shares", "stages"),
    [
        ("int4-g128", torch.float16, 13, 70, 328, 1, 2),  # more steps than stages; rows and columns end within tiles
        ("int4-g64-asym", torch.bfloat16, 20, 128, 384, 2, 3),
        ("int4-g32-asym", torch.float16, 33, 40, 200, 2, 2),
        ("int4-channel-asym", torch.bfloat16, 64, 144, 576, 3, 2),
        ("int4-channel", torch.float16, 16, 16, 64, 1, 8),
        ("int4-g96", torch.float16, 130, 130, 232, 1, 2),
        ("int4-g256", torch.bfloat16, 100, 24, 448, 3, 2),  # shares begin within groups
    ],
)
def test_the_source_computes_the_product(
    tmp_path: Path, name: str, dtype: torch.dtype, count: int, rows: int, cols: int, shares: int, stages: int
) -> None:
    given = problem(name, dtype, count, rows, cols)
    assert hopper.covers(given.format, given.tokens)
    cut = hopper.plan(given.format, given.tokens, rows, shares, stages)
    assert cut.grid[1] == shares
    numbers = (*cut.numbers, given.tokens.stride(0))
    run(emulator(tmp_path, "emulated_hopper.cpp", cut.macros), given, cut.grid, numbers)


@pytest.mark.skipif(nvrtc.find_library() is None, reason="needs NVRTC")
@pytest.mark.parametrize("case", CASES)
def test_nvrtc_compiles_it(case: tuple[int, int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = macros_of(*case)
    nvrtc.compiled.cache_clear()
    cubin = nvrtc.compiled("hopper", hopper.source(macros), hopper.ARCHITECTURE, macros)
    assert cubin[:4] == b"\x7fELF"
    (kept,) = (tmp_path / "mpq").iterdir()
    assert kept.read_bytes() == cubin


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("case", CASES)
def test_nvcc_compiles_it_without_spilling_or_serializing(case: tuple[int, int, int, int], tmp_path: Path) -> None:
    macros, source = macros_of(*case), tmp_path / "hopper.cu"
    source.write_text(hopper.source(macros))
    options = [f"-D{key}={value}" for key, value in macros]
    command = ["nvcc", "-cubin", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", *options]
    flags = ["-Xptxas", "-v", "-Werror", "all-warnings", "--keep", "--keep-dir", str(tmp_path)]
    output = tmp_path / "out.cubin"
    run = subprocess.run(
        [*command, *flags, "-o", str(output), str(source)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr  # ptxas warns where it has to serialize wgmma
    assert run.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 2
    ptx = (tmp_path / "hopper.ptx").read_text()
    tokens = case[0]
    for words in (
        f"wgmma.mma_async.sync.aligned.m64n{tokens}k16", "cp.async.bulk.tensor.2d", "cp.async.bulk.shared::cluster",
        "mbarrier.try_wait.parity",
    ):  # fmt: skip
        assert words in ptx


def test_a_block_fits_the_shared_memory_of_a_multiprocessor() -> None:
    assert max(hopper.shared_bytes(macros_of(tokens, 128, 0, 0)) for tokens in hopper.BLOCKS) <= 227 * 1024
