"""The C sources alone: compiled with every warning, run under sanitizers by a driver of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mpq.kernels
from mpq.core.calibration import seeded
from mpq.core.formats import parse_format
from mpq.core.rounding import quantize
from mpq.kernels import cpu, panels
from mpq.kernels.layout import pack, to_layout

SOURCES = Path(mpq.kernels.__file__).parent / "native"
FLAGS = ("-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fno-sanitize-recover=all")
SANITIZERS = "-fsanitize=address,undefined"
NAMES = (
    "int2-channel", "int2-g32", "int3-g10-asym", "int4-g32", "int4-g128", "int4-channel-asym", "int5-g100",
    "int6-g64", "int8-channel", "mxint8", "mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "nvfp4", "nf4-g64", "fp6-e3m2-g128",
    "fp8-e4m3", "fp8-e4m3-g10", "fp8-e5m2-channel",
)  # fmt: skip
SHAPES = ((70, 150), (1, 33))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("native") / "drive"
    sources = [str(path) for path in sorted(SOURCES.glob("*.c")) if path.name != "module.c"]
    driver = str(Path(__file__).with_name("drive_native.c"))
    command = [compiler, *FLAGS, SANITIZERS, f"-I{SOURCES}", driver, *sources, "-lpthread", "-lm", "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr or "unrecognized" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    return program


def test_every_level_runs_clean_on_exact_allocations(driver, tmp_path):
    cases = []
    for name in NAMES:
        for rows, cols in SHAPES:
            weight = torch.randn((rows, cols), generator=seeded(0, name, rows, cols))
            arranged = to_layout(pack(quantize(weight, parse_format(name))), panels.NAME)
            path = tmp_path / f"{name}-{rows}x{cols}"
            path.write_bytes(cpu._plan(name, rows, cols).weight + arranged.tensors["panels"].numpy().tobytes())
            cases.append(str(path))
    ran = subprocess.run([str(driver), *cases], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == ["done"] * len(cases)
