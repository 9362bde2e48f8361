"""llama.cpp decoding with a GGUF file, run by bench_generate.py in an environment with llama-cpp-python.

    PYTHON peer_llama.py MODEL.gguf THREADS

Prints "ready", then answers every line "COUNT" by a greedy continuation of that many tokens after tokens 3 to 18:
tokens per second without the prompt and the first token, and the tokens.
"""

import ctypes
import sys
import time
from collections.abc import Callable

import llama_cpp
import numpy as np

PROMPT = range(3, 19)


def decoder(file: str, threads: int) -> Callable[[list[int]], int]:
    """A function from the next tokens to the most likely following one; no tokens start a new sequence."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = 1024
    parameters.n_threads = parameters.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    assert context, f"llama.cpp cannot load {file}"
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def follow(tokens: list[int]) -> int:
        if not tokens:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            return -1
        kept = (ctypes.c_int32 * len(tokens))(*tokens)  # keep alive: the batch points into it
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(kept, len(tokens))) == 0
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(size,)).argmax())

    return follow


def text(follow: Callable[[list[int]], int], count: int) -> tuple[float, list[int]]:
    """Tokens per second, and the tokens."""
    follow([])
    tokens = [follow(list(PROMPT))]
    started = time.perf_counter()
    while len(tokens) < count:
        tokens.append(follow(tokens[-1:]))
    return (count - 1) / (time.perf_counter() - started), tokens


def main() -> None:
    follow = decoder(sys.argv[1], int(sys.argv[2]))
    text(follow, 4)
    print("> ready", flush=True)
    for line in sys.stdin:
        speed, tokens = text(follow, int(line))
        print(">", speed, *tokens, flush=True)


if __name__ == "__main__":
    main()
