"""Single-token attention over KV caches of several formats: fraction of the read bandwidth, speed-up over float16.

    python -m experiments.benchmarks.bench_attention [--quick] [--threads 2]

8 key heads of width 128, 32 query heads. Cycling through copies of the KV cache defeats the processor's caches. All
formats and a plain read of memory alternate within one run; figures are medians. One thread is timed by CPU time, which
other load disturbs less than wall-clock time; several threads are timed by the wall clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle

import torch

import mpq.kernels.cpu.attention  # noqa: F401  (its kernel)
from experiments.result import result
from mpq.kernels.bench_attention import attention_calls
from mpq.kernels.cpu import native as cpu
from mpq.kernels.cpu.pages import empty_on_large_pages

HEADS = (32, 8, 128)  # query heads, key heads, width
FORMATS = (
    "fp16",
    "int8-token",
    "int8-asym",
    "int4-token",
    "int4-asym",
    "int4-g32",
    "int4-t64-asym",
    "int3-t64-asym",
    "fp8-e4m3",
    "mxfp4",
)
INT8_QUERIES = "int8-channel"
BEYOND = 96 << 20  # bytes of all copies, and of a plain read
ROOF, OVER_FP16 = 0.8, {"int8-token": 1.8, "int8-asym": 1.8, "int4-token": 3.0, "int4-asym": 3.0}  # at 32,768 tokens


def contestants(tokens: int) -> Iterator[tuple[str, int, Sequence[Callable[[], object]]]]:
    """(name, bytes read, calls) of each format, and of each with int8 queries."""
    for name in FORMATS:
        for queries in ("", INT8_QUERIES) if name.startswith("int") else ("",):
            size, timed = attention_calls(name, name, HEADS, tokens, beyond=BEYOND, queries=queries)
            yield name + (" q:int8" if queries else ""), size, timed.calls


@torch.inference_mode()
def in_turns(timed: Sequence[Sequence[Callable[[], object]]], repeats: int) -> list[list[float]]:
    """Seconds of each contestant's calls, `repeats` of each after one warm-up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: list[list[float]] = [[] for _ in timed]
    turns = [cycle(calls) for calls in timed]
    for _ in range(repeats + 1):
        for calls, seconds in zip(turns, found, strict=True):
            next(calls)()  # wakes the threads
            call, start = next(calls), clock()
            call()
            seconds.append(clock() - start)
    return [seconds[1:] for seconds in found]


def measure(tokens: int, repeats: int) -> None:
    """A table of one length, and its RESULT lines."""
    memory = empty_on_large_pages((BEYOND,), torch.uint8).fill_(1)
    names, sizes, timed = zip(*contestants(tokens), strict=True)
    *seconds, reading = map(statistics.median, in_turns([*timed, [partial(cpu.read, memory)]], repeats))
    bandwidth = BEYOND / reading
    print(f"\n{tokens} tokens; plain read {bandwidth / 1e9:.1f} GB/s")
    print("format              us    GB/s  of read  over fp16")
    for name, size, second in zip(names, sizes, seconds, strict=True):
        share, gain = size / second / bandwidth, seconds[0] / second
        print(f"{name:16} {second * 1e6:7.0f} {size / second / 1e9:6.1f} {share:7.2f} {gain:9.2f}")
        goal = OVER_FP16.get(name)
        if goal is None or tokens < 32768:
            continue
        print(result(f"attention_roof/{name}/{tokens}", share, f">={ROOF}", share >= ROOF))
        print(result(f"attention_over_fp16/{name}/{tokens}", gain, f">={goal}", gain >= goal))


def main() -> None:
    """Print a table for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32,768 tokens alone, few repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{HEADS[0]} query heads, {HEADS[1]} key heads of {HEADS[2]}, {arguments.threads} threads, {cpu.level_name()}"
    )
    for tokens in (32768,) if arguments.quick else (2048, 8192, 32768):
        measure(tokens, 7 if arguments.quick else 25)


if __name__ == "__main__":
    main()
