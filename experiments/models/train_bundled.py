"""Train the two bundled models and write their files into mpq/models.

`tiny-lm`: Jane Austen's six novels, read from the R package janeaustenr (`Rdata.rdb` of its installed data folder).
`tiny-cnn`: the handwritten digits of scikit-learn. About twelve minutes on two cores; `--quick` shows that it runs,
in a folder of its own.
"""

import argparse
import collections
import json
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise
from math import cos, exp, pi
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.files import write_atomically
from mpq.models.tiny_cnn import TinyCNN
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.models.tokenizer import PieceTokenizer
from mpq.network.calibration import seeded

FOLDER = Path(__file__).resolve().parents[2] / "mpq" / "models"
NOVELS = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
HELD_OUT = "Persuasion"  # held out; its first chapters are the evaluation text
EVALUATION_CHARACTERS, CALIBRATION_CHARACTERS = 180_000, 300_000
WINDOW = 256


def novels(path: Path) -> dict[str, str]:
    """Title and text of each novel: character vectors of lines in R's serialization (XDR), one zlib stream each."""
    data, books = path.read_bytes(), {}
    while data:
        stream = zlib.decompressobj()
        vector, data = stream.decompress(data[4:]), stream.unused_data
        position = vector.index(b"UTF-8") + 9
        (count,) = struct.unpack_from(">i", vector, position)
        position, lines = position + 4, []
        for _ in range(count):
            (size,) = struct.unpack_from(">i", vector, position + 4)
            lines.append(vector[position + 8 : position + 8 + size].decode("utf-8"))
            position += 8 + size
        books[lines[0]] = paragraphs(lines)
    return books


def paragraphs(lines: list[str]) -> str:
    """One paragraph a line, with plain quotation marks."""
    text = "\n".join(lines).translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'", ord("_"): None})
    return "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


def learn_pieces(text: str, size: int) -> list[str]:
    """Pieces of a byte-pair vocabulary of `size` tokens, bytes counted: join the most frequent neighbours, repeat."""
    words = collections.Counter(re.findall(r" ?[A-Za-z]+|\s+|[^A-Za-z\s]+", text))
    parts = {word: tuple(word) for word in words}
    pieces: list[str] = []
    while len(pieces) < size - 256:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, count in words.items():
            for pair in pairwise(parts[word]):
                pairs[pair] += count
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        pieces.append(left + right)
        for word, split in parts.items():
            if left + right in word and left in split:
                parts[word] = joined(split, left, right)
    return pieces


def joined(split: tuple[str, ...], left: str, right: str) -> tuple[str, ...]:
    out: list[str] = []
    for part in split:
        if out and out[-1] == left and part == right:
            out[-1] = left + right
        else:
            out.append(part)
    return tuple(out)


