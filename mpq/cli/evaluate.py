"""`mpq eval`: a packed model, measured."""

import argparse

from mpq.cli.options import AddCommand, check_data, data_options
from mpq.cli.say import say, say_json


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    evaluate = command("eval", run, "load a packed model and measure it")
    evaluate.add_argument("folder", help="what 'mpq quantize' or 'mpq export' wrote")
    data_options(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    evaluate.add_argument(
        "--trust", action="store_true", help="let the folder import factories and loaders that it names"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.comparison import megabytes
    from mpq.pipeline import evaluate_folder

    check_data(options.dataset)
    quality, allocation = evaluate_folder(
        options.folder, options.dataset, trust=options.trust, nsamples=options.nsamples, seqlen=options.seqlen,
        batch_size=options.batch_size, seed=options.seed, device=options.device,
        evaluation_samples=options.eval_samples,
        progress=not options.quiet,
    )  # fmt: skip
    if options.json:
        say_json({
            "folder": options.folder, "kind": quality.kind, "quality": quality.value, "loss": quality.loss,
            "bits": allocation.bits, "bytes": allocation.total,
        })  # fmt: skip
    size = f"{megabytes(allocation.total)}, {allocation.bits:.3f} bits per weight"
    say(options, f"{options.folder}: {quality}, loss {quality.loss:.4f}; {size}")
    if quality.divergence is not None:
        say(options, quality.divergence)
