"""`mpq generate`: text from a packed language model."""

import argparse
from pathlib import Path

from mpq.cli.options import AddCommand
from mpq.core.errors import MpqError


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    generate = command("generate", run, "continue a prompt with a packed language model")
    generate.add_argument("folder", help="what 'mpq quantize' wrote")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--compare", action="store_true", help="also time the original model in bfloat16")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from mpq.core.allocation import Allocation
    from mpq.exporters.mpq import checkpoint
    from mpq.generation.generate import compare_speeds, generate
    from mpq.quantized import fuse
    from mpq.sources import open_network

    model = fuse(checkpoint.load(options.folder))
    name = Allocation.load(Path(options.folder) / "allocation.json").provenance.get("model")
    if name is None:
        raise MpqError(f"{options.folder} does not say which model it was made of, so there is no tokenizer for it")
    network = open_network(name)
    if network.encode is None or network.tokenizer is None:
        raise MpqError(f"{name} has no tokenizer: only language models can continue a prompt")
    prompt = torch.tensor(network.encode(options.prompt))
    found = generate(
        model, prompt, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed
    )
    print(options.prompt + network.tokenizer.decode(list(found.tokens)))
    print(f"\n{found.tokens_per_second:.1f} tokens per second")
    if options.compare:
        speeds = compare_speeds({"packed": model, "bfloat16": network.model.to(torch.bfloat16)}, prompt)
        print(", ".join(f"{which} {speed:.1f}" for which, speed in speeds.items()))
