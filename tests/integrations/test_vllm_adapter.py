"""vLLM's own layers and loader on our checkpoint, if vLLM is installed (tested with 0.33)."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mpq.core.allocation import Allocation
from mpq.exporters import export
from mpq.integrations.vllm import register
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from tests.sensitivity.small_models import seed_weights

pytest.importorskip("vllm.model_executor")
SIZES = {"hidden": 64, "inner": 128, "vocabulary": 70}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    import vllm.platforms
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    register()
    register()  # vLLM may load a plugin several times
    store = f"file://{tmp_path_factory.mktemp('store')}/ranks"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, store, 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZES["hidden"]))


def block(quant, prefix):
    """The layers of a Llama block, with vLLM's names, without attention itself."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    hidden, inner = SIZES["hidden"], SIZES["inner"]
    given = {"bias": False, "quant_config": quant}
    module, module.self_attn, module.mlp = nn.Module(), nn.Module(), nn.Module()
    module.self_attn.qkv_proj = QKVParallelLinear(hidden, 16, 4, 2, prefix=f"{prefix}.self_attn.qkv_proj", **given)
    module.self_attn.o_proj = RowParallelLinear(hidden, hidden, prefix=f"{prefix}.self_attn.o_proj", **given)
    module.mlp.gate_up_proj = MergedColumnParallelLinear(
        hidden, [inner] * 2, prefix=f"{prefix}.mlp.gate_up_proj", **given
    )
    module.mlp.down_proj = RowParallelLinear(inner, hidden, prefix=f"{prefix}.mlp.down_proj", **given)
    module.input_layernorm, module.post_attention_layernorm = Norm(), Norm()
    return module


def network(quant, tied):
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    vocabulary, hidden = SIZES["vocabulary"], SIZES["hidden"]
    module, module.model = nn.Module(), nn.Module()
    module.quant_config = quant
    module.model.embed_tokens = VocabParallelEmbedding(vocabulary, hidden, quant_config=quant)  # as vLLM's Llama does
    module.model.layers = nn.ModuleList([block(quant, "model.layers.0")])
    module.model.norm = Norm()
    module.lm_head = ParallelLMHead(vocabulary, hidden, quant_config=quant, prefix="lm_head")
    if tied:
        module.lm_head = module.lm_head.tie_weights(module.model.embed_tokens)
    return module


@pytest.mark.parametrize("tied", [False, True])
def test_vllms_loader_and_layers_compute_what_was_simulated(tied, tmp_path):
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM as Original
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.utils import AutoWeightsLoader

    config = LlamaConfig(
        hidden_size=SIZES["hidden"], intermediate_size=SIZES["inner"], num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=SIZES["vocabulary"], tie_word_embeddings=tied,
    )  # fmt: skip
    model = seed_weights(Original(config), 0.1).eval()
    layers = find_layers(model)
    schemes = ("int4-g32", "nvfp4", "int3-g64-asym", "fp8-e4m3", "bf16")
    allocation = Allocation(layers, tuple(schemes[i % 5] for i in range(len(layers))))
    folder = export(model, allocation, tmp_path / "out")
    truth = simulate(model, allocation, trainable=False)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    quant = pickle.loads(pickle.dumps(get_quantization_config("mpq").from_config(said)))  # as sent to a worker
    quant.maybe_update_config(str(folder))
    quant.apply_vllm_mapper(LlamaForCausalLM.hf_to_vllm_mapper.get_rename_mapper())
    quant.packed_modules_mapping.update(LlamaForCausalLM.packed_modules_mapping)
    served = network(quant, tied)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    AutoWeightsLoader(served).load_weights(iter(tensors), mapper=LlamaForCausalLM.hf_to_vllm_mapper)
    for _, module in served.named_modules():
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading"):
            module.quant_method.process_weights_after_loading(module)
    ours, theirs = served.model.layers[0], truth.model.layers[0]
    short, long = torch.randn(3, 64, generator=seeded(1)), torch.randn(3, 128, generator=seeded(2))
    attention, mlp = theirs.self_attn, theirs.mlp
    qkv = torch.cat([attention.q_proj(short), attention.k_proj(short), attention.v_proj(short)], -1)
    pairs = [
        (ours.self_attn.qkv_proj(short)[0], qkv),
        (ours.self_attn.o_proj(short)[0], attention.o_proj(short)),
        (ours.mlp.gate_up_proj(short)[0], torch.cat([mlp.gate_proj(short), mlp.up_proj(short)], -1)),
        (ours.mlp.down_proj(long)[0], mlp.down_proj(long)),
        (served.model.embed_tokens(torch.arange(70)), truth.model.embed_tokens(torch.arange(70))),
        (served.lm_head.quant_method.apply(served.lm_head, short)[:, :70], truth.lm_head(short)),
    ]
    for found, expected in pairs:  # compiled kernels give activations about 15 bits of the largest
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
