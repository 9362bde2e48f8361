"""Every target's predicted file size against the written file."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mpq
from mpq.core.allocation import Allocation
from mpq.exporters.shards import WHOLE
from mpq.exporters.targets import TARGETS, formats_of
from mpq.exporting import export_to, sizer_for
from mpq.network.calibration import cross_entropy, next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.sources import Source
from tests.sensitivity.small_models import seed_weights

FILES = (WHOLE, "model.gguf", "model.onnx")
TOKENS = torch.randint(0, 96, (2, 12), generator=seeded(5))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.1).eval()
    return Source("llama", model, (TOKENS,), (TOKENS,), next_token_loss, "perplexity")


@pytest.fixture(scope="module")
def classifier():
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    batch = torch.randn(4, 64, generator=seeded(1)), torch.zeros(4, dtype=torch.long)
    return Source("net", seed_weights(net, 0.1).eval(), (batch,), (batch,), cross_entropy, "accuracy")


def allocate(source, target):
    """Layers take the target's formats round-robin, tied ones alike."""
    layers = find_layers(source.model)
    names = [name for name in target.schemes or formats_of(target) if name not in ("bf16", "fp16", "fp32")]
    schemes: dict[str, str] = {}
    for index, layer in enumerate(layers):
        held = [name for name in names if not target.refusal(layer, mpq.parse_scheme(name))] or ["bf16"]
        schemes.setdefault(layer.tie or layer.name, held[index * 3 % len(held)])
    return Allocation(layers, tuple(schemes[layer.tie or layer.name] for layer in layers))


@pytest.mark.parametrize("name", list(TARGETS))
def test_the_predicted_size_is_the_files(name, llama, classifier, tmp_path):
    target = TARGETS[name]
    if any(pytest.importorskip(package) is None for package in target.packages):
        return
    source = classifier if "inputs" in target.reads else llama
    allocation = allocate(source, target)
    size = sizer_for(target, source)
    other = replace(allocation, schemes=("bf16",) * len(allocation.layers))
    assert size(other) != size(allocation)  # the same function, of one allocation after another
    folder = export_to(name, source, allocation, tmp_path / "out", "nearest")
    written = sum((folder / file).stat().st_size for file in FILES if (folder / file).is_file())
    assert written == size(allocation)


@pytest.mark.parametrize("target", ["gguf", "gptq"])
def test_a_size_budget_holds_for_the_targets_own_file(target, llama, tmp_path):
    pytest.importorskip("gguf")
    options = {"metric": "proxy:size", "effort": "fast", "progress": False, "tuning_steps": 0}
    formats = ["int4-g32", "int8-g32"]
    layers = find_layers(llama.model)
    held = [name == "gguf" or layer.kind == "linear" for name in [target] for layer in layers]
    least = Allocation(layers, tuple("int4-g32" if one else "bf16" for one in held))
    smallest = sizer_for(TARGETS[target], llama)(least)
    with pytest.raises(mpq.MpqError, match="budget"):
        mpq.quantize(llama, tmp_path / "none", size=smallest - 1, target=target, formats=formats, **options)
    outcome = mpq.quantize(llama, tmp_path / "out", size=smallest + 3000, target=target, formats=formats, **options)
    written = sum((outcome.folder / file).stat().st_size for file in FILES if (outcome.folder / file).is_file())
    assert outcome.allocation.schemes != least.schemes
    assert written <= smallest + 3000
    assert outcome.measured[-1].size == written
