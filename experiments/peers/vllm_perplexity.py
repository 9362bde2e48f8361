"""Run by the Python of an environment with vLLM: perplexity of a folder as `vllm.LLM` opens it.

    PYTHON vllm_perplexity.py FOLDER WINDOWS.json DTYPE

WINDOWS holds lists of tokens; the last line printed is JSON.
"""

import json
import math
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, windows, dtype = sys.argv[1:]
    with open(windows, encoding="utf-8") as file:
        rows = json.load(file)
    served = LLM(folder, enforce_eager=True, dtype=dtype, max_model_len=300, skip_tokenizer_init=True)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    total = count = 0
    for output in served.generate([{"prompt_token_ids": row} for row in rows], asked):
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        for token, known in pairs:
            total, count = total - known[token].logprob, count + 1
    print(json.dumps({"perplexity": math.exp(total / count)}))


if __name__ == "__main__":
    main()
