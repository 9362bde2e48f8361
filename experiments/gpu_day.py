"""All checks and benchmarks that need a GPU, most important first, in one command.

    python -m experiments.gpu_day [--quick] [--output build/gpu_day] [--only PART ...] [--vllm PYTHON] [--list]

Each part is a process of at most ten minutes; its output and exit code go to the output folder. The same command
resumes an earlier run: parts that succeeded on this device and commit are skipped, those that failed or timed out run
again, last. `summary.md` has every RESULT line under the device's name. Without a device, --quick runs the parts that
Triton's interpreter can run, and says that no device was seen.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

MINUTES = 10
NO_DEVICE = "no CUDA device was seen"
PYTHON = sys.executable
KERNELS = ("-m", "experiments.benchmarks.bench_gpu_kernels")
CLI = ("-m", "mpq.cli")
FORMATS = (
    "int8-channel", "fp8-e4m3-channel", "mxfp4", "nvfp4", "int2-g128", "int3-g128", "nf4-g64", "int5-g128", "int6-g128",
    "int7-g128", "int4-g32", "int4-g128-asym", "int4-channel", "fp6-e2m3-channel", "fp6-e3m2-channel", "fp4-e2m1-g32",
    "mxfp6-e2m3", "mxfp8-e4m3", "int4-g128+a:int8-token", "int8-channel+a:int8-token",
    "fp8-e4m3-channel+a:fp8-e4m3-token",
)  # fmt: skip
TESTS = ("tests/kernels/gpu", "tests/kernels/test_bench.py", "tests/cli/test_cli.py")


@dataclass(frozen=True)
class Part:
    """A command for this Python, and its small case."""

    name: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...] = ()  # replaces the command with --quick; (): skipped
    without: bool = False  # whether the small case runs without a device


@dataclass(frozen=True)
class Done:
    """How a part ended."""

    part: str
    code: int | None  # None: stopped after ten minutes
    seconds: float
    device: str
    commit: str
    quick: bool

    def of(self, device: str, commit: str, quick: bool) -> bool:
        """Whether this is the same part on the same device."""
        return (self.device, self.commit, self.quick) == (device, commit, quick)


def parts(folder: Path, vllm: str | None) -> tuple[Part, ...]:
    """All parts in order; `folder` holds the files that they share."""
    packed = str(folder / "tiny-lm")
    attention = ("--attention", "32x8x128", "--kv-formats", "fp16,int8-token,int4-asym,int2-asym")
    quantized = ("quantize", "tiny-lm", "--bits", "4.25", "--effort", "fast", "--device", "cuda", "-o", packed)
    found = [
        Part(
            "tests", ("-m", "pytest", "-q", *TESTS),
            ("-m", "pytest", "-q", "tests/kernels/gpu/test_backend.py", "tests/kernels/gpu/test_fragments.py"), True,
        ),
        Part(
            "int4 against cuBLAS", (*KERNELS, "--parts", "table", "--formats", "int4-g128"), (*KERNELS, "--quick"), True
        ),
        Part("int4 against MARLIN and others", (*KERNELS, "--parts", "peers")),
        Part(
            "attention to packed caches",
            (*CLI, "bench", "--device", "cuda", "--formats", "int4-g128", *attention, "--contexts", "2048,32768",
             "--batches", "1,16", "-o", str(folder / "attention.json")),
        ),
        Part("profile and rounding", (*CLI, *quantized)),
        Part("generation", (*CLI, "generate", packed, "--prompt", "It is a truth", "--device", "cuda", "--compare")),
    ]  # fmt: skip
    if vllm is not None:
        speed = ("-m", "experiments.peers.vllm_throughput", "--vllm", vllm)
        found.append(Part("throughput in vLLM", speed, (*speed, "--quick")))
    found += [Part(f"table {name}", (*KERNELS, "--parts", "table", "--formats", name)) for name in FORMATS]
    found.append(Part("mixed allocations", (*KERNELS, "--parts", "mixed")))
    found += [
        Part(f"tuning {name}", (*KERNELS, "--tune", "--parts", "table", "--formats", name))
        for name in ("int4-g128", *FORMATS)
    ]
    return tuple(found)


def device_name() -> str:
    """Name of the CUDA device; "" if there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def commit() -> str:
    """The checked-out commit, with a mark if files differ from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def run_part(arguments: Sequence[str], log: Path, minutes: float) -> tuple[int | None, float]:
    """Run a part with output to `log`; return exit code and seconds. Its process group is killed with it."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as words:
        process = subprocess.Popen(
            [PYTHON, *arguments], stdout=words, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        code: int | None
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, time.monotonic() - started


def outcomes(folder: Path) -> dict[str, Done]:
    """Outcomes so far, by part."""
    file = folder / "parts.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return {one["part"]: Done(**one) for one in found}


def save(folder: Path, done: dict[str, Done]) -> None:
    """Write outcomes and summary."""
    (folder / "parts.json").write_text(json.dumps([asdict(one) for one in done.values()], indent=1), encoding="utf-8")
    lines = []
    for one in done.values():
        ended = {None: f"stopped after {MINUTES} minutes", 0: "done"}.get(one.code, f"failed with {one.code}")
        lines += [f"## {one.part}", "", f"{one.device or NO_DEVICE}, {one.commit}: {ended}, {one.seconds:.0f} s", ""]
        words = log_of(folder, one.part).read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line for line in words if line.startswith("RESULT")] or words[-3:]
        lines += [f"    {line}" for line in shown] + [""]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


