"""Run by the Python of an environment with mlx-lm: what MLX makes of a folder.

    PYTHON mlx_perplexity.py FOLDER WINDOWS.json

WINDOWS holds lists of tokens. Prints JSON: the perplexity of their next tokens, each window for itself, and the
likeliest token at each place.
"""

import json
import math
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model


def main() -> None:
    model, _ = load_model(Path(sys.argv[1]))
    with open(sys.argv[2], encoding="utf-8") as file:
        windows = json.load(file)
    total, tops = 0.0, []
    for row in windows:
        logits = np.array(model(mx.array([row]))[0].astype(mx.float32), dtype=np.float64)
        top = logits.max(1, keepdims=True)
        losses = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
        total += (losses[:-1] - logits[np.arange(len(row) - 1), row[1:]]).mean()
        tops.append(logits.argmax(1).tolist())
    print(json.dumps({"perplexity": math.exp(total / len(windows)), "tops": tops}))


if __name__ == "__main__":
    main()
