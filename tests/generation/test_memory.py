"""The decoder loop's packed cache: formats' bytes in slabs, read by the kernels, compared with a cache of floats."""

import pytest
import torch

from mpq.core.cache import CACHE_FORMATS, cache_name, parse_cache_format
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.layer import KEYS, VALUES, Layer
from mpq.generation.architectures import decoder_of
from mpq.generation.compiled_step import compiled_step
from mpq.generation.decoder import step
from mpq.generation.generate import generate
from mpq.generation.memory import Memory, can_pack
from mpq.generation.serving import cache_formats_of, serve_cache, serve_format
from mpq.kernels.cpu import attention as kernels
from mpq.kernels.cpu import native as cpu
from mpq.network.cached import entry_name
from tests.generation.test_compiled_step import TOKENS, llama, tiny
from tests.generation.test_decoder import llama as plain_llama

compiled = pytest.mark.skipif(cpu.native() is None, reason="the kernels are not compiled here")
CASES = [
    ("int8-token", "int4-g32-asym"),
    ("int4-asym", "fp16"),
    ("fp8-e4m3", "int8-asym"),
    ("mxfp4", "nvfp4"),
    ("int3-t64-asym", "int4-asym"),
    ("int4-t64", "int2-t64-asym"),
]


def formats_of(decoder, *names, count=None):
    """Formats of all keys and values, or of the first blocks'."""
    blocks = range(len(decoder.blocks) if count is None else count)
    entries = tuple(
        Layer(entry_name(index, kind), kind, 2, decoder.head_width) for index in blocks for kind in (KEYS, VALUES)
    )
    return CacheFormats(entries, names * (len(entries) // 2))


def run(model, formats, packed, take=None, sizes=(5, 1, 1, 40, 1, 60, 1, 1)):
    """Logits after each piece of the tokens."""
    decoder, memory, end, found = decoder_of(model), Memory(formats=formats, packed=packed), 0, []
    with torch.inference_mode():
        for size in sizes:
            end += size
            tokens = TOKENS[:, end - size : end]
            logits = take(tokens, memory) if take and size == 1 else None
            assert not take or (logits is None) == (size > 1)
            found.append(step(decoder, tokens, memory) if logits is None else logits)
    assert memory.length == end
    return torch.stack(found), memory


def near(found, expected):
    """Equal up to keys and values that 15-bit queries or probabilities round to the neighbouring code."""
    difference = (found.float() - expected.float()).abs()
    assert difference.mean() < 0.01 * expected.float().std()
    assert difference.max() < 0.3 * expected.float().std()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", CASES)
def test_packed_caches_match_rounded_floats(names, dtype):
    model = plain_llama().to(dtype)
    formats = formats_of(decoder_of(model), *names)
    expected, floats = run(model, formats, packed=False)
    found, memory = run(model, formats, packed=True)
    if dtype == torch.float32:
        near(found, expected)
    else:  # rounded at other places, in every layer
        assert (found - expected).abs().mean() < 0.1 * expected.float().std()
    plain, _ = run(model, None, packed=False)
    assert (expected - plain).abs().max() > 1e-3
    assert memory.nbytes * floats.capacity < floats.nbytes * memory.capacity


@compiled
def test_windows():
    model = plain_llama("Mistral", sliding_window=32)
    formats = formats_of(decoder_of(model), "int8-token", "int8-token")
    near(run(model, formats, packed=True)[0], run(model, formats, packed=False)[0])


@compiled
@pytest.mark.parametrize("names", CASES)
@pytest.mark.parametrize("model", [tiny, llama, lambda: llama(head_dim=20)])
def test_the_compiled_step_reads_and_writes_packed_caches(model, names):
    model = model()
    formats = formats_of(decoder_of(model), *names)
    take = compiled_step(decoder_of(model))
    expected, _ = run(model, formats, packed=True)
    if "mxfp4" in names:  # unsupported by the library
        assert take(TOKENS[:, :1], run(model, formats, packed=True)[1]) is None
        return
    near(run(model, formats, packed=True, take=take)[0], expected)


@compiled
def test_blocks_without_formats_stay_in_the_models_dtype():
    model = tiny()
    formats = formats_of(decoder_of(model), "int2-asym", "int2-asym", count=1)
    take = compiled_step(decoder_of(model))
    found, memory = run(model, formats, packed=True, take=take)
    near(found, run(model, formats, packed=True)[0])
    assert memory.keys[0][0].nbytes * 10 < memory.keys[1][0].nbytes


@compiled
def test_growing_does_not_copy():
    model = plain_llama()
    formats = formats_of(decoder_of(model), "int8-token", "int4-token")
    places = [[slab.data_ptr() for slab in run(model, formats, packed=True, sizes=sizes)[1].keys[0]]
              for sizes in ((5, 1), (5, 1, 140))]  # fmt: skip
    assert [len(one) for one in places] == [1, 2]
    memory = Memory(formats=formats, packed=True)
    with torch.inference_mode():
        step(decoder_of(model), TOKENS[:, :5], memory)
        before = memory.keys[0][0]
        step(decoder_of(model), TOKENS[:, 5:], memory)
    assert memory.keys[0][0] is before
    assert memory.capacity == 64 * sum(slab.shape[1] for slab in memory.keys[0])


@compiled
@pytest.mark.parametrize("name", ["nf4", "int4-g20", "int4-t32"])
def test_formats_without_a_kernel_are_kept_as_rounded_floats(name):
    decoder = decoder_of(plain_llama(head_dim=40))
    assert not can_pack(formats_of(decoder, name, "int8-token"), 40, torch.device("cpu"))
    assert can_pack(formats_of(decoder, "int8-token", "fp16"), 40, torch.device("cpu"))
    assert can_pack(None, 40, torch.device("cpu"))
    assert not can_pack(formats_of(decoder, "int8-token", "fp16"), 40, torch.device("cuda"))


@compiled
def test_generation_uses_the_compiled_step_with_a_packed_cache():
    texts, calls = [], []
    for hook in (False, True):
        model = tiny()
        if hook:  # so that the library does not compute it
            model.head.register_forward_hook(lambda *_: None)
        serve_cache(model, formats_of(decoder_of(model), "int8-asym", "int8-token"))
        model.embed.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
        texts.append(generate(model, TOKENS[0, :9], max_new_tokens=20).tokens)
    assert texts[0] == texts[1]
    assert calls[:20] == [9] + [1] * 19


def test_one_format_for_all_keys_and_values():
    model = tiny()
    serve_format(model, "int8-token")
    assert cache_formats_of(model).names == ("int8-token",) * 4
    with pytest.raises(MpqError, match="already has cache formats"):
        serve_format(model, "int4-token")


@pytest.mark.parametrize("width", [32, 64, 128])
def test_all_default_candidates_are_read_and_rounded_by_the_library(width: int) -> None:
    for name in CACHE_FORMATS:
        assert kernels.rounds(kernels.vectors_of(cache_name(parse_cache_format(name)), width)), name
