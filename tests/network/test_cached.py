"""Hooks on keys and values before they are cached, for several architectures."""

import pytest
import torch
from caching_models import CONFIGS, SHAPE, TOKENS, model_of
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, DynamicCache

from mpq.core.errors import MpqError
from mpq.network.cached import change_cached, changing, find_cached
from mpq.network.calibration import next_token_loss


@pytest.mark.parametrize(
    ("name", "heads", "windows"),
    [
        ("tiny-lm", 2, (0, 0)), ("llama", 2, (0, 0)), ("mistral", 2, (5, 5)), ("gemma2", 2, (5, 0)),
        ("gpt2", 4, (0, 0)),
    ],
)  # fmt: skip
def test_entries_are_found_with_heads_widths_and_windows(name: str, heads: int, windows: tuple[int, int]) -> None:
    found = find_cached(model_of(name), TOKENS[:1], next_token_loss)
    assert [entry.name for entry in found] == ["cache.0.keys", "cache.0.values", "cache.1.keys", "cache.1.values"]
    assert {(entry.rows, entry.cols) for entry in found} == {(heads, 8)}
    assert [entry.kind for entry in found] == ["keys", "values"] * 2
    assert tuple(entry.window for entry in found[::2]) == windows


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-lm", *CONFIGS])
def test_attention_reads_the_changed_vectors(name: str) -> None:
    model = model_of(name)
    untouched = float(next_token_loss(model, TOKENS))
    with changing(model, lambda name, vectors: vectors):
        assert float(next_token_loss(model, TOKENS)) == untouched
    for entry in find_cached(model, TOKENS[:1], next_token_loss):

        def change(name: str, vectors: Tensor, entry: str = entry.name) -> Tensor:
            return torch.zeros_like(vectors) if name == entry else vectors

        with changing(model, change):
            assert float(next_token_loss(model, TOKENS)) != untouched
    assert float(next_token_loss(model, TOKENS)) == untouched


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_caches_the_changed_vectors_once(name: str) -> None:
    model = model_of(name)
    seen: list[int] = []

    def change(name: str, vectors: Tensor) -> Tensor:
        if name == "cache.0.keys":
            seen.append(vectors.shape[2])
        return vectors * 0.5

    handles = change_cached(model, change)
    made = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert seen == [12, 1, 1, 1]
    again = TOKENS[:1]
    for _ in range(4):  # without a cache between tokens
        again = torch.cat([again, model(again).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, again)
    for handle in handles:
        handle.remove()


def test_a_prefilled_foreign_cache_is_refused() -> None:
    model = model_of("llama")
    cache = DynamicCache(config=model.config)
    model(TOKENS, cache=cache)
    with changing(model, lambda name, vectors: vectors), pytest.raises(MpqError, match="with 12 tokens"):
        model(TOKENS[:, :1], cache=cache)


def test_models_without_a_cache_are_refused_by_name() -> None:
    encoder = BertForSequenceClassification(BertConfig(**SHAPE))
    with pytest.raises(MpqError, match="BertForSequenceClassification has no cache"):
        find_cached(encoder, TOKENS, lambda model, batch: model(batch).logits.sum())
