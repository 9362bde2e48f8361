"""The CUDA C++ kernel: its source run on a CPU with emulated instructions, and compiled for three targets."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import emulator, problem, run

from mpq.core.errors import MpqError
from mpq.kernels.gpu.cuda import int4, nvrtc

MACROS = {"TOKENS": 16, "GROUP": 128, "ZEROS": 1, "BF16": 0, "STAGES": 4}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("name", "dtype", "count", "rows", "cols", "shares"),
    [
        ("int4-g128", torch.float16, 5, 70, 328, 1),
        ("int4-g64-asym", torch.float16, 9, 64, 384, 3),
        ("int4-g32-asym", torch.bfloat16, 16, 40, 200, 2),
        ("int4-channel", torch.bfloat16, 17, 64, 576, 2),
        ("int4-channel-asym", torch.float16, 66, 16, 64, 1),
        ("int4-g96", torch.float16, 1, 80, 472, 2),
    ],
)
def test_the_source_computes_the_product(
    tmp_path: Path, name: str, dtype: torch.dtype, count: int, rows: int, cols: int, shares: int
) -> None:
    given = problem(name, dtype, count, rows, cols)
    assert int4.covers(given.format, given.tokens)
    cut = int4.plan(given.format, given.tokens, rows, shares)
    assert cut.grid[1] == shares
    run(emulator(tmp_path, "emulated.cpp", cut.macros), given, cut.grid, cut.numbers)


@pytest.mark.skipif(nvrtc.find_library() is None, reason="needs NVRTC")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a"])
def test_nvrtc_compiles_it_and_keeps_the_cubin(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = nvrtc.definitions({**MACROS, "BF16": 1})
    nvrtc.compiled.cache_clear()
    cubin = nvrtc.compiled("int4", nvrtc.source_of(int4.FILES), architecture, macros)
    assert cubin[:4] == b"\x7fELF"
    assert b"product" in cubin
    assert b"add_shares" in cubin
    (kept,) = (tmp_path / "mpq").iterdir()
    assert kept.read_bytes() == cubin


@pytest.mark.skipif(nvrtc.find_library() is None, reason="needs NVRTC")
def test_compiler_errors_are_quoted() -> None:
    with pytest.raises(MpqError, match="undefined"):
        nvrtc.compile_source("__global__ void wrong() { missing(); }", ("--gpu-architecture=sm_80",))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("architecture", "tokens"), list(itertools.product(["80", "89", "90a"], [8, 64])))
def test_nvcc_compiles_it_without_spilling(architecture: str, tokens: int, tmp_path: Path) -> None:
    source = tmp_path / "int4.cu"
    source.write_text(nvrtc.source_of(int4.FILES))
    options = [f"-D{key}={value}" for key, value in {**MACROS, "TOKENS": tokens}.items()]
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-cubin", "-std=c++17", target, *options, "-Xptxas", "-v", "-Werror", "all-warnings"]
    run = subprocess.run(
        [*command, "-o", str(tmp_path / "out.cubin"), str(source)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in run.stderr
    assert " 0 bytes stack frame" in run.stderr
