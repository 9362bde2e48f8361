"""llama.cpp with quantized KV caches and flash attention; run by llama_caches.py in llama.cpp's environment.

    PYTHON peer_llama_caches.py MODEL.gguf THREADS

Prints "> ready", then answers each line by "> SPEED", in tokens per second (of CPU time with one thread):

    decode TYPE CONTEXT COUNT      one sequence after CONTEXT tokens, keys and values in TYPE (f16, q8_0, q4_0)
    batch TYPE CONTEXT COUNT TEXTS TEXTS sequences at once, COUNT tokens of each
    prefill TYPE TOKENS            a prompt
"""

import sys
import time
from collections.abc import Sequence

import llama_cpp as llama

TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # ggml's enum values
PIECE = 512  # prompt tokens per batch
VOCABULARY = 997  # seed of the prompts


class Texts:
    """A context with room for several sequences."""

    def __init__(self, model: object, threads: int, kind: str, texts: int, tokens: int) -> None:
        self.clock = time.process_time if threads == 1 else time.perf_counter
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = texts * tokens, texts
        parameters.n_batch = parameters.n_ubatch = PIECE
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = TYPES[kind]
        parameters.flash_attn_type = 1
        self.context = llama.llama_init_from_model(model, parameters)
        assert self.context, "llama.cpp makes no context"
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(PIECE, 0, 1)

    def close(self) -> None:
        """Give the memory back."""
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)

    def follow(self, items: Sequence[tuple[int, int, int]]) -> None:
        """Process (sequence, position, token) entries at once, with logits of the last one of each sequence."""
        batch, last = self.batch, {text: place for place, (text, _, _) in enumerate(items)}
        batch.n_tokens = len(items)
        for place, (text, position, token) in enumerate(items):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, position, 1
            batch.seq_id[place][0], batch.logits[place] = text, last[text] == place
        assert llama.llama_decode(self.context, batch) == 0
        llama.llama_get_logits(self.context)  # waits for the computation

    def read(self, text: int, tokens: int) -> None:
        """Process a prompt from an empty cache."""
        llama.llama_memory_seq_rm(self.memory, text, 0, -1)
        for start in range(0, tokens, PIECE):
            self.follow([(text, at, at * 7 % VOCABULARY + 3) for at in range(start, min(start + PIECE, tokens))])

    def write(self, texts: int, first: int, count: int) -> float:
        """Seconds to decode `count` further tokens of each sequence, removed from the cache afterwards."""
        started = self.clock()
        for step in range(count):
            self.follow([(text, first + step, 5 + step + text) for text in range(texts)])
        seconds = self.clock() - started
        for text in range(texts):
            llama.llama_memory_seq_rm(self.memory, text, first, -1)
        return seconds


def main() -> None:
    file, threads = sys.argv[1], int(sys.argv[2])
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(file.encode(), llama.llama_model_default_params())
    held: tuple[str, Texts] | None = None
    print("> ready", flush=True)
    for line in sys.stdin:
        what, kind, *numbers = line.split()
        tokens, count, texts = (*map(int, numbers), 1, 1)[:3]
        key = f"{what} {kind} {tokens} {texts}"
        if held is None or held[0] != key:
            if held is not None:
                held[1].close()
            held = (key, Texts(model, threads, kind, texts, tokens + count + 8))
            if what != "prefill":
                for text in range(texts):
                    held[1].read(text, tokens)
                held[1].write(texts, tokens, 2)
        if what == "prefill":
            started = held[1].clock()
            held[1].read(0, tokens)
            print(">", tokens / (held[1].clock() - started), flush=True)
        else:
            print(">", texts * count / held[1].write(texts, tokens, count), flush=True)


if __name__ == "__main__":
    main()
