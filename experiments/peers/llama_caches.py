"""Decoding with 8- and 4-bit KV caches, batches and prompts against llama.cpp: equal weights, alternating in one run.

    python -m experiments.peers.llama_caches [--quick] [--llama PYTHON] [--only decode batch prefill] [--threads 2]

A Llama of random weights in int4-g32, which is llama.cpp's Q4_0, with 8 key heads of width 128. Caches are int8-g32
(q8_0), int4-g32 (q4_0) and fp16 (f16), flash attention on; further formats of ours are compared with the nearest of
llama.cpp's. `--llama` names a Python with llama-cpp-python; by default cpu_peers.py builds one (minutes). Figures are
medians of alternating rounds. One thread is timed by CPU time, which other load disturbs less than wall-clock time;
several by the wall clock. The machine's load is printed. Generic builds of llama.cpp have AVX2 at most (see
`llama_print_system_info`): MPQ_CPU_LEVEL=avx2 limits ours to the same instructions.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.benchmarks.bench_generate import large
from experiments.peers import cpu_peers
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.cache_formats import CacheFormats
from mpq.core.layer import KEYS, VALUES, Layer
from mpq.exporters import export
from mpq.generation.architectures import decoder_of
from mpq.generation.compiled_step import compiled_step
from mpq.generation.decoder import Decoder, step, step_each
from mpq.generation.memory import Memory
from mpq.network.cached import entry_name
from mpq.network.layers import find_layers

SCHEME = "int4-g32"
SHAPES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 8192, "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
}  # fmt: skip
TYPES = {"fp16": "f16", "int8-g32": "q8_0", "int4-g32": "q4_0"}  # our formats, and llama.cpp's equivalents
OWN = {
    "int8-token": "q8_0",
    "int4-asym": "q4_0",
    "int3-t64-asym": "q4_0",
}  # further formats of ours, and llama.cpp's nearest
VOCABULARY = 997  # seed of the prompts, as in the peer
BATCHED = "int8-token"


def memory_of(decoder: Decoder, name: str) -> Memory:
    """An empty KV cache in one format."""
    entries = tuple(
        Layer(entry_name(index, kind), kind, 8, decoder.head_width)
        for index in range(len(decoder.blocks))
        for kind in (KEYS, VALUES)
    )
    return Memory(formats=CacheFormats.uniform(entries, name), packed=True)


def prompt_of(tokens: int) -> Tensor:
    """The peer's prompt, (1, tokens)."""
    return (torch.arange(tokens) * 7 % VOCABULARY + 3).unsqueeze(0)


class Ours:
    """The packed model in our decoder loop, and the same in bfloat16."""

    def __init__(self, packed: nn.Module, bfloat16: nn.Module) -> None:
        found = decoder_of(packed), decoder_of(bfloat16)
        assert None not in found
        self.decoder, self.bfloat16 = found[0], found[1]
        self.compiled = compiled_step(self.decoder)
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def filled(self, name: str, tokens: int) -> Memory:
        """A cache after a prompt."""
        memory = memory_of(self.decoder, name)
        step(self.decoder, prompt_of(tokens), memory)
        return memory

    def decode(self, memory: Memory, context: int, count: int) -> float:
        """Tokens per second of one sequence; the cache is cropped afterwards."""
        assert self.compiled is not None
        started = self.clock()
        for index in range(count):
            assert self.compiled(torch.tensor([[5 + index]]), memory) is not None
        seconds = self.clock() - started
        memory.length = context
        return count / seconds

    def batch(self, memories: Sequence[Memory], context: int, count: int) -> float:
        """Tokens per second of all sequences together."""
        started = self.clock()
        for index in range(count):
            step_each(self.decoder, torch.arange(len(memories)) + 5 + index, memories)
        seconds = self.clock() - started
        for memory in memories:
            memory.length = context
        return len(memories) * count / seconds

    def prefill(self, decoder: Decoder, tokens: int) -> float:
        """Tokens per second of a prompt."""
        started = self.clock()
        step(decoder, prompt_of(tokens), Memory())
        return tokens / (self.clock() - started)


Contestants = dict[str, Callable[[], float]]


