"""Memory and time of whole jobs, each in a process of its own, against their forecasts and goals.

    python -m experiments.benchmarks.bench_forecast [--quick] [--models tiny-lm smollm2 ...] [--bits 4.25]

`mpq quantize` says before it starts what memory and time it will take (`mpq.forecast`). Compared are the process's peak
and the elapsed time. Goals: memory within a third, time within a factor of two (of whole minutes, as it is said), and
the costs that a person can pay on two cores: `smollm2` is SmolLM2-135M off its 4-bit lattice, with WikiText-2.
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

from experiments.models import reference_models
from experiments.result import result
from mpq.core.errors import MpqError

SAID = re.compile(r"takes about ([\d.]+) GB of memory and (a|\d+) minutes?")
MEMORY, TIME = (0.67, 1.5), (0.5, 2.0)  # forecast over taken
COSTS = {"tiny-lm": (1.0, 0.5), "smollm2": (1.9, 18.0)}  # GB and minutes, scales tuned


def job(model: str, options: Sequence[str]) -> tuple[float, float, float, float]:
    """Forecast GB and minutes of a job, and those that it took."""
    with TemporaryDirectory() as name:
        folder, further = Path(name), list(options)
        if model == "smollm2":
            opened, text = reference_models.write_smollm2(folder)
            model, further = str(opened), [*further, "--dataset", str(text)]
        errors = folder / "errors.txt"
        command = [sys.executable, "-m", "mpq.cli", "quantize", model, "-o", str(folder / "out"), *further]
        started = time.monotonic()
        with errors.open("w") as written:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=written)
            _, status, used = os.wait4(process.pid, 0)
        minutes = (time.monotonic() - started) / 60
        text_of_errors = errors.read_text()
    said = SAID.search(text_of_errors)
    if status or said is None:
        raise SystemExit(f"the job on {model} failed:\n{text_of_errors}")
    return float(said[1]), 1.0 if said[2] == "a" else float(said[2]), used.ru_maxrss * 1024 / 1e9, minutes


def compare(model: str, options: Sequence[str]) -> Iterator[str]:
    """RESULT lines of one model."""
    memory, minutes, peak, took = job(model, options)
    print(f"{model}: {memory:.1f} GB and {minutes:.0f} minutes said, {peak:.2f} GB and {took:.1f} minutes taken")
    for what, ratio, (low, high) in (("memory", memory / peak, MEMORY), ("time", minutes / max(took, 1.0), TIME)):
        yield result(f"{model} forecast/taken {what}", ratio, f"{low}..{high}", low <= ratio <= high)
    if model in COSTS:
        for what, value, most in zip(("GB", "minutes"), (peak, took), COSTS[model], strict=True):
            yield result(f"{model} {what}", value, f"<={most}", value <= most)


def main() -> None:
    """Run the selected jobs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the bundled image network alone")
    parser.add_argument("--models", nargs="+", default=["tiny-cnn", "tiny-lm"], help="names or folders, or smollm2")
    parser.add_argument("--bits", default="4.25", help="of all models")
    options = parser.parse_args()
    lines: list[str] = []
    for model in ["tiny-cnn"] if options.quick else options.models:
        try:
            lines += compare(model, ["--bits", options.bits])
        except (MpqError, ImportError) as error:  # data that is not there
            print(f"{model} left out: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
