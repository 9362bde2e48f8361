"""Tokens per second of language models in 4.25 bits against bfloat16: one sequence, greedy, the same decoder loop.

    python -m experiments.benchmarks.bench_generate [--quick] [--scheme int4-g64] [--tokens 32] [--rounds 5]
        [--models 1b]
    python -m experiments.benchmarks.bench_generate --scheme int4-g32 --prepare | --peers

--peers alternates with llama.cpp and onnxruntime-genai instead. int4-g32 is llama.cpp's Q4_0 (4.5 bits): our GGUF
export stores the same weights. onnxruntime's own model builder does its own rounding, in the same blocks of 32. The
peers' models are written to /tmp/peer-models once; --prepare only writes them.

Models: the WikiText-2 Llama of 5.5 M parameters, and Llama shapes of 1.2 billion with random weights, built layer by
layer (speed only). Models alternate; figures are medians. With --quick the large one has two blocks and a small
vocabulary.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.models import reference_models
from experiments.peers import cpu_peers
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.generation.generate import generate
from mpq.kernels.cpu import native as cpu
from mpq.kernels.layout import Packed, pack
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import fuse, pack_model, put_packed
from mpq.rounding.reference import quantize

GOAL = 3.0  # times bfloat16
MODELS = Path("/tmp/peer-models")
MODULES = {"llama.cpp": "peer_llama", "onnxruntime-genai": "peer_genai"}
METHODS = {"wikitext": "mse", "1b": "nearest"}  # how the packed ones are rounded
# Llama 3.2 1B's shapes: 1.24 billion parameters, 0.26 of them in the matrix that input and output share
SHAPES = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two blocks and a small vocabulary, few tokens")
    parser.add_argument("--scheme", default="int4-g64", help="of every layer; int4-g64 takes 4.25 bits")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="wikitext,1b")
    parser.add_argument(
        "--peers", action="store_true", help="against other libraries instead, in environments of their own"
    )
    parser.add_argument("--prepare", action="store_true", help="write what they read, and time nothing")
    arguments = parser.parse_args()
    tokens, rounds = (8, 3) if arguments.quick else (arguments.tokens, arguments.rounds)
    shapes = {**SHAPES, "num_hidden_layers": 2, "vocab_size": 8192} if arguments.quick else SHAPES
    print(f"instructions {cpu.level_name()}, {torch.get_num_threads()} threads, {arguments.scheme}")
    builders = {"wikitext": lambda: small(arguments.scheme), "1b": lambda: large(arguments.scheme, shapes)}
    results = []
    for name in arguments.models.split(","):
        try:
            bfloat16, packed = builders[name]()
        except MpqError as error:
            print(f"{name} is left out: {error}")
            continue
        print(f"{name}: {describe(bfloat16)} in bfloat16, {describe(packed)} packed", flush=True)
        if arguments.peers or arguments.prepare:
            models = prepared(name, bfloat16, arguments.scheme)
            results += [] if arguments.prepare else against_peers(name, packed, models, tokens, rounds)
        else:
            results += compare(name, bfloat16, packed, tokens, rounds)
    print("\n".join(results))


def small(scheme: str) -> tuple[nn.Module, nn.Module]:
    """The WikiText-2 Llama in bfloat16 and packed."""
    model = reference_models.wikitext_llama().bfloat16()
    layers = find_layers(model)
    return model, fuse(pack_model(model, Allocation(layers, (scheme,) * len(layers))))


def large(scheme: str, shapes: dict[str, int]) -> tuple[nn.Module, nn.Module]:
    """Random weights in both forms: one draw per shape, its rows rotated by one from layer to layer.

    No two layers have equal weights: onnxruntime would store them once, and they would stay in the cache.
    """
    bfloat16, packed = skeleton(shapes), skeleton(shapes)
    drawn: dict[tuple[int, int], Tensor] = {}
    arranged: dict[tuple[int, int], Packed] = {}
    for turn, layer in enumerate(find_layers(packed)):
        shape = (layer.rows, layer.cols)
        if shape not in drawn:
            drawn[shape] = torch.randn(shape, generator=seeded(0, *shape)).mul_(0.02).bfloat16()
            arranged[shape] = pack(quantize(drawn[shape].float(), parse_scheme(scheme).weight))
        fill(bfloat16, layer, drawn[shape].roll(turn, 0))
        one = arranged[shape]
        copied = Packed(one.format, shape, one.layout, {name: part.roll(turn, 0) for name, part in one.tensors.items()})
        put_packed(packed, layer, parse_scheme(scheme), copied)
    for model in (bfloat16, packed):
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:  # norms
                put(model, name, torch.ones(parameter.shape, dtype=torch.bfloat16))
    return bfloat16, fuse(packed)


def skeleton(shapes: dict[str, int]) -> nn.Module:
    """The model without memory for its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**shapes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are computed, not loaded
    return model.eval()


def fill(model: nn.Module, layer: Layer, weight: Tensor) -> None:
    """Set the weight in all modules that share it."""
    parameter = nn.Parameter(weight, requires_grad=False)
    for name in layer.names:
        model.get_submodule(name).weight = parameter


