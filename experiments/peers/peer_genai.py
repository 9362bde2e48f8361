"""ONNX Runtime decoding with a folder of its model builder, run by bench_generate.py with onnxruntime-genai.

    PYTHON peer_genai.py FOLDER THREADS

Uses the protocol of peer_llama.py.
"""

import sys
import time

import onnxruntime_genai

PROMPT = range(3, 19)


def text(model: onnxruntime_genai.Model, count: int) -> tuple[float, list[int]]:
    """Tokens per second without the prompt and the first token, and the tokens."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = len(PROMPT) + count
    parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(list(PROMPT))
    generator.generate_next_token()
    started, tokens = time.perf_counter(), [int(generator.get_next_tokens()[0])]
    while len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return (count - 1) / (time.perf_counter() - started), tokens


def main() -> None:
    config = onnxruntime_genai.Config(sys.argv[1])
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {sys.argv[2]}}}}}}}}}')
    model = onnxruntime_genai.Model(config)
    text(model, 4)
    print("> ready", flush=True)
    for line in sys.stdin:
        speed, tokens = text(model, int(line))
        print(">", speed, *tokens, flush=True)


if __name__ == "__main__":
    main()
