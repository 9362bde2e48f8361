"""Forecasts of memory and time against whole jobs, each in a process of its own.

    python -m experiments.benchmarks.bench_forecast [--quick] [--models tiny-lm FOLDER ...] [--dataset FILE]

`mpq quantize` says before it starts what memory and time it will take (`mpq.forecast`). Compared are the process's peak
and the elapsed time. Goals: memory within a third, time within a factor of two (of minutes, as it is said).
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.result import result

SAID = re.compile(r"takes about ([\d.]+) GB of memory and (a|\d+) minutes?")
MEMORY, TIME = (0.67, 1.5), (0.5, 2.0)


def job(model: str, options: Sequence[str]) -> tuple[float, float, float, float]:
    """Forecast GB and minutes of a job, and those that it took."""
    with TemporaryDirectory() as folder:
        errors = Path(folder) / "errors.txt"
        command = [
            sys.executable,
            "-m",
            "mpq.cli",
            "quantize",
            model,
            "--bits",
            "4.25",
            "-o",
            f"{folder}/out",
            *options,
        ]
        started = time.monotonic()
        with errors.open("w") as written:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=written)
            _, status, used = os.wait4(process.pid, 0)
        minutes = (time.monotonic() - started) / 60
        text = errors.read_text()
    said = SAID.search(text)
    if status or said is None:
        raise SystemExit(f"the job on {model} failed:\n{text}")
    return float(said[1]), 1.0 if said[2] == "a" else float(said[2]), used.ru_maxrss * 1024 / 1e9, minutes


def compare(model: str, options: Sequence[str]) -> Iterator[str]:
    """RESULT lines of one model."""
    memory, minutes, peak, took = job(model, options)
    print(f"{model}: {memory:.1f} GB and {minutes:.0f} minutes said, {peak:.2f} GB and {took:.1f} minutes taken")
    for what, ratio, (low, high) in (("memory", memory / peak, MEMORY), ("time", minutes / max(took, 1.0), TIME)):
        yield result(f"{Path(model).name} forecast/taken {what}", ratio, f"{low}..{high}", low <= ratio <= high)


def main() -> None:
    """Run the selected jobs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the bundled image network alone")
    parser.add_argument("--models", nargs="+", default=["tiny-cnn", "tiny-lm"], help="names or folders")
    parser.add_argument("--dataset", help="of all models (default: their own)")
    options = parser.parse_args()
    further = ["--dataset", options.dataset] if options.dataset else []
    lines = [line for model in (["tiny-cnn"] if options.quick else options.models) for line in compare(model, further)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
