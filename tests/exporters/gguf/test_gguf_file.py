import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.exporters import export
from mpq.exporters.gguf import file as gguf_file
from mpq.exporters.gguf.blocks import encode_blocks, type_of
from mpq.exporters.gguf.reader import read_tensors
from mpq.exporters.rules import GGUF_TYPES
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from mpq.rounding.clip_search import clip_search
from mpq.rounding.reference import dequantize, quantize
from tests.sensitivity.small_models import seed_weights

gguf = pytest.importorskip("gguf")
CODED = sorted(name for name in GGUF_TYPES if not parse_format(name).is_float_copy)
DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
TOKENS = torch.randint(0, 64, (1, 12), generator=seeded(5))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(CODED), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["random", "zero", "constant"]))
def test_gguf_pys_dequantizer_matches_ours(name, rows, blocks, content):
    weight = torch.randn(rows, 256 * blocks, generator=seeded(0, rows, blocks))
    weight = {"random": weight, "zero": weight * 0, "constant": weight * 0 + 0.37}[content]
    quantized = quantize(weight, parse_format(name))
    raw, (_, kind) = encode_blocks(quantized, gguf), type_of(quantized.format, gguf)
    assert raw.nbytes == quantized.format.nbytes(*quantized.shape)
    theirs = gguf.quants.dequantize(raw, kind)
    np.testing.assert_array_equal(theirs, dequantize(quantized).numpy())


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "int4-g32", "int5-g32", "int8-g32"])
def test_our_rounding_error_is_at_most_gguf_pys(name):
    weight = torch.randn(64, 512, generator=seeded(3))
    kind = type_of(parse_format(name), gguf)[1]
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind))
    ours = dequantize(clip_search(weight, parse_format(name)))
    assert (ours - weight).square().sum() < 0.95 * (theirs - weight).square().sum()


def llama(tied=False, hidden=64, **changes):
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=tied, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return seed_weights(LlamaForCausalLM(config), 0.1).eval()


def allocate(model, schemes, **patterns):
    layers = find_layers(model, **patterns)
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


