import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.scheme import Scheme, parse_scheme
from mpq.exporters import export
from mpq.integrations.vllm import Cut, Part, ServedWeight, embedding_named, named_layers, parts_of
from mpq.kernels.layout import pack
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import simulate
from mpq.rounding.activations import fake_quantize_inputs
from mpq.rounding.mixed import mixed
from mpq.rounding.reference import dequantize, quantize
from tests.mixes import mixed_allocation, random_mix
from tests.sensitivity.small_models import seed_weights

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # compiled kernels give activations about 15 bits of the largest


def served(parts, cut, tensors, ids, digests=None):
    """A layer as vLLM fills it: every stored tensor through its parameter's loader, in any order."""
    weight = ServedWeight(parts, cut, torch.float32)
    for part, shard in reversed(list(zip(parts, ids, strict=True))):
        for name, tensor in tensors[part.name].items():
            place = dict(weight.named_parameters())[name]
            place.weight_loader(place, tensor, *([] if shard is None else [shard]))
    weight.settle("cpu", digests)
    assert not list(weight.parameters())
    return weight


def stored(scheme, rows, cols, name="a"):
    matrix = torch.randn(rows, cols, generator=seeded(0, name, rows, cols))
    if scheme == MIX:
        mix = random_mix(("int2-g32", "int4-g32"), rows, cols)
        quantized = mixed(mix, [quantize(matrix, format) for format in mix.formats])
        scheme = Scheme(mix)
    else:
        scheme = parse_scheme(scheme)
        quantized = quantize(matrix, scheme.weight)
    return Part(name, scheme, rows, cols), dict(pack(quantized).tensors), dequantize(quantized)


