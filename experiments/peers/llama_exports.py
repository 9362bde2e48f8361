"""GGUF exports in llama.cpp: perplexity simulated and served, file sizes, and our rounding against llama.cpp's.

    python -m experiments.peers.llama_exports [--llama PYTHON] [--windows N]

The WikiText Llama goes to llama.cpp unquantized, in mixes of types without and with super-blocks of 256, uniformly in a
K type, and in a mix searched over llama.cpp's types. Its rows of 640 do not divide into super-blocks: there a uniform
type falls back as llama.cpp's own quantizer does. llama.cpp runs in a separate environment (`--llama` names its Python;
default: built in some minutes by `environments.py`).
"""

import argparse
import ctypes
import math
import subprocess
import tempfile
from pathlib import Path

import gguf
import torch
from torch import Tensor, nn

from experiments.models import reference_models
from experiments.peers.environments import python_of
from experiments.peers.served import served
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.formats import parse_format
from mpq.core.scheme import parse_scheme
from mpq.exporters import export
from mpq.exporters.gguf.blocks import type_of
from mpq.exporters.holding import nearest, restrict
from mpq.exporters.mpq.state import other_state
from mpq.exporters.rules import GGUF_TYPES
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import mean_loss, next_token_loss
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from mpq.rounding.clip_search import clip_search
from mpq.rounding.reference import dequantize
from mpq.search import frontier_of
from mpq.sensitivity.profile import profile

TARGET = TARGETS["gguf"]
CODED = tuple(name for name in GGUF_TYPES if not parse_format(name).is_float_copy)
BITS = 4.25  # budget of the searched mix


def in_turn(model: nn.Module, *schemes: str) -> Allocation:
    """Assign schemes round-robin, with llama.cpp's fallback where a type does not fit."""
    layers = find_layers(model)
    wanted = [parse_scheme(schemes[index % len(schemes)]) for index in range(len(layers))]
    pairs = zip(layers, wanted, strict=True)
    held = [nearest(TARGET, layer, scheme) if TARGET.objection(layer, scheme) else scheme.name
            for layer, scheme in pairs]  # fmt: skip
    return Allocation(layers, tuple(str(name) for name in held))


def searched(model: nn.Module, bits: float) -> Allocation:
    """The optimal mix of llama.cpp's types by the default metric, on windows of the training text."""
    batches = reference_models.wikitext_tokens("train", 32).split(8)
    table = profile(model, batches, next_token_loss, CODED, progress=False)
    held = restrict(table, TARGET)
    return frontier_of(held.table, forbid=held.forbid, ties=False).at(bits=bits)


def promised(model: nn.Module, allocation: Allocation) -> int:
    """Predicted bytes: layers in their schemes, everything else unquantized."""
    return allocation.size + sum(tensor.nbytes for tensor in other_state(model, allocation)[0].values())


def exports(python: str, windows: int, folder: Path) -> list[str]:
    """Print a line for each export; return the RESULT lines."""
    model, tokens = reference_models.wikitext_llama(), reference_models.wikitext_tokens("test", windows)
    before, lines = math.exp(mean_loss(model, [tokens], next_token_loss)), []
    for name, allocation in (
        ("fp32", in_turn(model, "fp32")),
        ("blocks of 32", in_turn(model, "int4-g32", "int8-g32", "q5_1", "iq4_nl", "q4_1", "int5-g32", "mxfp4")),
        ("super-blocks", in_turn(model, "q4_k", "q6_k", "q5_k", "q3_k")),
        ("all q4_k", in_turn(model, "q4_k")),
        ("all q3_k", in_turn(model, "q3_k")),
        (f"searched {BITS} bits", searched(model, BITS)),
    ):
        out = export(model, allocation, folder / name.replace(" ", "-"), to="gguf")
        simulated = math.exp(mean_loss(simulate(model, allocation, trainable=False), [tokens], next_token_loss))
        found = served(python, "llama.cpp", out, tokens).perplexity
        sizes = promised(model, allocation), sum(file.stat().st_size for file in out.glob("model*.gguf"))
        print(f"{'llama.cpp ' + name:28}{before:10.3f}{simulated:11.3f}{found:10.3f}{sizes[0]:12,}{sizes[1]:12,}")
        print(f"{'':28}{allocation.bits:.3f} bits: {' '.join(sorted(set(allocation.schemes)))}", flush=True)
        gap = abs(found / simulated - 1)
        lines.append(result(f"llama.cpp_{name}_perplexity_gap", gap, "<=0.01", gap <= 0.01))
    return lines


def rounding(python: str) -> list[str]:
    """RESULT lines of the squared error of our clip search over that of llama.cpp's quantizer, by type."""
    script = "import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent / 'lib' / 'libggml-base.so')"
    path = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.split()[-1]
    library = ctypes.CDLL(path)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    state = reference_models.wikitext_llama().state_dict()
    weights = [tensor for name, tensor in state.items() if name.endswith(("q_proj.weight", "up_proj.weight"))]
    lines = []
    for name in CODED:
        ratios = []
        for weight in weights:
            theirs = _by_llama_cpp(weight.contiguous(), name, library)
            ours = dequantize(clip_search(weight, parse_format(name)))
            ratios.append(float((ours - weight).square().sum() / (theirs - weight).square().sum()))
        worst = max(ratios)
        mean = sum(ratios) / len(ratios)
        print(f"squared error over llama.cpp's, {GGUF_TYPES[name]:8}{mean:7.3f}, worst {worst:.3f}")
        lines.append(result(f"llama.cpp_{GGUF_TYPES[name]}_squared_error_ratio", worst, "<=1", worst <= 1))
    return lines


def _by_llama_cpp(weight: Tensor, name: str, library: ctypes.CDLL) -> Tensor:
    format, (rows, cols) = parse_format(name), weight.shape
    kind = type_of(format, gguf)[1]
    out = torch.empty(rows, format.nbytes(rows, cols) // rows, dtype=torch.uint8)
    library.ggml_quantize_init(int(kind))
    library.ggml_quantize_chunk(int(kind), weight.data_ptr(), out.data_ptr(), 0, rows, cols, None)
    return torch.from_numpy(gguf.quants.dequantize(out.numpy(), kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--windows", type=int, default=32, help="windows of 256 tokens (default: 32)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        python = options.llama or python_of("llama.cpp")
        print(f"{'consumer':28}{'before':>10}{'simulated':>11}{'served':>10}{'promised':>12}{'file':>12}")
        lines = exports(python, options.windows, Path(name))
        lines += rounding(python)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
