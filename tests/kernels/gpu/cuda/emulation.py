"""Build the emulated kernels and their test problems."""

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import mpq.kernels.ops  # noqa: F401  (registers the layouts)
from mpq.core.formats import Format, parse_format
from mpq.kernels.gpu.cuda import nvrtc
from mpq.kernels.gpu.fragments import FRAGMENTS
from mpq.kernels.layout import pack, to_layout
from mpq.rounding.reference import dequantize, quantize

HERE = Path(__file__).parent
SOURCES = Path(nvrtc.__file__).parent
Macros = tuple[tuple[str, int], ...]


def emulator(folder: Path, file: str, macros: Macros) -> ctypes.CDLL:
    library = folder / ("-".join((file, *(f"{key}{value}" for key, value in macros))) + ".so")
    options = [f"-D{key}={value}" for key, value in macros]
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", *options, "-I", str(SOURCES)]
    if not library.exists():
        subprocess.run([*command, str(HERE / file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@dataclass(frozen=True)
class Problem:
    format: Format
    tokens: Tensor  # (count, cols) with NaN behind each row
    bias: Tensor
    parts: dict[str, Tensor]
    truth: Tensor  # float64 (count, rows)


def problem(name: str, dtype: torch.dtype, count: int, rows: int, cols: int) -> Problem:
    random = torch.Generator().manual_seed(rows)
    format = parse_format(name)
    quantized = quantize(torch.randn(rows, cols, generator=random), format)
    tokens = torch.full((count, cols + 8), torch.nan, dtype=dtype)[:, :cols]
    tokens.copy_(torch.randn(count, cols, generator=random))
    bias = torch.randn(rows, generator=random).to(dtype)
    truth = tokens.double() @ dequantize(quantized).double().T + bias.double()
    return Problem(format, tokens, bias, dict(to_layout(pack(quantized), FRAGMENTS).tensors), truth)


def run(library: ctypes.CDLL, given: Problem, grid: tuple[int, int, int], numbers: tuple[int, ...]) -> None:
    """Run both kernels and compare: the sum of shares within float32's rounding, outputs within half an ulp."""
    out, number = torch.full_like(given.truth, torch.nan, dtype=given.tokens.dtype), grid[1]
    buffer = torch.full((number, *out.shape), torch.nan) if number > 1 else None
    parts = given.parts
    tensors = (given.tokens, parts["codes4"], parts["scale"], parts.get("zeros"), given.bias, out, buffer)
    library.run_product(*grid, *map(pointer, tensors), *numbers)
    if buffer is not None:
        shared = buffer.double().sum(0) + given.bias.double()
        assert float((shared - given.truth).norm() / given.truth.norm()) < 1e-6
        sizes = (number, out.numel(), out.shape[1])
        library.run_add_shares(-(-out.numel() // 256), *map(pointer, (buffer, given.bias, out)), *sizes)
    # weights are exact: every output is within half an ulp plus the rounding of the sums
    assert float((out.double() - given.truth).norm() / given.truth.norm()) < torch.finfo(out.dtype).eps / 2