def served(model, folder):
    """A model like this one with the file's weights, in transformers' order of rows."""
    copy, config = llama(**model.asked), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    numbers = dict(read_tensors(folder))
    state = copy.state_dict()
    for name in state:
        stem, _, ending = name.rpartition(".")
        if config.tie_word_embeddings and stem == "lm_head":
            assert "output.weight" not in numbers
            continue
        values = numbers.pop(f"{names.get_name(stem)}.{ending}")
        if stem.endswith(("q_proj", "k_proj")):  # from interleaved to half-split rotary order
            heads = 4 if stem.endswith("q_proj") else 2
            values = values.reshape(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
        state[name].copy_(values)
    assert not numbers
    return copy


ASKED = {
    "plain": ({}, ("int4-g32", "int8-g32", "int5-g32", "q4_1", "bf16", "iq4_nl", "fp32")),
    "tied": ({"tied": True}, ("q5_1", "int8-g32", "mxfp4", "fp4-e2m1-g16-se4m3")),
    "biases": ({"attention_bias": True, "mlp_bias": True}, ("int8-g32", "q4_1")),
    "super-blocks": ({"hidden": 256}, ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")),
    "tied super-blocks": ({"hidden": 256, "tied": True}, ("q6_k", "q3_k")),
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", ASKED)
def test_the_file_read_back_computes_our_logits(case, split, tmp_path):
    asked, schemes = ASKED[case]
    model = llama(**asked)
    model.asked = asked
    exclude = "*.down_proj" if "super" in case else "*.0.self_attn.[qk]_proj"  # rows of 128; unquantized layers
    allocation = allocate(model, schemes, exclude=exclude)
    folder = export(model, allocation, tmp_path / "out", to="gguf", shard=30_000 if split else 10**9)
    assert (len(list(folder.glob("model-*-of-*.gguf"))) > 2) == split
    simulated = simulate(model, allocation, trainable=False)
    torch.testing.assert_close(served(model, folder)(TOKENS).logits, simulated(TOKENS).logits)


def test_a_split_file_records_its_shards(tmp_path):
    model = llama()
    folder = export(model, allocate(model, ("int8-g32",)), tmp_path / "out", to="gguf", shard=50_000)
    files = sorted(folder.glob("*.gguf"))
    readers = [gguf.GGUFReader(file) for file in files]
    total = sum(len(reader.tensors) for reader in readers)
    for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
        assert file.name == f"model-{number + 1:05}-of-{len(files):05}.gguf"
        split = {key: int(reader.get_field(f"split.{key}").contents()) for key in ("no", "count", "tensors.count")}
        assert split == {"no": number, "count": len(files), "tensors.count": total}
        assert sum(tensor.n_bytes for tensor in reader.tensors) <= 50_000 or len(reader.tensors) == 1
    assert readers[0].get_field("llama.block_count") is not None
    assert readers[1].get_field("llama.block_count") is None


def test_only_one_rounded_layer_is_held_at_a_time(tmp_path, monkeypatch):
    model = llama()
    alive, most = set(), 0

    def counted(quantized, rows_gguf):
        nonlocal most
        content = encode_blocks(quantized, rows_gguf)
        key = id(content)
        alive.add(key)
        weakref.finalize(content, alive.discard, key)
        most = max(most, len(alive))
        return content

    monkeypatch.setattr(gguf_file, "encode_blocks", counted)
    export(model, allocate(model, ("int8-g32",)), tmp_path / "out", to="gguf")
    assert most <= 2  # the layer just rounded, and the one just written


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.99])
def test_a_truncated_file_is_refused_with_its_tensor(kept, tmp_path):
    model = llama()
    folder = export(model, allocate(model, ("int8-g32",)), tmp_path / "out", to="gguf")
    file = folder / "model.gguf"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(MpqError, match=r"model.gguf is cut or damaged at its tensor [a-z0-9_.]+"):
        dict(read_tensors(folder))
    file.write_bytes(content[:100])
    with pytest.raises(MpqError, match=r"model.gguf is cut or damaged at its header"):
        dict(read_tensors(folder))
    file.unlink()
    with pytest.raises(MpqError, match=r"model.gguf is missing"):
        dict(read_tensors(folder))


def test_an_altered_tensor_is_refused_by_name(tmp_path):
    model = llama()
    folder = export(model, allocate(model, ("int8-g32",)), tmp_path / "out", to="gguf")
    file = folder / "model.gguf"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MpqError, match=r"model.gguf: the tensor [a-z0-9_.]+ is not what was exported"):
        dict(read_tensors(folder))
    with pytest.raises(MpqError, match="cannot read"):
        dict(read_tensors(tmp_path))


def test_formats_without_a_tensor_type_are_refused(tmp_path):
    model = llama()
    layers = find_layers(model, include="*.gate_proj")
    with pytest.raises(MpqError, match=r"gguf does not support layer .*gate_proj in int3-g32 \(.*\): .* is int4-g32"):
        export(model, Allocation(layers, ("int3-g32",) * 2), tmp_path / "out", to="gguf")
    with pytest.raises(MpqError, match=r"gate_proj in q5_k \(its rows of 64 .* blocks of 256\): .* is q5_1"):
        export(model, Allocation(layers, ("q5_k",) * 2), tmp_path / "out", to="gguf")
    with pytest.raises(MpqError, match=r"supports transformers' llama, mistral, .* models, not Linear"):
        export(torch.nn.Linear(2, 2), Allocation((), ()), tmp_path / "out", to="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "kind"), [("wikitext2_llama_5m", "gpt2"), ("stories260K", "llama")])
def test_the_tokenizer_is_in_the_file(name, kind, tmp_path):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data folder has no {name}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    export(model, allocate(model, ("fp32",)), tmp_path / "out", to="gguf", tokenizer=tokenizer)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {key: reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("model", "tokens", "bos_token_id")}
    assert fields["model"] == kind
    assert fields["tokens"] == tokenizer.convert_ids_to_tokens(list(range(model.config.vocab_size)))
    assert fields["bos_token_id"] == tokenizer.bos_token_id
