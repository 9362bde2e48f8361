"""`mpq eval`: measure a packed model."""

import argparse
from dataclasses import asdict

from mpq.cli.options import AddCommand, check_data, data_options
from mpq.cli.say import say, say_json


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    evaluate = command("eval", run, "load a packed model and measure it")
    evaluate.add_argument("folder", help="folder that 'mpq quantize', 'mpq export' or another quantizer wrote")
    data_options(evaluate)
    evaluate.add_argument(
        "--reproducible", type=int, nargs="?", const=16, default=0, metavar="TOKENS",
        help="also measure how much greedy answers of TOKENS tokens (default: 16) depend on batch size, padding and "
        "threads, in bfloat16, LayerCast and float32",
    )  # fmt: skip
    evaluate.add_argument(
        "--tasks", metavar="NAMES",
        help="run tasks of lm-evaluation-harness instead: names or .yaml files, comma-separated",
    )  # fmt: skip
    evaluate.add_argument("--fewshot", type=int, help="for --tasks: few-shot examples (default: the task's own number)")
    evaluate.add_argument("--limit", type=int, help="for --tasks: questions of each task (default: all)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    evaluate.add_argument(
        "--trust", action="store_true", help="allow the folder to import the factories and loaders that it names"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.tasks is not None:
        _run_tasks(options)
        return
    from mpq.comparison import megabytes
    from mpq.folders import evaluate_folder, reproducibility_of_folder
    from mpq.lowprecision.reproducibility import Reproducibility, table_of

    check_data(options.dataset)
    where = {
        "trust": options.trust, "nsamples": options.nsamples, "seqlen": options.seqlen,
        "batch_size": options.batch_size, "seed": options.seed, "device": options.device,
        "evaluation_samples": options.eval_samples,
    }  # fmt: skip
    quality, allocation = evaluate_folder(options.folder, options.dataset, progress=not options.quiet, **where)
    answers: tuple[Reproducibility, ...] = ()
    if options.reproducible:
        answers = reproducibility_of_folder(options.folder, options.dataset, steps=options.reproducible, **where)
    if options.json:
        say_json({
            "folder": options.folder, "kind": quality.kind, "quality": quality.value, "loss": quality.loss,
            "bits": allocation.bits, "bytes": allocation.total,
            **({"kv_bits": allocation.cache.bits} if allocation.cache is not None else {}),
            **({"reproducibility": [asdict(one) for one in answers]} if answers else {}),
        })  # fmt: skip
    size = f"{megabytes(allocation.total)}, {allocation.bits:.3f} bits per weight"
    if allocation.cache is not None:
        size += f", cache at {allocation.cache.bits:.3f} bits"
    say(options, f"{options.folder}: {quality}, loss {quality.loss:.4f}; {size}")
    if quality.divergence is not None:
        say(options, quality.divergence)
    if answers:
        say(options, table_of(answers))


def _run_tasks(options: argparse.Namespace) -> None:
    from mpq.harness import evaluate_tasks

    results = evaluate_tasks(
        options.folder, tuple(filter(None, options.tasks.split(","))), fewshot=options.fewshot, limit=options.limit,
        batch_size=options.batch_size, seed=options.seed, device=options.device, trust=options.trust,
    )  # fmt: skip
    if options.json:
        say_json({"folder": options.folder, "tasks": [asdict(result) for result in results]})
    for result in results:
        say(options, result)