def windows(tokens: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless random windows of the tokens, (batch_size, WINDOW + 1)."""
    while True:
        starts = torch.randint(0, len(tokens) - WINDOW - 1, (batch_size,), generator=generator)
        yield torch.stack([tokens[start : start + WINDOW + 1] for start in starts.tolist()])


def train_language_model(tokens: Tensor, held_out: Tensor, steps: int, batch_size: int = 24) -> TinyLM:
    """Muon for the matrices inside the blocks, AdamW for the rest; half-cosine after a short warm-up."""
    model = TinyLM(LMConfig())
    initialize(model)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.006, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    begin = time.perf_counter()
    for step, batch in zip(range(steps), windows(tokens, batch_size, seeded(0, "windows")), strict=False):
        factor = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + cos(pi * step / steps)))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"{step + 1:5} steps {time.perf_counter() - begin:5.0f} s loss {loss.item():.3f}", flush=True)
        if step % 200 == 199 or step == steps - 1:
            print(f"      perplexity of unseen text: {exp(held_out_loss(model, held_out)):.2f}", flush=True)
    return model.eval()


def initialize(model: TinyLM) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            deviation = 0.02 if name.startswith("embed") else parameter.shape[1] ** -0.5 / 2
            parameter.data.normal_(0, deviation, generator=seeded(0, name))


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor) -> float:
    batches = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:128].split(16)
    losses = [functional.cross_entropy(model(b)[:, :-1].flatten(0, 1), b[:, 1:].flatten()).item() for b in batches]
    return sum(losses) / len(losses)


def language_model(path: Path, folder: Path, quick: bool) -> None:
    books = novels(path)
    unseen = books.pop(next(title for title in books if title.casefold() == HELD_OUT.casefold()))
    seen = "\n".join(books.values())
    tokenizer_path = folder / "tiny_lm_pieces.txt"
    with write_atomically(tokenizer_path) as draft:
        draft.write_text(json.dumps(learn_pieces(seen, LMConfig().vocabulary), ensure_ascii=False), "utf-8")
    tokenizer = PieceTokenizer.load(tokenizer_path)
    pride = books["PRIDE AND PREJUDICE"]
    texts = {"calibration": pride[:CALIBRATION_CHARACTERS], "evaluation": unseen[:EVALUATION_CHARACTERS]}
    for use, text in texts.items():
        with write_atomically(folder / f"tiny_lm_{use}.txt") as draft:
            draft.write_text(text, "utf-8")
    if quick:
        seen = seen[:100_000]
    tokens, held_out = (torch.tensor(tokenizer.encode(text)) for text in (seen, texts["evaluation"]))
    print(f"{len(tokens):,} tokens to train on, {len(seen) / len(tokens):.2f} characters each")
    model = train_language_model(tokens, held_out, 20 if quick else 700)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name != "head.weight"}
    with write_atomically(folder / "tiny_lm.safetensors") as draft:
        save_file(state, draft)


def digits(folder: Path, quick: bool) -> None:
    """Train on 1,297 digits, 500 are for evaluation: scikit-learn's copy of the UCI optical digits' test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=seeded(0, "digits"))
    images, labels = data.images[order.numpy()].astype(np.uint8), data.target[order.numpy()].astype(np.uint8)
    with write_atomically(folder / "tiny_cnn_digits.npz") as draft:
        np.savez_compressed(draft, images=images, labels=labels)
    inputs, targets = torch.from_numpy(images).float().unsqueeze(1) / 16, torch.from_numpy(labels).long()
    model = train_classifier(inputs[:1297], targets[:1297], 2 if quick else 40)
    with torch.no_grad():
        right = (model(inputs[1297:]).argmax(1) == targets[1297:]).float().mean().item()
    print(f"tiny-cnn: {sum(p.numel() for p in model.parameters()):,} parameters, accuracy {right:.4f}")
    with write_atomically(folder / "tiny_cnn.safetensors") as draft:
        save_file(dict(model.state_dict()), draft)


def train_classifier(inputs: Tensor, targets: Tensor, epochs: int) -> TinyCNN:
    """AdamW with a one-cycle rate; images shifted by up to a pixel and made noisy."""
    model, generator = TinyCNN(), seeded(0, "augmentation")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            deviation = (2 / parameter[0].numel()) ** 0.5
            parameter.data.normal_(0, deviation, generator=seeded(0, name))
    steps = epochs * -(-len(inputs) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs), generator=generator).split(64):
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            batch = functional.pad(inputs[chosen], (1, 1, 1, 1))[:, :, 1 + down : 9 + down, 1 + right : 9 + right]
            batch = batch + 0.05 * torch.randn(batch.shape, generator=generator)
            loss = functional.cross_entropy(model(batch), targets[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--novels", type=Path, default=NOVELS, help="Rdata.rdb of the R package janeaustenr")
    parser.add_argument("--only", choices=("tiny-lm", "tiny-cnn"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, written to a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.quick else FOLDER
        if options.only != "tiny-lm":
            digits(folder, options.quick)
        if options.only != "tiny-cnn":
            language_model(options.novels, folder, options.quick)


if __name__ == "__main__":
    main()
