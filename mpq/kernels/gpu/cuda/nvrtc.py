"""Compiling CUDA C++ at first use by NVRTC, through ctypes, without an installed compiler or headers."""

import ctypes
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from mpq.core.errors import MpqError
from mpq.core.files import write_atomically


def source_of(names: Sequence[str]) -> str:
    """The concatenated source files of a kernel."""
    folder = files("mpq.kernels.gpu.cuda")
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


@lru_cache(maxsize=64)
def compiled(name: str, source: str, architecture: str, definitions: tuple[tuple[str, int], ...]) -> bytes:
    """The cubin of a kernel's source for an architecture ("sm_90"), cached in the user's cache folder by hash.

    Raises:
        MpqError: NVRTC is not installed, or rejects the source.
    """
    options = (f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{key}={value}" for key, value in definitions))
    key = hashlib.sha256("\n".join((source, *options)).encode()).hexdigest()
    path = cache_folder() / f"{name}-{architecture}-{key[:32]}.cubin"
    if path.exists():
        return path.read_bytes()
    cubin = compile_source(source, options)
    with write_atomically(path) as draft:
        draft.write_bytes(cubin)
    return cubin


def compile_source(source: str, options: tuple[str, ...]) -> bytes:
    """Compile source to a cubin; MpqError with the compiler's message."""
    library = _library()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"mpq.cu", 0, None, None))
    try:
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), texts):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise MpqError(f"NVRTC cannot compile a kernel with {' '.join(options)}: {log.value.decode().strip()}")
        size = ctypes.c_size_t()
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path:
    """Folder of compiled kernels and tuned tables: $XDG_CACHE_HOME/mpq, by default ~/.cache/mpq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpq"


@lru_cache(maxsize=1)
def find_library() -> str | None:
    """Path or name of NVRTC: in the package nvidia-cuda-nvrtc, else from the system's loader; None if missing."""
    for folder in map(Path, sys.path):
        libraries = sorted(folder.glob("nvidia/*/lib/libnvrtc.so.*[0-9]"))
        if libraries:
            return str(libraries[-1])
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    path = find_library()
    if path is None:
        raise MpqError("the CUDA C++ kernels need NVRTC: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(path)


def _check(result: int) -> None:
    if result:
        raise MpqError(f"NVRTC failed with its result {result} (nvrtc.h names it)")


def definitions(values: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Macros in a fixed order."""
    return tuple(sorted(values.items()))
