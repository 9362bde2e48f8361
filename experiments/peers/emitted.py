"""Check the configurations of `mpq allocate --emit` in the tools that read them, and read them back by `mpq judge`.

    python -m experiments.peers.emitted [--peer PYTHON] [--llama-quantize PROGRAM]

The WikiText Llama's linear layers in mixed formats go to NVIDIA ModelOpt and AutoRound (`--peer`, an environment with
both) and to llama.cpp's llama-quantize. Each reports the bits and groups, or the type, of every layer. Results: the
share of layers as written, and whether the file reads back as the same allocation.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from torch import nn

from experiments.in_turn import in_turn
from experiments.models import reference_models
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.layer import Layer
from mpq.core.registry import Target
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.exporters.configurations import tool_named, write_configuration
from mpq.exporters.configurations.llama_quantize import tensor_name
from mpq.exporters.configurations.tool import Tool
from mpq.exporters.gguf.reader import tensor_types
from mpq.exporters.holding import nearest
from mpq.exporters.rules import GGUF_TYPES
from mpq.judge_files import read_contestant
from mpq.network.layers import find_layers

FORMATS = {
    "modelopt": ("int4-g32", "int8-channel", "int3-g64", "bf16"),
    "autoround": ("int4-g32", "int8-g128", "int2-g32", "bf16"),
    "llama-quantize": ("q4_k", "int8-g32", "int4-g32", "q6_k", "iq4_nl"),
}


def mixed(model: nn.Module, holder: Tool | Target, formats: tuple[str, ...]) -> Allocation:
    """Assign formats round-robin, or the nearest that the tool supports; bf16 if it supports none."""
    layers = find_layers(model)
    schemes = []
    for layer, own in zip(layers, in_turn(layers, formats), strict=True):
        wanted = parse_scheme(own)
        plain = layer.kind == "embedding" or layer.name == "lm_head"
        held = wanted.name if not holder.refusal(layer, wanted) else nearest(holder, layer, wanted)
        schemes.append("bf16" if plain else str(held or "bf16"))
    return Allocation(layers, tuple(schemes))


def in_tool(tool: str, allocation: Allocation, file: Path, python: str) -> float:
    """Share of the linear layers that the tool treats as the allocation says."""
    command = [python, "-m", "experiments.peers.peer_emitted", tool, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        print(f"{tool} failed with {done.returncode}: {done.stderr[-800:]}")
        return 0.0
    given = json.loads(done.stdout.splitlines()[-1])
    same = []
    for layer in allocation.layers:
        if layer.kind == "linear":
            weight = allocation.scheme_of[layer.name].weight
            expected = None if weight.is_float_copy else [weight.grid.bits, weight.group_size or -1]
            same.append(given.get(layer.name) == expected)
            if not same[-1]:
                print(f"{tool}: {layer.name} has {given.get(layer.name)}, written was {expected}")
    return sum(same) / len(same)


def in_llama_quantize(allocation: Allocation, file: Path, program: str, model: nn.Module) -> float:
    """Share of the layers with the allocation's type in llama-quantize."""
    plain = Allocation(allocation.layers, ("fp16",) * len(allocation.layers))
    source = export(model, plain, file.parent / "fp16", to="gguf") / "model.gguf"
    out = file.parent / "quantized.gguf"
    command = [program, "--tensor-type-file", str(file), str(source), str(out), "Q4_0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        print(f"llama-quantize failed with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
        return 0.0
    types = tensor_types(out)
    same = []
    for layer in allocation.layers:
        expected = GGUF_TYPES[allocation.scheme_of[layer.name].weight.name]
        actual = types[f"{tensor_name(layer.name)}.weight"]
        same.append(expected == actual)
        if not same[-1]:
            print(f"llama-quantize: {layer.name} has {actual}, written was {expected}")
    return sum(same) / len(same)


def size(allocation: Allocation, layer: Layer) -> int:
    """Bytes of a layer: formats that differ only in the type of 16-bit scales count as equal."""
    return allocation.scheme_of[layer.name].weight.nbytes(layer.rows, layer.cols)


def emitted(peer: str, program: str, folder: Path) -> list[str]:
    """Run each available tool; return the RESULT lines."""
    model, lines = reference_models.wikitext_llama(), []
    for name, formats in FORMATS.items():
        if not (program if name == "llama-quantize" else peer):
            print(f"{name}: skipped, no environment named")
            continue
        allocation = mixed(model, tool_named(name), formats)
        file = folder / f"{name}.txt"
        file.write_text(write_configuration(name, allocation), encoding="utf-8")
        if name == "llama-quantize":
            share = in_llama_quantize(allocation, file, program, model)
        else:
            share = in_tool(name, allocation, file, peer)
        read = read_contestant(f"{name}={file}", allocation.layers).allocation
        same = [size(read, layer) == size(allocation, layer) for layer in allocation.layers]
        back = sum(same) / len(same)
        print(f"{name:16} {len(same)} layers, {share:.3f} as written, {back:.3f} read back the same", flush=True)
        lines.append(result(f"{name}_layers_as_written", share, ">=1", share >= 1))
        lines.append(result(f"{name}_layers_read_back", back, ">=1", back >= 1))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="Python of an environment with ModelOpt and AutoRound")
    parser.add_argument("--llama-quantize", default="", help="llama.cpp's program")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print("\n".join(emitted(options.peer, options.llama_quantize, Path(name))))


if __name__ == "__main__":
    main()