def log_of(folder: Path, part: str) -> Path:
    """Log file of a part."""
    return folder / f"{part.replace(' ', '_').replace(':', '-')}.txt"


def in_order(wanted: Sequence[Part], done: dict[str, Done], device: str, at: str, quick: bool) -> list[Part]:
    """Parts left to run: first those that have not run on this device and commit, then those that failed."""
    seen = {name: one for name, one in done.items() if one.of(device, at, quick)}
    fresh = [part for part in wanted if part.name not in seen]
    return fresh + [part for part in wanted if part.name in seen and seen[part.name].code != 0]


def main() -> None:
    """Run the remaining parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small case of each part, a minute at most")
    parser.add_argument("--output", default="build/gpu_day", help="folder (default: build/gpu_day)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so")
    parser.add_argument("--vllm", help="Python of an environment with vLLM and this package")
    parser.add_argument("--list", action="store_true", help="name the parts, and stop")
    options = parser.parse_args()
    folder, device, at = Path(options.output), device_name(), commit()
    wanted = [
        one for one in parts(folder, options.vllm) if not options.only or one.name.startswith(tuple(options.only))
    ]
    if options.list:
        print("\n".join(part.name for part in wanted))
        return
    print(f"device: {device or NO_DEVICE}; commit {at}")
    if not device and not options.quick:
        print("nothing is run: figures of a GPU need one (--quick runs what can be checked without)")
        return
    folder.mkdir(parents=True, exist_ok=True)
    done = outcomes(folder)
    if options.quick:
        wanted = [part for part in wanted if part.quick and (device or part.without)]
    for part in in_order(wanted, done, device, at, options.quick):
        print(f"{part.name} ...", end=" ", flush=True)
        arguments = part.quick if options.quick else part.arguments
        code, seconds = run_part(arguments, log_of(folder, part.name), MINUTES)
        print(f"{'stopped' if code is None else 'done' if code == 0 else f'failed with {code}'} after {seconds:.0f} s")
        done[part.name] = Done(part.name, code, seconds, device, at, options.quick)
        save(folder, done)
    missing = [part.name for part in wanted if part.name not in done or done[part.name].code != 0]
    print(f"{folder / 'summary.md'} has the figures" + (f"; not well: {', '.join(missing)}" if missing else ""))
    if not device:
        print(f"{NO_DEVICE}: no speed was measured, and the GPU kernels stay untried")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
