"""NVIDIA ModelOpt's search against ours: the Llama in int4 groups of 128 and int8 rows, at equal average bits.

`--modelopt` names the Python of the peer's environment. The peer returns its choice of formats; both choices are
rounded and measured by us, on held-out text.

    python -m experiments.peers.search_peers --modelopt PYTHON [--bits 5 6]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from experiments.benchmarks.bench_search import Measuring
from experiments.models import reference_models
from experiments.result import result
from mpq.core.problem import build_problem
from mpq.network.calibration import next_token_loss
from mpq.search.evolution import evolution
from mpq.search.exact import exact
from mpq.sensitivity.profile import profile

FORMATS = ("int4-g128", "int8-channel")  # ModelOpt's INT4_BLOCKWISE_WEIGHT_ONLY and INT8_WEIGHT_ONLY
ENDS = ("lm_head", "*embed_tokens")  # not quantized by the peer

PEER = """
import json, sys, time, copy, torch
import modelopt.torch.quantization as mtq
from transformers import AutoModelForCausalLM
folder, tokens, bits, out = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
batches = [batch for batch in torch.load(tokens)]
int8 = copy.deepcopy(mtq.INT8_WEIGHT_ONLY_CFG) if hasattr(mtq, "INT8_WEIGHT_ONLY_CFG") else None
calls = [0]
def step(model, batch):
    calls[0] += 1
    return model(input_ids=batch, labels=batch)
start = time.perf_counter()
model, state = mtq.auto_quantize(
    model, constraints={"effective_bits": float(bits)},
    quantization_formats=[mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, int8],
    data_loader=batches, forward_step=step, loss_func=lambda output, batch: output.loss,
    num_calib_steps=len(batches), num_score_steps=len(batches), disabled_layers=["*lm_head*"],
)
seconds = time.perf_counter() - start
found = {}
for name, module in model.named_modules():
    quantizer = getattr(module, "weight_quantizer", None)
    if quantizer is not None:
        found[name] = quantizer.num_bits if quantizer.is_enabled else 16
json.dump({"seconds": seconds, "calls": calls[0], "bits": found}, open(out, "w"))
"""


def peer_choice(python: str, bits: float, tokens: torch.Tensor, folder: Path) -> dict[str, object]:
    """The peer's format of every layer, its seconds and number of forward passes."""
    torch.save(list(tokens.split(2)), folder / "tokens.pt")
    model = str(reference_models.data_file("wikitext2_llama_5m"))
    command = [python, "-c", PEER, model, str(folder / "tokens.pt"), str(bits), str(folder / "answer.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    answer: dict[str, object] = json.loads((folder / "answer.json").read_text())
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="nothing: peers are left out")
    parser.add_argument("--modelopt", help="the Python of an environment with nvidia-modelopt and transformers")
    parser.add_argument("--bits", nargs="+", type=float, default=(5.0, 6.0), help="of the codes, without scales")
    parser.add_argument("--trials", type=int, default=24)
    options = parser.parse_args()
    if options.quick or not options.modelopt:
        print("no peer is named: nothing to compare")
        return
    torch.set_num_threads(1)
    tokens = reference_models.wikitext_tokens("train", 16)
    model = reference_models.wikitext_llama()
    start = time.perf_counter()
    table = profile(model, tokens.split(2), next_token_loss, FORMATS, exclude=ENDS, progress=False)
    profiling = time.perf_counter() - start
    measure = Measuring(model, reference_models.wikitext_tokens("valid", 16).split(8), next_token_loss)
    judge = Measuring(model, reference_models.wikitext_tokens("test", 64).split(8), next_token_loss)
    lines = []
    print(f"{'bits':>8} {'search':12} {'stored':>7} {'unseen loss':>12} {'model runs':>11} {'seconds':>8}")
    for bits in options.bits:
        with tempfile.TemporaryDirectory() as folder:
            # The peer counts the unquantized head with 16 bits, and no scales.
            searched, head = sum(layer.params for layer in table.layers), model.get_parameter("lm_head.weight").numel()
            effective = (searched * bits + head * 16) / (searched + head)
            answer = peer_choice(options.modelopt, effective, tokens, Path(folder))
        problem = build_problem(table)
        theirs = [answer["bits"][problem.layers[group[0]].name] for group in problem.groups]
        peer = problem.allocation([[4, 8].index(min(number, 8)) for number in theirs])
        problem = replace(problem, budgets={"size": float(peer.size)})
        start = time.perf_counter()
        ours = exact(problem).allocation(-1)
        solving = time.perf_counter() - start
        measure.count, start = 0.0, time.perf_counter()
        found = evolution(problem, evaluate=measure, trials=options.trials, shares=(0.5, 1.0))
        seconds = time.perf_counter() - start
        entries = {
            "modelopt": (peer, float(answer["calls"]), float(answer["seconds"])),
            "exact": (ours, 0.0, profiling + solving),
            "evolution": (found.allocation(len(found) - 1), measure.count * 2, profiling + seconds),
        }
        losses = {name: judge(allocation) for name, (allocation, _, _) in entries.items()}
        for name, (allocation, runs, seconds) in entries.items():
            print(f"{bits:8g} {name:12} {allocation.bits:7.4f} {losses[name]:12.5f} {runs:11.0f} {seconds:8.1f}")
        for name in ("exact", "evolution"):
            gain = losses["modelopt"] - losses[name]
            lines.append(result(f"search_peer_modelopt_{bits:g}_bits_{name}_gain", gain, ">=0", gain >= 0))
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
