"""Calibration through the model's chat template."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mpq
from mpq.core.errors import MpqError
from mpq.models.conversations import chat_text, conversations, has_template
from mpq.sources import Network, open_source
from mpq.sources.data import open_data
from mpq.sources.networks import encoder_of

TEMPLATE = "{% for turn in messages %}<{{ turn.role }}> {{ turn.content }} <end>\n{% endfor %}"
VOCABULARY = {word: index for index, word in enumerate(("<unk>", "the", "a", "of", "and", "assistant", "user", "def"))}


def tokenizer_of(template):
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def network():
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer = tokenizer_of(TEMPLATE)
    model = LlamaForCausalLM(config).eval()
    return Network("chatty", model, "perplexity", {}, tokenizer, encoder_of(tokenizer), 64)


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
def test_conversations_are_of_three_kinds(use):
    found = conversations(use)
    questions = [turns[0]["content"] for turns in found]
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in found)
    assert sum(question.startswith("Continue this passage") for question in questions[:30]) == 10
    assert sum(question.startswith("Write a Python function") for question in questions[:30]) == 10
    answers = [turns[1]["content"] for turns in found if turns[0]["content"].startswith("Write a Python")]
    for answer in answers:
        compile(answer.removeprefix("```python\n").removesuffix("```"), "answer", "exec")


def test_evaluation_data_differ_from_calibration_data():
    said = [{turns[1]["content"] for turns in conversations(use)} for use in ("calibration", "evaluation")]
    assert not said[0] & said[1]


def test_models_with_a_template_are_calibrated_through_it(network):
    data = open_data(None, network, nsamples=8, seqlen=32)
    assert (data.name, data.other_name) == ("chat", "novels")
    text = chat_text(network.tokenizer, "calibration")
    assert text.startswith("<user> Continue this passage.")
    windows = torch.tensor(network.encode(text))[: 32 * 4000]
    drawn = torch.cat(data.calibration)
    every = {tuple(window.tolist()) for window in windows[: len(windows) // 32 * 32].view(-1, 32)}
    assert len(every & {tuple(window.tolist()) for window in drawn}) > 0
    plain = replace(network, tokenizer=tokenizer_of(None))
    assert not has_template(plain.tokenizer)
    assert open_data(None, plain, nsamples=8, seqlen=32).name == "novels"
    assert open_data("novels", network, nsamples=8, seqlen=32).other_name == "chat"


def test_a_template_that_fails_or_is_missing_is_reported(network):
    broken = replace(network, tokenizer=tokenizer_of("{{ raise_exception('no') }}"))
    with pytest.raises(MpqError, match="chat template fails"):
        open_data(None, broken, nsamples=8, seqlen=32)
    with pytest.raises(MpqError, match="has no chat template"):
        open_data("chat", replace(network, tokenizer=tokenizer_of(None)), nsamples=8, seqlen=32)


def test_allocation_and_report_name_the_calibration_data(network, tmp_path):
    source = open_source("chatty", nsamples=8, seqlen=32, network=network)
    options = {"formats": ["int3-g32", "int8-g32"], "metric": "proxy:size", "progress": False, "tuning_steps": 0}
    outcome = mpq.quantize(source, tmp_path / "out", bits=6, **options)
    assert outcome.allocation.provenance["dataset"] == "chat"
    assert len(outcome.allocation.provenance["calibration"]) == 64
    assert any("On text of another kind (novels) the KL divergence is" in word for word in outcome.words())
    assert "On text of another kind (novels)" in (tmp_path / "out" / "README.md").read_text()
