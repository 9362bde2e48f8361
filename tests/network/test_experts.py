"""Stacked experts of transformers' classes, split into layers: equal outputs, quantized, packed and loaded."""

import copy

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen2MoeConfig

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.exporters.holding import check_model
from mpq.exporters.mpq import checkpoint
from mpq.exporters.targets import TARGETS
from mpq.network.calibration import next_token_loss, seeded
from mpq.network.experts import has_experts, unstack
from mpq.network.layers import find_layers
from mpq.network.moments import second_moments
from mpq.network.ranges import input_ranges
from mpq.quantized import simulate
from mpq.search import frontier_of
from mpq.sensitivity.profile import profile

SMALL = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "qwen": lambda: Qwen2MoeConfig(
        **SMALL, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
}  # fmt: skip


def moe(name: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=seeded(0, key)))
    return model


TOKENS = tuple(torch.randint(0, 24, (3, 7), generator=seeded(1, index)) for index in range(2))


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_stay_and_memory_is_shared(name):
    stacked = moe(name)
    apart = unstack(copy.deepcopy(stacked))
    for tokens in TOKENS:
        # The products are the same, in another order of summation for a fused kernel.
        torch.testing.assert_close(apart(tokens).logits, stacked(tokens).logits, rtol=1e-4, atol=1e-5)
    kept = stacked.model.layers[0].mlp.experts.down_proj
    unstack(stacked)
    expert = stacked.model.layers[0].mlp.experts[2]
    assert expert.down_proj.weight.data_ptr() == kept[2].data_ptr()
    weight = expert.up_proj.weight
    (slope,) = torch.autograd.grad(next_token_loss(stacked, TOKENS[0]), weight)
    direction = torch.randn(weight.shape, generator=seeded(2))

    def loss(step):
        name = "model.layers.0.mlp.experts.2.up_proj.weight"
        with torch.no_grad():
            out = functional_call(stacked, {name: weight + step * direction}, (TOKENS[0],)).logits
        return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), TOKENS[0][:, 1:].flatten()).item()

    assert (loss(1e-2) - loss(-1e-2)) / 2e-2 == pytest.approx((slope * direction).sum().item(), rel=0.05, abs=2e-4)


def test_unsupported_stacks_are_reported(caplog):
    find_layers(moe("mixtral"))
    assert "model.layers.0.mlp.experts" in caplog.text


def test_all_experts_of_a_block_share_a_scheme_by_default():
    layers = {layer.name: layer for layer in find_layers(unstack(moe("mixtral")))}
    experts = [f"model.layers.0.mlp.experts.{index}" for index in range(4)]
    ties = {layers[f"{expert}.{leaf}"].tie for expert in experts for leaf in ("gate_proj", "up_proj")}
    assert ties == {"model.layers.0.mlp.experts.gate_up"}
    assert {layers[f"{expert}.down_proj"].tie for expert in experts} == {"model.layers.0.mlp.experts.down"}


def test_experts_are_profiled_allocated_simulated_packed_and_loaded(tmp_path):
    model = unstack(moe("mixtral"))
    tables = [
        profile(model, TOKENS, next_token_loss, ("int3-channel", "int8-channel"), metric=metric, progress=False)
        for metric in ("kronecker", "hessian", "loss")
    ]
    experts = [i for i, layer in enumerate(tables[0].layers) if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 3
    for table in tables[:2]:
        assert (table.scores[experts, 0] > table.scores[experts, 1]).mean() > 0.9  # an expert of no token costs nothing
    assert sum(layer.macs > 0 for layer in tables[0].layers) > 12
    frontier = frontier_of(tables[0])
    allocation = frontier.at(bits=5)
    simulated = simulate(model, allocation, trainable=False)
    export(model, allocation, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert has_experts(loaded)
    for tokens in TOKENS:
        torch.testing.assert_close(loaded(tokens).logits, simulated(tokens).logits, rtol=2e-3, atol=2e-3)


def test_unsupported_experts_are_refused(caplog):
    config = GptOssConfig(**{**SMALL, "num_hidden_layers": 1}, num_local_experts=2)
    assert not has_experts(unstack(AutoModelForCausalLM.from_config(config)))
    assert "GptOssExperts are stacked in an unknown layout" in caplog.text
    with pytest.raises(MpqError, match="gptq does not support experts"):
        check_model(TARGETS["gptq"], unstack(moe("mixtral")))
    check_model(TARGETS["mpq"], unstack(moe("mixtral")))


@pytest.mark.parametrize("name", CONFIGS)
def test_unquantized_stacks_are_written_and_loaded_unchanged(name, tmp_path):
    model = moe(name)
    layers = find_layers(model)
    allocation = Allocation(layers, ("int8-channel",) * len(layers))
    tokens = torch.randint(0, 24, (2, 6), generator=seeded(1))
    export(model, allocation, tmp_path / "out", inputs=tokens)
    loaded = checkpoint.load(tmp_path / "out")
    assert not has_experts(loaded)
    assert torch.equal(
        loaded.get_parameter("model.layers.1.mlp.experts.down_proj"),
        model.get_parameter("model.layers.1.mlp.experts.down_proj"),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_that_is_routed_to_experts_does_not_count(name):
    model = unstack(moe(name))
    layers = find_layers(model)
    tokens = torch.randint(1, 24, (2, 5), generator=seeded(2))
    padded = {
        "input_ids": torch.nn.functional.pad(tokens, (0, 4)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(tokens), (0, 4)),
    }

    def forward(model, batch):
        return model(**batch)

    for measure in (second_moments, input_ranges):
        plain = measure(model, layers, [{"input_ids": tokens}], forward)
        with_padding = measure(model, layers, [padded], forward)
        experts = [name for name in plain if ".experts." in name]
        assert len(experts) > 6
        for layer in experts:
            torch.testing.assert_close(torch.as_tensor(with_padding[layer]), torch.as_tensor(plain[layer]))
        assert not [layer for layer in with_padding if layer not in plain]
