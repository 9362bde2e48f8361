"""Perplexity of the WikiText-2 Llama with keys and values cached in fewer bits, and the cache's bytes per token.

Every layer rounds all keys and values, including the current token's, as TurboMind does (arXiv 2508.15601): per head
and token, asymmetric.

    python -m experiments.papers.kv_cache [--quick]
"""

import argparse
import inspect
import math

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from experiments.models.reference_models import wikitext_llama, wikitext_tokens
from experiments.result import result
from mpq.core.costs import kv_bytes_per_token
from mpq.kernels.kv_cache import dequantize_heads, quantize_heads


class RoundedCache(DynamicCache):
    """A cache that rounds keys and values by `quantize_heads`; 16 bits or more leave them unchanged."""

    def __init__(self, key_bits: int, value_bits: int) -> None:
        super().__init__()
        self.bits = key_bits, value_bits

    def update(self, keys: Tensor, values: Tensor, *rest: object, **more: object) -> tuple[Tensor, Tensor]:
        """Keys and values so far, rounded."""
        pair = (
            vectors if bits >= 16 else dequantize_heads(quantize_heads(vectors, bits)).to(vectors.dtype)
            for vectors, bits in zip((keys, values), self.bits, strict=True)
        )
        return super().update(*pair, *rest, **more)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, key_bits: int, value_bits: int) -> float:
    losses = []
    # transformers has had two names for it
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for window in tokens.split(8):
        logits = model(window, use_cache=True, **{name: RoundedCache(key_bits, value_bits)}).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), window[:, 1:].flatten())
        losses.append(float(loss) * len(window))
    return math.exp(sum(losses) / len(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 windows instead of 128")
    windows = 8 if parser.parse_args().quick else 128
    model, tokens = wikitext_llama(), wikitext_tokens("test", windows)
    config = model.config
    shape = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    print(f"{windows} windows of 256 test tokens\n{'keys':>5} {'values':>6} {'perplexity':>11} {'bytes a token':>14}")
    found = {}
    for keys, values in [(16, 16), (8, 8), (4, 4), (3, 3), (2, 2), (4, 8), (8, 4), (2, 8), (8, 2)]:
        found[keys, values] = perplexity(model, tokens, keys, values)
        size = (kv_bytes_per_token(*shape, keys) + kv_bytes_per_token(*shape, values)) // 2
        print(f"{keys:>5} {values:>6} {found[keys, values]:>11.3f} {size:>14}")
    base = found[16, 16]
    rises = {bits: found[bits, bits] / base - 1 for bits in (8, 4, 3, 2)}
    print(result("kv8_perplexity_rise", rises[8], "<0.001", rises[8] < 0.001))
    print(result("kv4_perplexity_rise", rises[4], "<0.03", rises[4] < 0.03))
    order = rises[8] <= rises[4] <= rises[3] <= rises[2]
    print(result("rise_falls_with_bits", order, "=1", order))
    sensitive = found[2, 8] > found[8, 2]
    print(result("keys_more_sensitive_than_values", sensitive, "=1", sensitive))


if __name__ == "__main__":
    main()
