"""The C sources alone: compiled with every warning, run under sanitizers and as programs for Arm, by a driver."""

import platform
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import mpq.kernels
from mpq.core.formats import parse_format
from mpq.kernels.cpu import native as cpu
from mpq.kernels.cpu import panels
from mpq.kernels.layout import pack, to_layout, unpack
from mpq.network.calibration import seeded
from mpq.rounding.codes import decode_table
from mpq.rounding.reference import dequantize, quantize

SOURCES = Path(mpq.kernels.__file__).parent / "cpu" / "src"
WARNINGS = ("-g", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off")
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
NAMES = (
    "int2-channel", "int2-g32", "int3-g10-asym", "int4-g32", "int4-g128", "int4-channel-asym", "int5-g100",
    "int6-g64", "int8-channel", "int8-g16-asym", "mxint8", "mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "nvfp4", "nf4-g64",
    "fp6-e3m2-g128", "fp8-e4m3", "fp8-e4m3-g10", "fp8-e5m2-channel",
)  # fmt: skip
SHAPES = ((70, 150), (1, 33))
STEPS = [(name, 72, 72) for name in ("int4-g32", "nvfp4", "fp8-e4m3")]  # all layers of a decoder


def build(compiler, program, *flags):
    sources = [str(path) for path in sorted(SOURCES.rglob("*.c")) if path.name != "module.c"]
    driver = str(Path(__file__).with_name("drive_native.c"))
    command = [compiler, *WARNINGS, *flags, f"-I{SOURCES}", driver, *sources, "-lpthread", "-lm", "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr or "unrecognized" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    return program


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Files in the format of drive_native.c; the tensor's scale is omitted."""
    folder, files = tmp_path_factory.mktemp("cases"), []
    for name, rows, cols in [(name, *shape) for name in NAMES for shape in SHAPES] + STEPS:
        format = parse_format(name)
        packed = pack(quantize(torch.randn((rows, cols), generator=seeded(0, name, rows, cols)), format))
        packed.tensors.pop("tensor_scale", None)
        values, format = decode_table(format.grid), replace(format, tensor_scale=False)
        packed = replace(packed, format=format)
        values = torch.nn.functional.pad(values, (0, 256 - len(values)))
        arranged = to_layout(packed, panels.NAME).tensors["panels"]
        parts = (values, dequantize(unpack(packed)), arranged)
        files.append(folder / f"{name}-{rows}x{cols}")
        plan = cpu._plan(name, rows, cols).weight
        files[-1].write_bytes(bytes(plan) + b"".join(part.contiguous().numpy().tobytes() for part in parts))
    return files


def drive(command, cases):
    """The best level's name, and for each case a hash of the first level's output."""
    ran = subprocess.run([*map(str, (*command, *cases))], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    best, *hashes = ran.stdout.split()
    assert len(hashes) == len(cases)
    return best, hashes


@pytest.fixture(scope="module")
def here(cases, tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    return drive([build(compiler, tmp_path_factory.mktemp("here") / "drive", *SANITIZERS)], cases)


def test_every_level_runs_clean_on_exact_allocations(here):
    assert here[0] in cpu.LEVELS


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A command that runs the driver as a program for Arm, without arguments."""
    if shutil.which(CROSS) is None:
        pytest.skip(f"no {CROSS}: apt-get install gcc-aarch64-linux-gnu")
    return build(CROSS, tmp_path_factory.mktemp("arm") / "drive", "-O2", "-static")


@pytest.mark.parametrize(("machine", "level", "count"), [("max", "neon", None), ("cortex-a72", "portable", 4)])
def test_arm_computes_the_same_bits_at_every_level(arm, here, cases, machine, level, count):
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"no {EMULATOR}: apt-get install qemu-user")
    assert drive([EMULATOR, "-cpu", machine, arm], cases[:count]) == (level, here[1][:count])


@pytest.mark.parametrize("header", sorted(SOURCES.rglob("*.h")), ids=lambda path: path.stem)
def test_every_header_compiles_on_its_own(header):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    if header.name.startswith(("avx", "amx")) and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("for x86-64")
    command = [compiler, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unused-function",
               "-Wno-unused-variable", "-x", "c", str(header)]  # fmt: skip
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_no_file_is_longer_than_500_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCES.rglob("*.[ch]")}
    assert max(lengths.values()) <= 500, lengths


@pytest.mark.parametrize("module", ["mpq.kernels.cpu._native", "mpq.rounding._native"])
def test_the_compiled_library_is_newer_than_its_sources(module):
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        pytest.skip(f"{module} is not built")
    built = Path(spec.origin).stat().st_mtime
    folder = Path(mpq.kernels.__file__).parents[2].joinpath(*module.split(".")[:-1], "src")
    newer = [path.name for path in folder.rglob("*.[ch]") if path.stat().st_mtime > built + 1]
    assert not newer, f"{spec.origin} is older than {', '.join(newer)}: rebuild it with 'pip install -e . --no-deps'"


def test_package_lists_every_source_and_header():
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    for path in SOURCES.rglob("*.[ch]"):
        assert f'"mpq/kernels/cpu/src/{path.relative_to(SOURCES).as_posix()}"' in project, path
