"""Tokens per second of a folder in vLLM for several batch sizes; run in an environment with vLLM.

    PYTHON vllm_speed.py FOLDER BATCH ...

The last line printed is JSON, by batch.
"""

import json
import sys
import time

TOKENS, PROMPT = 64, 32  # generated tokens, and tokens of each prompt


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, *batches = sys.argv[1:]
    served = LLM(folder, dtype="bfloat16", max_model_len=256, max_num_seqs=128, skip_tokenizer_init=True)
    found = {}
    for batch in map(int, batches):
        prompts = [{"prompt_token_ids": [1 + (7 * i + j) % 999 for j in range(PROMPT)]} for i in range(batch)]
        asked = SamplingParams(max_tokens=TOKENS, ignore_eos=True, detokenize=False, temperature=0)
        served.generate(prompts, asked)  # warm-up
        start = time.perf_counter()
        served.generate(prompts, asked)
        found[batch] = batch * TOKENS / (time.perf_counter() - start)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
