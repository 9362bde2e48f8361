"""The CUDA C++ kernel: its own source run on a CPU with emulated instructions, and compiled for three targets."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mpq.kernels.ops  # noqa: F401  (registers the layouts)
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.rounding import dequantize, quantize
from mpq.kernels.cuda import int4, nvrtc
from mpq.kernels.fragments import FRAGMENTS
from mpq.kernels.layout import pack, to_layout

HERE = Path(__file__).parent
SOURCES = Path(nvrtc.__file__).parent
MACROS = {"TOKENS": 16, "GROUP": 128, "ZEROS": 1, "BF16": 0, "STAGES": 4}


def emulator(folder: Path, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    library = folder / ("-".join(f"{key}{value}" for key, value in macros) + ".so")
    options = [f"-D{key}={value}" for key, value in macros]
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", *options, "-I", str(SOURCES)]
    if not library.exists():
        subprocess.run([*command, str(HERE / "emulated.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


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
    random = torch.Generator().manual_seed(rows)
    format = parse_format(name)
    quantized = quantize(torch.randn(rows, cols, generator=random), format)
    tokens = torch.full((count, cols + 8), torch.nan, dtype=dtype)[:, :cols]
    tokens.copy_(torch.randn(count, cols, generator=random))
    bias = torch.randn(rows, generator=random).to(dtype)
    parts = to_layout(pack(quantized), FRAGMENTS).tensors
    assert int4.covers(format, tokens)
    cut = int4.plan(format, tokens, rows, shares)
    library = emulator(tmp_path, cut.macros)
    out = torch.full((count, rows), torch.nan, dtype=dtype)
    number = cut.grid[1]
    assert number == shares
    buffer = torch.full((number, count, rows), torch.nan) if number > 1 else None
    tensors = (tokens, parts["codes4"], parts["scale"], parts.get("zeros"), bias, out, buffer)
    library.run_product(*cut.grid, *map(pointer, tensors), *cut.numbers)
    truth = tokens.double() @ dequantize(quantized).double().T + bias.double()
    if buffer is not None:
        shared = buffer.double().sum(0) + bias.double()
        assert float((shared - truth).norm() / truth.norm()) < 1e-6
        library.run_add_shares(-(-out.numel() // 256), *map(pointer, (buffer, bias, out)), number, out.numel(), rows)
    # every output is within half a last place of the truth, and the sums' own rounding: the weights are exact
    assert float((out.double() - truth).norm() / truth.norm()) < torch.finfo(dtype).eps / 2


@pytest.mark.skipif(nvrtc.find_library() is None, reason="needs NVRTC")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a"])
def test_nvrtc_compiles_it_and_keeps_the_cubin(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = nvrtc.definitions({**MACROS, "BF16": 1})
    nvrtc.compiled.cache_clear()
    cubin = nvrtc.compiled(int4.SOURCE, architecture, macros)
    assert cubin[:4] == b"\x7fELF"
    assert b"product" in cubin
    assert b"add_shares" in cubin
    (kept,) = (tmp_path / "mpq").iterdir()
    assert kept.read_bytes() == cubin


@pytest.mark.skipif(nvrtc.find_library() is None, reason="needs NVRTC")
def test_what_the_compiler_rejects_is_quoted() -> None:
    with pytest.raises(MpqError, match="undefined"):
        nvrtc.compile_source("__global__ void wrong() { missing(); }", ("--gpu-architecture=sm_80",))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("architecture", "tokens"), list(itertools.product(["80", "89", "90a"], [8, 64])))
def test_nvcc_compiles_it_without_spilling(architecture: str, tokens: int, tmp_path: Path) -> None:
    source = tmp_path / "int4.cu"
    source.write_text(nvrtc.source_of(int4.SOURCE))
    options = [f"-D{key}={value}" for key, value in {**MACROS, "TOKENS": tokens}.items()]
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-cubin", "-std=c++17", target, *options, "-Xptxas", "-v", "-Werror", "all-warnings"]
    run = subprocess.run(
        [*command, "-o", str(tmp_path / "out.cubin"), str(source)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in run.stderr
    assert " 0 bytes stack frame" in run.stderr
