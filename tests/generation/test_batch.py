"""Several prompts at once give the same texts as each alone."""

import pytest
import torch

from mpq.core.errors import MpqError
from mpq.generation.architectures import decoder_of
from mpq.generation.batch import generate_batch
from mpq.generation.decoder import step, step_each
from mpq.generation.generate import generate
from mpq.generation.memory import Memory
from mpq.generation.serving import serve_cache
from tests.generation.test_compiled_step import TOKENS, tiny
from tests.generation.test_decoder import gemma
from tests.generation.test_decoder import llama as plain_llama
from tests.generation.test_memory import formats_of, near

MODELS = {
    "llama": plain_llama,
    "window": lambda: plain_llama("Mistral", sliding_window=32),
    "Gemma 3, windows": lambda: gemma(sliding_window=16),
    "packed": tiny,
}
LENGTHS = (3, 70, 20, 61)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("formats", [None, ("int8-token", "int4-g32-asym"), ("int4-t64-asym", "int8-token")])
def test_batched_steps_equal_single_steps(name, packed, formats):
    model = MODELS[name]()
    decoder = decoder_of(model)
    given = None if formats is None else formats_of(decoder, *formats)
    pairs = [[Memory(formats=given, packed=packed) for _ in LENGTHS] for _ in range(2)]
    with torch.inference_mode():
        for memories in pairs:
            for length, memory in zip(LENGTHS, memories, strict=True):
                step(decoder, TOKENS[:, :length], memory)
        for end in (80, 81, 82):
            tokens = TOKENS[0, end].repeat(len(LENGTHS))
            found = step_each(decoder, tokens, pairs[0])
            expected = torch.stack([step(decoder, tokens[:1, None], memory) for memory in pairs[1]])
            near(found, expected)
    assert [memory.length for memory in pairs[0]] == [length + 3 for length in LENGTHS]


@pytest.mark.parametrize("formats", [None, ("int8-asym", "int8-token")])
def test_batched_texts_equal_single_texts(formats):
    model = tiny()
    if formats:
        serve_cache(model, formats_of(decoder_of(model), *formats))
    prompts = [TOKENS[0, :length] for length in LENGTHS]
    alone = [generate(model, prompt, max_new_tokens=12).tokens for prompt in prompts]
    assert [one.tokens for one in generate_batch(model, prompts, max_new_tokens=12)] == alone
    stop = alone[1][4]
    stopped = [one.tokens for one in generate_batch(model, prompts, max_new_tokens=12, stop=[stop])]
    for text, whole in zip(stopped, alone, strict=True):
        assert text == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert [one.tokens for one in generate_batch(model, prompts, max_new_tokens=0)] == [()] * 4


def test_each_sequence_samples_from_its_own_generator():
    model, prompts = tiny(), [TOKENS[0, :5]] * 3
    texts = [[one.tokens for one in generate_batch(model, prompts[:count], temperature=2.0, max_new_tokens=8)]
             for count in (2, 3)]  # fmt: skip
    assert texts[0] == texts[1][:2]
    assert texts[0][0] != texts[0][1]


def test_invalid_arguments_are_refused_by_name():
    with pytest.raises(MpqError, match="at least one token"):
        generate_batch(tiny(), [TOKENS[0, :0]])
    with pytest.raises(MpqError, match="at least one"):
        generate_batch(tiny(), [])
    with pytest.raises(MpqError, match="Linear cannot generate for several"):
        generate_batch(torch.nn.Linear(2, 2), [TOKENS[0, :3]])
