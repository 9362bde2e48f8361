"""Intel's AutoScheme on the Llama, run by the Python of an environment with auto-round: JSON on stdout.

PYTHON -m experiments.peers.peer_autoround BITS WINDOWS

It supports language models only: ResNet-20 gives `tokenizer must not be None if model is nn.Module`. Its texts are the
same windows, decoded.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
from auto_round.schemes import QuantizationScheme
from torch import nn
from transformers import AutoTokenizer

from experiments.models.reference_models import data_file, wikitext_llama, wikitext_tokens

CHOICES = (2, 3, 4, 8)
LENGTH = 256


def main() -> None:
    torch.set_num_threads(1)
    bits, windows = float(sys.argv[1]), int(sys.argv[2])
    model = wikitext_llama()
    tokenizer = AutoTokenizer.from_pretrained(data_file("wikitext2_llama_5m"))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        file.write_text(json.dumps([tokenizer.decode(row) for row in wikitext_tokens("train", windows)]))
        scheme = AutoScheme(
            avg_bits=bits,
            options=[QuantizationScheme(bits=each, group_size=-1, sym=True, act_bits=16) for each in CHOICES],
            ignore_scale_zp_bits=True,
            nsamples=windows,
            seqlen=LENGTH - 16,  # it skips shorter texts, and a decoded window may have fewer tokens
            batch_size=2,
            low_gpu_mem_usage=False,
            low_cpu_mem_usage=False,
        )
        start = time.perf_counter()
        made = GenScheme(scheme, model, layers, {}, str(file), "cpu", tokenizer, enable_torch_compile=False)
        found = made.get_layer_config()
        seconds = time.perf_counter() - start
    print("\n" + json.dumps({"seconds": seconds, "bits": {name: found[name]["bits"] for name in layers}}))


if __name__ == "__main__":
    main()
