import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.models import BUNDLED, bundled
from mpq.sources import open_network, open_source, skeleton
from mpq.sources.networks import encoder_of

STORIES = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "stories260K"
FACTORY = "tests.sources.some_models:classifier"


@pytest.mark.parametrize("name", [*BUNDLED, FACTORY])
def test_a_recipe_is_json_and_builds_the_same_modules(name):
    network = open_network(name)
    model = skeleton(json.loads(json.dumps(network.recipe)))
    assert not model.training
    model.load_state_dict(network.model.state_dict())
    shapes = {key: tensor.shape for key, tensor in network.model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


def test_bundled_sources_are_the_bundled_task():
    source, task = open_source("tiny-lm", nsamples=3, seqlen=32), bundled("tiny-lm", nsamples=3, seqlen=32)
    assert torch.equal(source.calibration[0], task.calibration[0])
    assert sum(map(len, source.evaluation)) == 32
    assert source.kind == "perplexity"
    assert source.data == "novels"
    with torch.no_grad():
        torch.testing.assert_close(source.model(task.calibration[0]), task.model(task.calibration[0]))


@pytest.mark.skipif(not STORIES.exists(), reason="the folder of reference models is not there")
def test_a_hugging_face_folder(tmp_path):
    source = open_source(str(STORIES), nsamples=2, seqlen=64, evaluation_samples=2)
    assert source.calibration[0].shape == (2, 64)
    assert source.calibration[0].max() < 512
    loss = source.loss_fn(source.model, source.calibration[0])
    assert 0 < loss.item() < 12
    model = skeleton(json.loads(json.dumps(source.recipe)))
    model.load_state_dict(source.model.state_dict())
    with torch.no_grad():
        ours, theirs = (m(source.calibration[0]).logits for m in (model, source.model))
    assert torch.equal(ours, theirs)
    with pytest.raises(MpqError, match=r"seqlen 4096 is more than .* at most 512"):
        open_source(str(STORIES), seqlen=4096)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((STORIES / name).read_bytes())
    with pytest.raises(MpqError, match="has no tokenizer for text"):
        open_source(str(bare))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((STORIES / "config.json").read_text())
    with pytest.raises(MpqError, match="cannot be loaded"):
        open_source(str(broken))


def test_an_unknown_architecture_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForNothing"]}')
    with pytest.raises(MpqError, match="is a BertForNothing: transformers has no such class"):
        open_network(str(tmp_path))


def test_an_image_classifier_folder(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ConvNextImageProcessor",'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}'
    )
    network = open_network(str(tmp_path))
    assert network.kind == "accuracy"
    assert network.std == (0.2, 0.2, 0.2)
    model = skeleton(json.loads(json.dumps(network.recipe)))
    model.load_state_dict(network.model.state_dict())


def test_unknown_names_are_reported_with_the_nearest(tmp_path):
    with pytest.raises(MpqError, match="unknown model 'tiny-ml': did you mean tiny-lm"):
        open_network("tiny-ml")
    with pytest.raises(MpqError, match=r"no config\.json"):
        open_network(str(tmp_path))
    with pytest.raises(MpqError, match="did you mean classifier"):
        open_network("tests.sources.some_models:clasifier")
    with pytest.raises(MpqError, match="cannot be imported"):
        open_network("tests.sources.no_models:classifier")
    with pytest.raises(MpqError, match=r"returned a str: expected a torch\.nn\.Module"):
        open_network("tests.sources.some_models:not_a_model")
    with pytest.raises(MpqError, match="expected one of an mpq checkpoint"):
        skeleton({"kind": "mystery"})


def test_factories_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_model.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_network("my_own_model:make").model, nn.Linear)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_missing_extra_says_how_to_install_it():
    with pytest.raises(MpqError, match=r"pip install 'mpq\[timm\]'"):
        open_network("timm:resnet18")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_recipes():
    model = skeleton({"kind": "timm", "name": "resnet10t"})
    assert sum(parameter.numel() for parameter in model.parameters()) > 5e6
    with pytest.raises(MpqError, match=r"timm has no model 'resnet10u'.*resnet10t"):
        open_network("timm:resnet10u")


def test_long_texts_are_tokenized_in_pieces_of_whole_lines(monkeypatch):
    seen = []

    def tokenizer(text, **options):
        seen.append(text)
        return {"input_ids": [ord(character) for character in text]}

    monkeypatch.setattr("mpq.sources.networks.CHARACTERS", 10)
    text = "one two\nthree\n\nfour and five and six\n"
    assert encoder_of(tokenizer)(text) == [ord(character) for character in text]
    assert seen[0] == "one two\n"
    assert max(map(len, seen)) <= 10
    assert encoder_of(tokenizer)("") == []
