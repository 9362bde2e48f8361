import pytest
import torch

from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.kernels.modules import PackedEmbedding, PackedLinear
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from tests.mixes import mixed_allocation
from tests.sensitivity.small_models import seed_weights

pytest.importorskip("transformers")
pytest.importorskip("mpq.integrations.transformers")
TOKENS = torch.randint(0, 64, (2, 12), generator=seeded(5))


def uniform_layers(model):
    layers = find_layers(model)
    schemes = ("int4-g32", "nvfp4", "int3-g64-asym", "fp8-e4m3+a:fp8-e4m3", "bf16")
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


@pytest.mark.parametrize("allocate", [uniform_layers, mixed_allocation])
@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_runs_on_packed_weights_and_saves_again(tied, allocate, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.1).eval()
    allocation = allocate(model)
    folder = export(model, allocation, tmp_path / "out")
    served = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(served.model.embed_tokens, PackedEmbedding)
    assert isinstance(served.lm_head, PackedLinear)
    expected = simulate(model, allocation, trainable=False)(TOKENS).logits
    torch.testing.assert_close(served(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    served.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(TOKENS).logits, served(TOKENS).logits)
