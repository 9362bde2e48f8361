import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from mpq.core.allocation import Allocation
from mpq.core.calibration import seeded
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.layers import find_layers
from mpq.core.rounding import dequantize, quantize
from mpq.exporters.consumers import GGUF_TYPES
from mpq.exporters.gguf_blocks import encode_blocks
from mpq.exporters.gguf_file import export
from mpq.quantized import simulate
from tests.sensitivity.small_models import seed_weights

gguf = pytest.importorskip("gguf")
CODED = sorted(name for name in GGUF_TYPES if not parse_format(name).is_float_copy)
TOKENS = torch.randint(0, 64, (1, 12), generator=seeded(5))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(CODED), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["random", "zero", "constant"]))
def test_their_dequantizer_gives_our_numbers(name, rows, blocks, content):
    weight = torch.randn(rows, 256 * blocks, generator=seeded(0, rows, blocks))
    weight = {"random": weight, "zero": weight * 0, "constant": weight * 0 + 0.37}[content]
    quantized = quantize(weight, parse_format(name))
    raw, kind = encode_blocks(quantized, gguf)
    assert raw.nbytes == quantized.format.nbytes(*quantized.shape)
    theirs = gguf.quants.dequantize(raw, kind)
    np.testing.assert_array_equal(theirs, dequantize(quantized).numpy())


def llama(tied):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    return seed_weights(LlamaForCausalLM(config), 0.1).eval()


def allocate(model, schemes):
    layers = find_layers(model)
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


@pytest.mark.parametrize("tied", [False, True])
def test_the_file_read_back_computes_our_logits(tied, tmp_path):
    model = llama(tied)
    allocation = allocate(model, ("int4-g32", "int8-g32", "int5-g32", "bf16", "fp32"))
    folder = export(model, allocation, tmp_path / "out")
    simulated = simulate(model, allocation, trainable=False)
    reader = gguf.GGUFReader(folder / "model.gguf")
    served = llama(tied)
    state = served.state_dict()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for name in state:
        stem, _, ending = name.rpartition(".")
        if tied and stem == "lm_head":
            assert "output.weight" not in by_name
            continue
        tensor = by_name[f"{names.get_name(stem)}.{ending}"]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if stem.endswith(("q_proj", "k_proj")):  # back from neighbours to halves, as transformers' own reader does
            heads = 4 if stem.endswith("q_proj") else 2
            values = values.reshape(heads, -1, 2, 64).transpose(1, 2).reshape(values.shape)
        state[name].copy_(values)
    torch.testing.assert_close(served(TOKENS).logits, simulated(TOKENS).logits)


def test_what_has_no_tensor_type_is_refused(tmp_path):
    model = llama(False)
    layers = find_layers(model, include="*.gate_proj")
    with pytest.raises(MpqError, match=r"gguf cannot hold layer .*gate_proj in int3-g32 \(.*\): .* is int4-g32"):
        export(model, Allocation(layers, ("int3-g32",) * 2), tmp_path / "out")
    with pytest.raises(MpqError, match="knows transformers' Llama models, not Linear"):
        export(torch.nn.Linear(2, 2), Allocation((), ()), tmp_path / "out")
    assert not list(tmp_path.iterdir())
