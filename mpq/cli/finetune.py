"""`mpq finetune`: train a packed model under its allocation."""

import argparse

from mpq.cli.options import AddCommand, check_data, data_options, output_name, value_of
from mpq.cli.say import say, say_json
from mpq.core.errors import MpqError


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    finetune = command("finetune", run, "train a packed model against its original, under the same allocation")
    finetune.add_argument("folder", help="folder that 'mpq quantize' or 'mpq export' wrote")
    finetune.add_argument("--steps", type=int, default=300, help="training steps")
    finetune.add_argument(
        "--lr", type=value_of, default="auto", help="peak learning rate of the weights, or auto: from the curvature"
    )
    finetune.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="optimizer")
    finetune.add_argument("--accumulate", type=int, default=1, help="batches accumulated per step")
    finetune.add_argument("--kl", type=float, default=1.0, help="weight of the divergence from the original")
    finetune.add_argument("--task", type=float, default=0.0, help="weight of the loss on the data")
    finetune.add_argument("--blocks", type=float, default=0.0, help="weight of the distance of block outputs")
    finetune.add_argument(
        "--stages",
        type=int,
        default=1,
        help="quantize layers in this number of stages, the most sensitive first (HAWQ)",
    )
    finetune.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    finetune.add_argument("--freeze-batchnorm", action="store_true", help="keep batch normalizations' statistics")
    data_options(finetune)
    finetune.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    finetune.add_argument("--trust", action="store_true", help="allow the folder to import the factories that it names")
    finetune.add_argument("-o", "--output", type=output_name, help="folder to write (default: FOLDER-finetuned)")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from pathlib import Path

    from mpq.training.objective import Objective
    from mpq.training.settings import Finetuning

    check_data(options.dataset)
    folder = Path(options.folder)
    if not (folder / "config.json").is_file():
        raise MpqError(f"{folder} is not a packed model: expected a folder that 'mpq quantize' wrote")
    settings = Finetuning(
        steps=options.steps, optimizer=options.optimizer, accumulate=options.accumulate, bfloat16=options.bfloat16,
        freeze_batchnorm=options.freeze_batchnorm, stages=options.stages, seed=options.seed,
        objective=Objective(options.kl, options.task, options.blocks), lr=options.lr,
    )  # fmt: skip

    from mpq.finetuned_folder import finetune_folder

    output = options.output or folder.with_name(f"{folder.resolve().name}-finetuned")
    outcome = finetune_folder(
        folder, output, settings, options.dataset, trust=options.trust, progress=not options.quiet,
        nsamples=options.nsamples, seqlen=options.seqlen, batch_size=options.batch_size, seed=options.seed,
        device=options.device, evaluation_samples=options.eval_samples,
    )  # fmt: skip
    tuned = outcome.finetuned
    if options.json:
        say_json({
            "folder": str(outcome.folder), "kept": tuned.kept, "steps": len(tuned.losses),
            "lr": tuned.lr,
            "harm_before": tuned.before, "harm_after": tuned.after, "kind": outcome.after.kind,
            "original": outcome.original.value, "before": outcome.before.value, "after": outcome.after.value,
        })  # fmt: skip
    for name, quality in (("original", outcome.original), ("before", outcome.before), ("after", outcome.after)):
        say(options, f"{name:8}  {quality}")
    for sentence in outcome.words():
        say(options, sentence)
    say(options, f"written to {outcome.folder}")
