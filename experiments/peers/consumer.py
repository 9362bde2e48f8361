"""Evaluate a folder in a consumer, through the consumer's own way to load a model; run in the consumer's environment.

    PYTHON consumer.py CONSUMER FOLDER WINDOWS.json [--dtype TYPE] [--texts TEXTS.json]

CONSUMER is vllm, llama.cpp, mlx, transformers, onnxruntime or openvino; WINDOWS holds lists of tokens. llama.cpp caches
keys and values in the types given by the command in the folder's README.md. Prints JSON: perplexity of the next tokens
(windows are independent), the loss of each token, the most likely tokens at each position but the last with their
log-probabilities, tokens per second, and with TEXTS (llama.cpp) the tokens of each text.
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIKELIEST = 20  # log-probabilities per position: vLLM's default maximum
Logits = Callable[[list[int]], NDArray[Any]]  # logits of one window, (tokens, vocabulary)
# llama.cpp's enum values of KV-cache types
TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20}


def llama_cpp(folder: Path, windows: list[list[int]], dtype: str) -> Logits:
    from llama_cpp import Llama

    file = folder if folder.is_file() else sorted(folder.glob("model*.gguf"))[0]
    length = max(len(row) for row in windows)
    card = file.parent / "README.md"
    named = dict(re.findall(r" -ct([kv]) (\w+)", card.read_text(encoding="utf-8"))) if card.is_file() else {}
    cache = {f"type_{part}": TYPES[name] for part, name in named.items()}
    model = Llama(
        str(file), n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_threads=2, flash_attn=bool(cache),
        **cache,
    )  # fmt: skip

    def logits(row: list[int]) -> NDArray[Any]:
        model.reset()
        model.eval(row)
        return np.array(model.scores[: len(row)])

    return logits


def mlx(folder: Path, windows: list[list[int]], dtype: str) -> Logits:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return lambda row: np.array(model(mx.array([row]))[0].astype(mx.float32))


def transformers(folder: Path, windows: list[list[int]], dtype: str) -> Logits:
    import torch
    from transformers import AutoModelForCausalLM

    if "mpq" in (folder / "config.json").read_text(encoding="utf-8"):
        import mpq.integrations.transformers  # noqa: F401  (registers our checkpoint)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def logits(row: list[int]) -> NDArray[Any]:
        with torch.no_grad():
            return model(torch.tensor([row])).logits[0].float().numpy()

    return logits


def onnxruntime(folder: Path, windows: list[list[int]], dtype: str) -> Logits:
    import onnxruntime as ort

    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    key = session.get_inputs()[0].name
    return lambda row: session.run(None, {key: np.array([row])})[0][0]


def openvino(folder: Path, windows: list[list[int]], dtype: str) -> Logits:
    import openvino as ov

    model = ov.Core().compile_model(folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda row: model(np.array([row]))[0][0]


CONSUMERS = {
    "llama.cpp": llama_cpp, "mlx": mlx, "transformers": transformers, "onnxruntime": onnxruntime, "openvino": openvino,
}  # fmt: skip


def vllm(folder: Path, windows: list[list[int]], dtype: str) -> dict[str, Any]:
    """vLLM returns log-probabilities of the next and of the most likely tokens only."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    longest = max(len(row) for row in windows) + 1
    served = LLM(str(folder), enforce_eager=True, dtype=dtype, max_model_len=longest, skip_tokenizer_init=True)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=LIKELIEST, detokenize=False)
    losses, likeliest, logs, start = [], [], [], time.perf_counter()
    for output in served.generate([{"prompt_token_ids": row} for row in windows], asked):
        known = output.prompt_logprobs[1:]
        losses.append([-one[token].logprob for token, one in zip(output.prompt_token_ids[1:], known, strict=True)])
        best = [sorted(one, key=lambda token, one=one: -one[token].logprob)[:LIKELIEST] for one in known]
        likeliest.append(best)
        logs.append([[one[token].logprob for token in tokens] for one, tokens in zip(known, best, strict=True)])
    return {"losses": losses, "likeliest": likeliest, "logs": logs, "seconds": time.perf_counter() - start}


def computed(logits: Logits, windows: list[list[int]]) -> dict[str, Any]:
    losses, likeliest, logs, seconds = [], [], [], 0.0
    for row in windows:
        start = time.perf_counter()
        scores = logits(row)[: len(row) - 1].astype(np.float64)
        seconds += time.perf_counter() - start
        top = scores.max(1, keepdims=True)
        scores -= np.log(np.exp(scores - top).sum(1, keepdims=True)) + top
        losses.append((-scores[np.arange(len(row) - 1), row[1:]]).tolist())
        best = np.argsort(-scores, 1, "stable")[:, :LIKELIEST]
        likeliest.append(best.tolist())
        logs.append(np.take_along_axis(scores, best, 1).tolist())
    return {"losses": losses, "likeliest": likeliest, "logs": logs, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("consumer", choices=("vllm", *CONSUMERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--texts", type=Path)
    options = parser.parse_args()
    windows = json.loads(options.windows.read_text(encoding="utf-8"))
    if options.consumer == "vllm":
        answer = vllm(options.folder, windows, options.dtype)
    else:
        answer = computed(CONSUMERS[options.consumer](options.folder, windows, options.dtype), windows)
    answer["perplexity"] = math.exp(np.mean([loss for row in answer["losses"] for loss in row]))
    answer["tokens_per_second"] = sum(map(len, windows)) / answer.pop("seconds")
    if options.texts is not None:
        from llama_cpp import Llama

        file = options.folder if options.folder.is_file() else sorted(options.folder.glob("model*.gguf"))[0]
        cutter = Llama(str(file), vocab_only=True, verbose=False)
        texts = json.loads(options.texts.read_text(encoding="utf-8"))
        answer["tokens"] = [cutter.tokenize(text.encode(), add_bos=False) for text in texts]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