MIX = "a mix of rows"
NAMES = (
    MIX,
    "int4-g32",
    "int3-g64-asym",
    "int8-channel",
    "nvfp4",
    "mxfp4",
    "fp8-e4m3",
    "bf16",
    "int5-channel",
    "nf4-g32",
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_tensor_parallel_ranks_compute_their_rows(first, second, ranks, key_heads):
    """q has eight heads of 4 rows, k and v one or two: more ranks than key heads share them."""
    sizes = (32, 4 * key_heads, 4 * key_heads)
    made = [stored(*one) for one in zip((first, second, second), sizes, [70] * 3, "qkv", strict=True)]
    tensors = {part.name: stored for part, stored, _ in made}
    inputs = torch.randn(3, 70, generator=seeded(1))
    for rank in range(ranks):
        shares = [max(1, ranks // (size // 4)) for size in sizes]  # ranks that share a key head
        local = tuple(size * same // ranks for size, same in zip(sizes, shares, strict=True))
        weight = served([part for part, *_ in made], Cut(local, 70, rank, ranks), tensors, "qkv")
        expected = [
            matrix[rank // same * rows : (rank // same + 1) * rows]
            for (*_, matrix), same, rows in zip(made, shares, local, strict=True)
        ]
        torch.testing.assert_close(weight.product(inputs), inputs @ torch.cat(expected).t(), **CLOSE)
        if MIX not in (first, second):
            alone = {"nvfp4", "fp8-e4m3"}  # one scale for all rows
            assert len(weight.matrices) == sum(
                2 if name in alone and name == second else 1 for name in {first, second}
            ) + (first == second and first in alone)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([1, 2, 4]))
def test_input_parallel_ranks_add_up(name, ranks):
    part, tensors, matrix = stored(name, 6, 256)
    inputs, bias = torch.randn(3, 256, generator=seeded(1)), torch.randn(6, generator=seeded(2))
    total = torch.zeros(3, 6)
    for rank in range(ranks):
        weight = served([part], Cut((6,), 256 // ranks, rank, ranks), {"a": tensors}, [None])
        total += weight.product(inputs[:, rank * 256 // ranks :][:, : 256 // ranks], bias if rank == 0 else None)
    torch.testing.assert_close(total, inputs @ matrix.t() + bias, **CLOSE)


def test_splits_within_a_group_are_refused():
    part, tensors, _ = stored("int4-g64", 6, 96)
    with pytest.raises(MpqError, match=r"48 columns for each rank cut the groups of 64 in a: use fewer ranks"):
        served([part], Cut((6,), 48, 0, 2), {"a": tensors}, [None])
    with pytest.raises(MpqError, match=r"6 rows of a cannot be shared out in 4 rows"):
        served([part], Cut((4,), 96, 0, 2), {"a": tensors}, [None])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["int4-g32", MIX])
def test_vocabularies_are_padded(name, ranks):
    part, tensors, matrix = stored(name, 70, 64)
    rows = 128 // ranks
    inputs, logits = torch.randn(2, 64, generator=seeded(1)), []
    for rank in range(ranks):
        weight = served([part], Cut((rows,), 64, rank, ranks, padded=True), {"a": tensors}, [None])
        logits.append(weight.product(inputs))
        here = torch.arange(max(min(rows, 70 - rank * rows), 0))
        torch.testing.assert_close(weight.rows(here), matrix[rank * rows + here], **CLOSE)
    whole = torch.cat(logits, -1)
    torch.testing.assert_close(whole[:, :70], inputs @ matrix.t(), **CLOSE)
    assert not whole[:, 70:].any()


def test_wrong_missing_and_altered_tensors_are_refused_by_name():
    part, tensors, _ = stored("int4-g32", 6, 64)
    with pytest.raises(MpqError, match=r"no tensor a\.weight\.scale"):
        served([part], Cut((6,), 64), {"a": {"packed": tensors["packed"]}}, [None])
    with pytest.raises(MpqError, match=r"a\.weight\.packed is torch\.uint8 \(6, 31\): expected a tensor of int4-g32"):
        served([part], Cut((6,), 64), {"a": {**tensors, "packed": tensors["packed"][:, 1:]}}, [None])
    with pytest.raises(MpqError, match=r"a\.weight\.packed is not what was exported"):
        served([part], Cut((6,), 64), {"a": tensors}, [None], {"a.weight.packed": "0", "a.weight.scale": "0"})


@pytest.mark.parametrize("mixes", [False, True])
def test_an_exported_model_served_layer_by_layer(tmp_path, mixes):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = seed_weights(LlamaForCausalLM(config), 0.1).eval()
    layers = find_layers(model)
    schemes = ("int4-g32", "nvfp4", "int3-g64-asym+a:int8-token", "fp8-e4m3+a:fp8-e4m3", "bf16")
    allocation = Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))
    allocation = mixed_allocation(model, ("int2-g32", "int3-g32", "int4-g32")) if mixes else allocation
    folder = export(model, allocation, tmp_path / "out")
    known = named_layers(json.loads((folder / "config.json").read_text())["quantization_config"]["layers"])
    noted = json.loads((folder / "checksums.json").read_text())["model.safetensors"]
    file = load_file(folder / "model.safetensors")
    truth = simulate(model, allocation, trainable=False)
    prefixes = {"lm_head": ["lm_head"], "model.embed_tokens": ["model.embed_tokens"]}
    for block in ("model.layers.0", "model.layers.1"):
        for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            parent, _, last = leaf.rpartition(".")
            prefixes[f"{block}.{leaf}"] = [f"{block}.{parent}.{name}" for name in FUSED.get(last, [last])]
    for prefix, names in prefixes.items():
        parts = parts_of(prefix, known, FUSED)
        modules = [truth.get_submodule(name) for name in names]
        begins = {part.name: f"{part.name}.weight." for part in parts}
        tensors = {
            own: {name.removeprefix(begin): tensor for name, tensor in file.items() if name.startswith(begin)}
            for own, begin in begins.items()
        }
        ids = "qkv" if prefix.endswith("qkv_proj") else range(len(parts)) if len(parts) > 1 else [None]
        cut = Cut(tuple(part.rows for part in parts), parts[0].cols)
        weight = served(parts, cut, tensors, ids, noted)
        if prefix == "model.embed_tokens":
            rows = torch.arange(64)
            torch.testing.assert_close(weight.rows(rows), modules[0](rows), **CLOSE)
            continue
        inputs = torch.randn(3, parts[0].cols, generator=seeded(1))
        expected = [
            functional.linear(
                inputs if part.scheme.activation is None
                else fake_quantize_inputs(module, inputs, part.scheme.activation), module.weight,
            )
            for part, module in zip(parts, modules, strict=True)
        ]  # fmt: skip
        torch.testing.assert_close(weight.product(inputs), torch.cat(expected, -1), **CLOSE)
    assert parts_of("model.norm", known, FUSED) == ()
    del known["model.layers.0.self_attn.k_proj"]
    with pytest.raises(MpqError, match=r"fuses .*q_proj, .*, but .*k_proj is not quantized"):
        parts_of("model.layers.0.self_attn.qkv_proj", known, FUSED)


def test_the_entry_point_resolves_to_the_plugin():
    from importlib.metadata import entry_points

    points = [point for point in entry_points(group="vllm.general_plugins") if point.name == "mpq"]
    assert all(point.value == "mpq.integrations.vllm:register" for point in points)


def test_a_fused_mix_is_one_product_per_format():
    made = [stored(MIX, rows, 64, name) for rows, name in ((32, "q"), (8, "k"), (8, "v"))]
    tensors = {part.name: stored for part, stored, _ in made}
    weight = served([part for part, *_ in made], Cut((32, 8, 8), 64), tensors, "qkv")
    assert [matrix.format.name for matrix in weight.matrices] == ["int2-g32", "int4-g32"]
    assert weight.joint is not None
    inputs = torch.randn(3, 64, generator=seeded(1))
    expected = inputs @ torch.cat([matrix for *_, matrix in made]).t()
    torch.testing.assert_close(weight.product(inputs), expected, **CLOSE)
    weight.joint = None
    torch.testing.assert_close(weight.product(inputs), expected, **CLOSE)


def test_unnamed_embeddings_are_matched_by_size():
    facts = {"scheme": "int4-g64", "kind": "embedding", "rows": 70, "cols": 64, "aliases": ["lm_head"]}
    head = {**facts, "kind": "linear", "aliases": []}
    layers = named_layers({"model.embed_tokens": facts, "other_head": head})
    assert embedding_named("", layers, 70, 64) == "model.embed_tokens"
    assert embedding_named("lm_head", layers, 70, 64) == "lm_head"
    assert embedding_named("", layers, 71, 64) == ""
    two = named_layers({"a": {**facts, "aliases": []}, "b": {**facts, "aliases": []}})
    with pytest.raises(MpqError, match="which embedding of 70 x 64 it builds, a or b"):
        embedding_named("", two, 70, 64)
