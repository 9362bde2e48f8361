"""KL divergence of GGUF files from a reference file in llama.cpp; run in an environment with llama-cpp-python.

    PYTHON llama_divergence.py WINDOWS.json ORIGINAL.gguf FILE.gguf...

WINDOWS holds lists of tokens. Prints JSON: for each file its perplexity, the mean divergence KL(original || file) of
the next token's distribution, and the share of positions with the same most likely token.
"""

import json
import math
import sys

import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray


def log_probabilities(file: str, windows: list[list[int]]) -> NDArray[np.float32]:
    length = len(windows[0])
    model = Llama(file, n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_threads=2)
    found = []
    for row in windows:
        model.reset()
        model.eval(row)
        scores = np.array(model.scores[: len(row)], dtype=np.float64)
        scores -= scores.max(1, keepdims=True)
        found.append((scores - np.log(np.exp(scores).sum(1, keepdims=True))).astype(np.float32))
    return np.stack(found)


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        windows = json.load(file)
    following = np.array(windows)[:, 1:, None]
    original = log_probabilities(sys.argv[2], windows)
    answer = {}
    for name in sys.argv[2:]:
        own = log_probabilities(name, windows)
        loss = -np.take_along_axis(own[:, :-1], following, 2).mean(dtype=np.float64)
        divergence = (np.exp(original) * (original - own)).sum(2).mean(dtype=np.float64)
        agreement = (own.argmax(2) == original.argmax(2)).mean()
        answer[name] = {"perplexity": math.exp(loss), "kl": float(divergence), "top1": float(agreement)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
