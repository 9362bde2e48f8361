"""`mpq eval`: a packed model, measured."""

import argparse

from mpq.cli.options import AddCommand, data_options


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    evaluate = command("eval", run, "load a packed model and measure it")
    evaluate.add_argument("folder", help="what 'mpq quantize' or 'mpq export' wrote")
    data_options(evaluate)
    evaluate.add_argument(
        "--trust", action="store_true", help="let the folder import factories and loaders that it names"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.comparison import megabytes
    from mpq.pipeline import evaluate_folder

    quality, allocation = evaluate_folder(
        options.folder, options.dataset, trust=options.trust, nsamples=options.nsamples, seqlen=options.seqlen,
        batch_size=options.batch_size, seed=options.seed, device=options.device,
        evaluation_samples=options.eval_samples,
    )  # fmt: skip
    size = f"{megabytes(allocation.total)}, {allocation.bits:.3f} bits per weight"
    print(f"{options.folder}: {quality}, loss {quality.loss:.4f}; {size}")
    if quality.divergence is not None:
        print(quality.divergence)
