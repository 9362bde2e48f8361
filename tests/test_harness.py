"""Tasks of lm-evaluation-harness on quantized folders; the harness runs if it is installed."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mpq
from mpq.cli.main import main
from mpq.core.allocation import Allocation
from mpq.network.layers import find_layers
from tests.sensitivity.small_models import seed_weights

WORDS = ["<unk>", "<eos>", "sky", "grass", "is", "blue", "green", "red", "the"]
TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "the {{{{thing}}}} is"
doc_to_target: "{{{{label}}}}"
doc_to_choice: ["blue", "green", "red"]
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.save_pretrained(root / "tokenizer")
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=1,
    )  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.3).eval()
    layers = find_layers(model)
    files = [path for path in (root / "tokenizer").iterdir() if path.is_file()]
    mpq.export(model, Allocation(layers, ("int8-g32",) * len(layers)), root / "out", side_files=files)
    (root / "data.jsonl").write_text(
        "".join(json.dumps({"thing": thing, "label": label}) + "\n" for thing, label in (("sky", 0), ("grass", 1)) * 2)
    )
    (root / "colours.yaml").write_text(TASK.format(file=root / "data.jsonl"))
    return root


def accuracy(folder):
    """Accuracy of the model's answers by its logits."""
    model = mpq.load(folder / "out")
    right = []
    for thing, label in (("sky", 5), ("grass", 6)):
        with torch.no_grad():
            logits = model(torch.tensor([[WORDS.index(word) for word in ("the", thing, "is")]])).logits[0, -1]
        right.append(max((5, 6, 7), key=lambda word: logits[word]) == label)
    return sum(right) / len(right)


def test_a_custom_task_scores_the_models_answers(folder, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mpq[tasks]'")
    assert main(["eval", str(folder / "out"), "--tasks", str(folder / "colours.yaml"), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (result["task"], result["metric"], result["fewshot"]) == ("colours", "acc", 0)
    assert result["value"] == accuracy(folder)


def test_unknown_tasks_and_other_models_are_reported(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mpq[tasks]'")
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("dataset_path: json\n")
    assert main(["eval", str(folder / "out"), "--tasks", str(nameless)]) == 2
    assert "does not name its task" in capsys.readouterr().err
    assert main(["eval", str(folder / "out"), "--tasks", f"{folder / 'colours.yaml'},colour"]) == 2
    assert "no task 'colour'" in capsys.readouterr().err


def test_a_missing_harness_is_reported_in_a_sentence(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(folder / "out"), "--tasks", "hellaswag"]) == 2
    assert "pip install 'mpq[tasks]'" in capsys.readouterr().err