def in_turns(title: str, contestants: Contestants, rounds: int) -> dict[str, float]:
    """Median speed of each after one warm-up round; idle peers sleep."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            found[name].append(run())
    medians = {name: statistics.median(speeds[1:]) for name, speeds in found.items()}
    shown = ", ".join(f"{name} {speed:.0f}" for name, speed in medians.items())
    print(f"{title}: {shown} tokens/s (load {os.getloadavg()[0]:.1f})", flush=True)
    return medians


def llama_contestant(peer: "cpu_peers.Peer | None", *words: object) -> Contestants:
    """llama.cpp as a contestant for a request, if it is available."""
    return {} if peer is None else {"llama.cpp": lambda: peer.answer(" ".join(map(str, words)))[0]}


def over(title: str, medians: dict[str, float], ours: str, goal: float, other: str = "llama.cpp") -> list[str]:
    """The RESULT line of ours over another."""
    if other not in medians:
        return []
    ratio = medians[ours] / medians[other]
    return [result(title, ratio, f">={goal}", ratio >= goal)]


@torch.inference_mode()
def decoding(ours: Ours, peer: "cpu_peers.Peer | None", contexts: Sequence[int], count: int, rounds: int) -> list[str]:
    """Decode one sequence after a long prompt, for each format."""
    lines = []
    for context in contexts:
        for name, other in {**TYPES, **OWN}.items():
            memory = ours.filled(name, context)
            run = partial(ours.decode, memory, context, count)
            medians = in_turns(
                f"decode {name} ({other}) at {context}",
                {"ours": run, **llama_contestant(peer, "decode", other, context, count)},
                rounds,
            )
            lines += over(f"decode_over_llama.cpp/{name}/{other}/{context}", medians, "ours", 1.0)
    return lines


@torch.inference_mode()
def batches(ours: Ours, peer: "cpu_peers.Peer | None", sizes: Sequence[int], count: int, rounds: int) -> list[str]:
    """Decode several sequences of 128 tokens at once."""
    lines, context = [], 128
    for size in sizes:
        memories = [ours.filled(BATCHED, context) for _ in range(size)]
        run = partial(ours.batch, memories, context, count)
        medians = in_turns(
            f"batch {size} ({BATCHED}, q8_0)",
            {"ours": run, **llama_contestant(peer, "batch", "q8_0", context, count, size)},
            rounds,
        )
        lines += over(f"batch_over_llama.cpp/{size}", medians, "ours", 1.5)
    return lines


@torch.inference_mode()
def prompts(ours: Ours, peer: "cpu_peers.Peer | None", lengths: Sequence[int], rounds: int) -> list[str]:
    """Process prompts of several lengths."""
    lines = []
    for tokens in lengths:
        both = {
            "ours": partial(ours.prefill, ours.decoder, tokens),
            "bf16": partial(ours.prefill, ours.bfloat16, tokens),
        }
        medians = in_turns(f"prompt of {tokens}", {**both, **llama_contestant(peer, "prefill", "f16", tokens)}, rounds)
        lines += over(f"prefill_over_bf16/{tokens}", medians, "ours", 1.0, "bf16")
        lines += over(f"prefill_over_llama.cpp/{tokens}", medians, "ours", 1.0)
    return lines


def main() -> None:
    """Print speeds and RESULT lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block, short texts, few rounds")
    parser.add_argument("--llama", help="Python with llama-cpp-python (default: cpu_peers.py's); none: ours alone")
    parser.add_argument("--only", nargs="+", choices=("decode", "batch", "prefill"))
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192], help="tokens before those decoded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = {**SHAPES, "num_hidden_layers": 1, "vocab_size": 1024} if options.quick else SHAPES
    bfloat16, packed = large(SCHEME, shapes)
    ours, wanted, rounds = (
        Ours(packed, bfloat16),
        options.only or ("decode", "batch", "prefill"),
        2 if options.quick else 5,
    )
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        peer = None
        if options.llama != "none":
            layers = find_layers(bfloat16)
            schemes = (SCHEME,) * len(layers)
            folder = export(bfloat16, Allocation(layers, schemes), Path(name) / "gguf", to="gguf", method="nearest")
            (file,) = sorted(folder.glob("model*.gguf"))
            peer = cpu_peers.Peer("llama.cpp", "peer_llama_caches", file, options.threads, python=options.llama)
            if not peer.ready():
                print("llama.cpp did not start: ours alone")
                sys.exit(1)
        lines: list[str] = []
        if "decode" in wanted:
            lines += decoding(ours, peer, (256,) if options.quick else options.contexts, 8, rounds)
        if "batch" in wanted:
            lines += batches(ours, peer, (8,) if options.quick else (1, 8, 16, 32, 64), 4, rounds)
        if "prefill" in wanted:
            lines += prompts(ours, peer, (128,) if options.quick else (512, 2048), rounds)
        if peer is not None:
            peer.close()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