def put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def describe(model: nn.Module) -> str:
    """The model's stored megabytes, as text."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return f"{sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.0f} MB"


def compare(name: str, bfloat16: nn.Module, packed: nn.Module, tokens: int, rounds: int) -> list[str]:
    """RESULT lines of packed against bfloat16 in our loop, and of transformers' own loop for both."""
    prompt = torch.arange(3, 19)
    contestants: dict[str, Callable[[], float]] = {
        "packed": lambda: generate(packed, prompt, max_new_tokens=tokens).tokens_per_second,
        "bf16": lambda: generate(bfloat16, prompt, max_new_tokens=tokens).tokens_per_second,
        "packed in transformers": lambda: transformers_speed(packed, prompt, tokens),
        "bf16 in transformers": lambda: transformers_speed(bfloat16, prompt, tokens),
    }
    for run in contestants.values():
        run()
    found: dict[str, list[float]] = {which: [] for which in contestants}
    for _ in range(rounds):
        for which, run in contestants.items():
            found[which].append(run())
    speeds = {which: median_speed(name, which, values) for which, values in found.items()}
    ratio = speeds["packed"] / speeds["bf16"]
    whole = speeds["packed"] / speeds["bf16 in transformers"]
    return [
        result(f"decode_over_bf16/{name}", ratio, f">={GOAL}", ratio >= GOAL),
        result(f"decode_over_transformers_bf16/{name}", whole, f">={GOAL}", whole >= GOAL),
    ]


def prepared(name: str, model: nn.Module, scheme: str) -> dict[str, Path]:
    """Write each peer's model once: a GGUF file of the same weights, and the output of onnxruntime's builder."""
    config: Any = model.config
    stem = f"{name}-{scheme}-{config.num_hidden_layers}"
    gguf, plain, built = (MODELS / f"{stem}-{kind}" for kind in ("gguf", "transformers", "genai"))
    MODELS.mkdir(exist_ok=True)
    if not gguf.exists():
        layers = find_layers(model)
        export(model, Allocation(layers, (scheme,) * len(layers)), gguf, to="gguf", method=METHODS[name])
    if not built.exists():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(reference_models.data_file("wikitext2_llama_5m")).save_pretrained(plain)
        model.save_pretrained(plain)  # type: ignore[operator]
        options = ["block_size=32", "accuracy_level=4"]  # Q4_0's block, activations of int8
        options += ["shared_embeddings=true"] if config.tie_word_embeddings else []
        command = [cpu_peers.environment("onnxruntime-genai"), "-m", "onnxruntime_genai.models.builder"]
        command += ["-m", plain, "-o", built, "-p", "int4", "-e", "cpu", "--extra_options", *options]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"llama.cpp": sorted(gguf.glob("model*.gguf"))[0], "onnxruntime-genai": built}


def against_peers(name: str, packed: nn.Module, models: dict[str, Path], tokens: int, rounds: int) -> list[str]:
    """RESULT lines of ours over each peer, alternating; idle peers sleep."""
    peers = [cpu_peers.Peer(which, MODULES[which], path, torch.get_num_threads()) for which, path in models.items()]
    up = [peer for peer in peers if peer.ready()]
    speeds: dict[str, list[float]] = {which: [] for which in ("packed", *(peer.name for peer in up))}
    texts: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        ours = generate(packed, torch.arange(3, 19), max_new_tokens=tokens)
        speeds["packed"].append(ours.tokens_per_second)
        time.sleep(0.01)
        for peer in up:
            speed, *texts[peer.name] = peer.answer(tokens)
            speeds[peer.name].append(speed)
            time.sleep(0.01)
    medians = {which: median_speed(name, which, values[1:]) for which, values in speeds.items()}  # without the warm-up
    lines = []
    for peer in peers:
        peer.close()
        if peer not in up:
            print(f"{peer.name} is left out: it did not load {models[peer.name]}")
            continue
        pairs = zip(ours.tokens, texts[peer.name], strict=False)
        alike = next((count for count, (one, other) in enumerate(pairs) if one != other), tokens)
        print(f"{name:10} {peer.name}: the first {alike} of {tokens} tokens are the packed model's")
        ratio = medians["packed"] / medians[peer.name]
        lines.append(result(f"decode_over_{peer.name}/{name}", ratio, ">1", ratio > 1))
    return lines


def median_speed(name: str, which: str, speeds: list[float]) -> float:
    """Print the median and range of the speeds; return the median."""
    median = statistics.median(speeds)
    print(f"{name:10} {which:24} {median:8.1f} tokens/s, from {min(speeds):.1f} to {max(speeds):.1f}")
    return median


@torch.inference_mode()
def transformers_speed(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    """Tokens per second of transformers' own `generate`, without the prompt."""

    def seconds(count: int) -> float:
        started = time.perf_counter()
        rows = prompt.unsqueeze(0)
        model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - started

    return (tokens - 1) / (seconds(tokens) - seconds(1))


if __name__ == "__main__":
    main()
