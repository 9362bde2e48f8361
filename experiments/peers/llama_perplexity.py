"""Run by the Python of an environment with llama-cpp-python: what llama.cpp makes of a GGUF file.

    PYTHON llama_perplexity.py MODEL.gguf WINDOWS.json [TEXT.json]

WINDOWS holds lists of tokens. Prints JSON: the perplexity of their next tokens, each window for itself, and the tokens
that llama.cpp cuts each of the texts into.
"""

import json
import math
import sys

import numpy as np
from llama_cpp import Llama


def perplexity(model: Llama, windows: list[list[int]]) -> float:
    total = count = 0
    for row in windows:
        model.reset()
        model.eval(row)
        scores = np.array(model.scores[: len(row)], dtype=np.float64)
        top = scores.max(1)
        losses = np.log(np.exp(scores - top[:, None]).sum(1)) + top
        total += (losses[:-1] - scores[np.arange(len(row) - 1), row[1:]]).sum()
        count += len(row) - 1
    return math.exp(total / count)


def main() -> None:
    with open(sys.argv[2], encoding="utf-8") as file:
        windows = json.load(file)
    length = max(len(row) for row in windows)
    model = Llama(sys.argv[1], n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_threads=2)
    answer = {"perplexity": perplexity(model, windows)}
    if len(sys.argv) > 3:
        with open(sys.argv[3], encoding="utf-8") as file:
            answer["tokens"] = [model.tokenize(text.encode(), add_bos=False) for text in json.load(file)]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
