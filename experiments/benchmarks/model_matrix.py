"""Run the whole job on many architectures: profile, search, simulate, export, load; compare outputs.

    python -m experiments.benchmarks.model_matrix [--quick] [NAME ...]

Every model is built from its configuration with small random weights. Causal language models also continue a prompt, as
`mpq generate` does: the tokens must be those of transformers' own generation. One line each: status, seconds, layers,
share of the parameters that is quantized, and the error if it fails. RESULT lines come last.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mpq
from experiments.models.model_cases import CASES, QUICK, Case, import_timm
from experiments.result import result
from mpq.core.errors import MpqError
from mpq.exporters.verify import verify_outputs
from mpq.generation.generate import generate
from mpq.network.calibration import next_token_loss, outputs_of
from mpq.network.prepare import prepared
from mpq.quantized import fuse, quantized_layers
from mpq.rounding.store import Finished, Rounder, RoundingStore
from mpq.training.tuned_scales import Tuning, tune_scales

FORMATS = ("int3-g32", "int4-g32", "int8-channel")
BITS = 5.0
STEPS = 2
TOKENS = 8  # that a causal language model generates


@dataclass(frozen=True)
class Row:
    """Outcome of one architecture."""

    name: str
    status: str  # "ok", "failed" or "skipped"
    reason: str
    seconds: float
    layers: int = 0
    coverage: float = 0.0  # share of the parameters
    generates: bool = False  # the same tokens as transformers

    def __str__(self) -> str:
        return (
            f"{self.name:38} {self.status:8} {self.seconds:6.1f} s  {self.layers:4} layers  "
            f"{100 * self.coverage:5.1f} % of the parameters  {'generates  ' * self.generates}{self.reason}"
        )


def run_case(case: Case, folder: Path) -> Row:
    """Run the whole job on one model; errors become a row."""
    started = time.perf_counter()
    try:
        if case.name.startswith("timm "):
            import_timm()
    except MpqError as error:
        return Row(case.name, "skipped", str(error), time.perf_counter() - started)
    try:
        model = case.build()
        return through(case, model, folder, started)
    except Exception as error:  # as a user would see it, with the exception's type
        text = str(error).strip().splitlines() or [""]
        return Row(case.name, "failed", f"{type(error).__name__}: {text[0][:230]}", time.perf_counter() - started)


def through(case: Case, model: torch.nn.Module, folder: Path, started: float) -> Row:
    """Profile, search, simulate, tune scales, export (compared layer by layer), load, and compare again."""
    batches = case.batches(model)
    table = mpq.profile(model, batches, case.loss_fn, formats=FORMATS, granularity="row", progress=False)
    allocation = mpq.frontier(table).at(bits=BITS)

    def run(model: torch.nn.Module) -> torch.Tensor:
        return case.loss_fn(model, batches[0])

    plain = not hasattr(model, "config")
    mpq.export(model, allocation, folder, inputs=run, method=rounded(case, model, allocation))
    loaded = mpq.load(folder, model=case.build() if plain else None)
    verify_outputs(model, loaded, allocation, run)
    generates = is_causal(case)
    if generates:
        check_generation(loaded, batches[0][0])
    whole = sum(parameter.numel() for parameter in model.parameters())
    coverage = sum(layer.params for layer in allocation.layers) / whole
    return Row(case.name, "ok", "", time.perf_counter() - started, len(allocation.layers), coverage, generates)


def is_causal(case: Case) -> bool:
    """Whether the model continues texts by itself, without an encoder."""
    return case.loss_fn is next_token_loss


def check_generation(model: Any, prompt: torch.Tensor) -> None:
    """MpqError where the greedy tokens are not those of transformers' own generation by the same packed model."""
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    whole = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
    expected = whole[0, len(prompt) :].tolist()
    tokens = generate(fuse(model), prompt, max_new_tokens=TOKENS).tokens
    if list(tokens) != expected:
        raise MpqError(f"the model generates {list(tokens)}, and transformers {expected}")


def rounded(case: Case, model: torch.nn.Module, allocation: mpq.Allocation) -> Rounder:
    """Round the layers, with scales tuned for STEPS steps if the model returns logits."""
    model, batches, store = prepared(model), case.batches(model), RoundingStore()
    with outputs_of(model) as outputs, torch.no_grad():
        case.loss_fn(model, batches[0])
    if not outputs or outputs[0].ndim < 2:
        return store
    layers = {layer.name: one for layer, _, one in quantized_layers(model, allocation, store)}
    return Finished("tuned", tune_scales(model, allocation, layers, batches, case.loss_fn, Tuning(STEPS)), store)


def main() -> int:
    """Run the selected cases; return 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few, in less than a minute")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in options.names or (QUICK if options.quick else CASES):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_case(CASES[name], Path(folder) / "out"))
        print(rows[-1], flush=True)
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "failed", "skipped")}
    print(f"{sum(row.seconds for row in rows):.0f} s, {counts['skipped']} of {len(rows)} architectures skipped")
    print(result("architectures_failed", counts["failed"], "=0", not counts["failed"]))
    generating = sum(row.generates for row in rows)
    asked = sum(is_causal(CASES[row.name]) for row in rows if row.status != "skipped")
    print(result("architectures_generating", generating, f"={asked}", generating == asked))
    print(result("architectures_ok", counts["ok"], f"={len(rows) - counts['skipped']}", not counts["failed"]))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
