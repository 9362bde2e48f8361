"""`mpq generate`: text from a packed language model."""

import argparse
from pathlib import Path

from mpq.cli.options import AddCommand
from mpq.core.errors import MpqError


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    generate = command("generate", run, "continue a prompt with a packed language model")
    generate.add_argument("folder", help="folder that 'mpq quantize', 'mpq export' or another quantizer wrote")
    generate.add_argument(
        "--prompt", required=True, nargs="+", metavar="TEXT", help="text to continue; several are continued at once"
    )
    generate.add_argument("--max-new-tokens", type=int, default=64, help="tokens to generate")
    generate.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default): greedy")
    generate.add_argument("--seed", type=int, default=0, help="seed of sampling")
    generate.add_argument(
        "--kv-cache", metavar="FORMAT", help="format of cached keys and values, e.g. int8-token or int4-g32-asym"
    )
    generate.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    generate.add_argument("--trust", action="store_true", help="allow the folder to import the factory that it names")
    generate.add_argument("--compare", action="store_true", help="also time the original model in bfloat16")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from mpq.exporters.opening import open_any
    from mpq.generation.batch import generate_batch, throughput
    from mpq.generation.generate import compare_speeds, generate
    from mpq.generation.serving import serve_format
    from mpq.kernels.bench import device_of
    from mpq.quantized import fuse
    from mpq.sources import names_in, open_network
    from mpq.sources.networks import encoder_of, tokenizer_in

    if any("\ud800" <= letter <= "\udfff" for text in options.prompt for letter in text):
        raise MpqError("the prompt holds bytes that are no UTF-8 text: give it in UTF-8")
    device = device_of(options.device)
    opened = open_any(options.folder, device=device, trust=options.trust)
    model = fuse(opened.model)
    if options.kv_cache is not None:
        serve_format(model, options.kv_cache)
    name, _, untrusted = names_in(opened.allocation.provenance, options.trust)
    tokenizer = tokenizer_in(Path(options.folder))
    if tokenizer is None and opened.network is not None:
        tokenizer = opened.network.tokenizer
    network = open_network(name, untrusted) if name is not None and (tokenizer is None or options.compare) else None
    if tokenizer is None and network is not None:
        tokenizer = network.tokenizer
    if tokenizer is None:
        raise MpqError(f"{options.folder} has no tokenizer: only language models can continue a prompt")
    encode = encoder_of(tokenizer) if callable(tokenizer) else tokenizer.encode
    prompts = [torch.tensor(encode(text), device=device) for text in options.prompt]
    settings = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": options.seed}
    if len(prompts) == 1:
        generations = [generate(model, prompts[0], **settings)]
    else:
        generations = generate_batch(model, prompts, **settings)
    for text, generation in zip(options.prompt, generations, strict=True):
        print(text + tokenizer.decode(list(generation.tokens)))
    print(f"\n{throughput(generations):.1f} tokens per second")
    if options.compare and network is not None:
        speeds = compare_speeds({"packed": model, "bfloat16": network.model.to(device, torch.bfloat16)}, prompts[0])
        print(", ".join(f"{which} {speed:.1f}" for which, speed in speeds.items()))
