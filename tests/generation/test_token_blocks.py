"""Keys in blocks of tokens with a scale for each column: stored, scored, generated with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from caching_models import TOKENS, model_of
from torch import Tensor, nn

import mpq
from mpq.core.allocation import Allocation
from mpq.core.cache import TokenBlocks, cache_name, head_bytes, parse_cache_format, stored_bytes
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.exporters.mpq.checkpoint import load
from mpq.generation.generate import generate
from mpq.generation.packed_cache import PackedCache, StoredLayer
from mpq.generation.serving import serve_cache
from mpq.generation.stored_vectors import StoredVectors
from mpq.kernels.kv_cache import quantize_heads, round_vectors
from mpq.kernels.token_blocks import pack_blocks, unpack_blocks
from mpq.network.cached import changing, find_cached
from mpq.network.calibration import next_token_loss
from mpq.network.layers import find_layers
from mpq.quantized import CacheRounding, simulate
from mpq.sensitivity.profile import profile

NAME = "int4-t8-asym"
FORMAT = parse_cache_format(NAME)
assert isinstance(FORMAT, TokenBlocks)


def vectors(tokens: int, seed: int = 0) -> Tensor:
    columns = torch.logspace(-1, 1, 16)  # columns of very different magnitude
    return torch.randn(2, 3, tokens, 16, generator=torch.Generator().manual_seed(seed)) * columns


@pytest.mark.parametrize("name", ["int2-t64-asym", "int3-t64", "int8-t8-asym", "uint4-t16"])
def test_names_parse_and_print_the_same(name: str) -> None:
    format = parse_cache_format(name)
    assert cache_name(format) == name
    assert parse_cache_format(cache_name(format)) == format


@pytest.mark.parametrize("name", ["int4-t7-asym", "fp8-e4m3-t8", "int4-g32-t8"])
def test_invalid_blocks_are_refused(name: str) -> None:
    with pytest.raises(MpqError):
        parse_cache_format(name)


def test_each_column_of_a_block_is_rounded_separately() -> None:
    values = vectors(20)
    rounded = round_vectors(values, FORMAT)
    assert torch.equal(rounded[:, :, 16:], values[:, :, 16:])
    for block in (slice(0, 8), slice(8, 16)):
        part = values[:, :, block]
        step = (part.amax(2, keepdim=True) - part.amin(2, keepdim=True)) / 15
        assert ((rounded[:, :, block] - part).abs() <= 0.51 * step + 2e-3 * part.abs().amax()).all()
    by_token = round_vectors(values, parse_cache_format("int4-asym"))
    errors = [(one - values)[:, :, :16].abs()[..., 0].mean() for one in (rounded, by_token)]
    assert errors[0] < 0.1 * errors[1]


def test_stored_bytes_are_as_reported() -> None:
    values = vectors(24)
    stored = pack_blocks(values, FORMAT)
    assert stored.nbytes == 2 * 3 * 3 * FORMAT.block_bytes(16)
    assert torch.equal(unpack_blocks(stored, FORMAT, 16), round_vectors(values, FORMAT))
    assert head_bytes(FORMAT, 16) == 16  # 4 bits, and 4 bytes of each column for 8 tokens
    assert stored_bytes(FORMAT, 16, 20) == 2 * FORMAT.block_bytes(16) + 8 * 32
    with pytest.raises(MpqError, match="blocks of tokens"):
        quantize_heads(values, FORMAT)


def test_stored_vectors_grow_crop_and_are_read_alike() -> None:
    values = vectors(37)
    store = StoredVectors(FORMAT, values)
    for part in values.split([5, 1, 1, 1, 20, 9], 2):
        store.append(part)
    assert store.tokens == 37
    assert torch.equal(store.read(), round_vectors(values, FORMAT))
    assert store.newest.shape[2] == 5
    before = store.read()
    for tokens in (36, 34, 21, 16, 3):
        store.crop(tokens)
        assert store.tokens == tokens
        assert torch.equal(store.read(), before[:, :, :tokens])
    store.append(values[:, :, 3:])
    assert store.tokens == 37


def formats_of(model: nn.Module) -> CacheFormats:
    return CacheFormats(find_cached(model, TOKENS[:1], next_token_loss), (NAME, "int8-token", NAME, "int4-asym"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_generates_with_them(name: str) -> None:
    model = model_of(name)
    formats = formats_of(model)
    with changing(model, CacheRounding(formats)):
        expected = model(TOKENS).logits
    serve_cache(model, formats)
    output = model(TOKENS)
    assert torch.equal(output.logits, expected)
    cache = output.cache
    assert isinstance(cache, PackedCache)
    assert all(isinstance(layer, StoredLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 12
    assert cache.nbytes <= formats.nbytes(12, 2) * 2  # the newest are float32 here
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(TOKENS, **settings)
    assert torch.equal(greedy, model.generate(TOKENS, num_beams=1, **settings))
    assert model.generate(TOKENS, num_beams=3, **settings).shape == greedy.shape
    step_by_step = model(greedy[:, :13], cache=None).cache
    for token in range(13, 20):
        logits = model(greedy[:, token : token + 1], cache=step_by_step).logits
    assert torch.equal(logits[:, -1].argmax(-1), greedy[:, 20])


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-lm", "llama"])
def test_both_loops_generate_alike_from_token_blocks(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    layers = find_layers(model)
    allocation = Allocation(layers, ("int8-channel",) * len(layers), cache=formats_of(model))
    export(model, allocation, tmp_path / "out", inputs=TOKENS)
    loaded = load(tmp_path / "out", model=model_of(name) if name == "tiny-lm" else None)
    expected = float(next_token_loss(simulate(model, allocation, trainable=False), TOKENS))
    assert float(next_token_loss(loaded, TOKENS)) == pytest.approx(expected, rel=1e-4)
    tokens = generate(loaded, TOKENS[0], max_new_tokens=9).tokens
    if name == "llama":
        made = loaded.generate(TOKENS[:1], max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert tokens == tuple(made[0, 12:].tolist())


def test_texts_too_short_for_a_block_give_no_score() -> None:
    for name, known in (("llama", (True, False)), ("mistral", (False, False))):
        model = model_of(name)
        found = profile(
            model,
            [TOKENS],
            next_token_loss,
            ["int8-channel"],
            metric="fisher",
            progress=False,
            cache=(NAME, "int4-t64", "int4"),
        )
        rows = found.scores[-4:, -3:]
        assert np.isfinite(rows[:, 0]).all() == known[0]
        assert np.isfinite(rows[:, 1]).all() == known[1]
        assert np.isfinite(rows[:, 2]).all()
        assert mpq.frontier(found, cost="cache", context=100).allocation(0).cache is not None
