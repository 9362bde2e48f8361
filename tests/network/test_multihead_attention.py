"""nn.MultiheadAttention split into layers computes the same, and is quantized and packed like other layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mpq
from mpq.core.errors import MpqError
from mpq.network.attention import SplitAttention, split_attention
from mpq.network.calibration import cross_entropy, seeded
from mpq.network.coverage import ATTENTION, Coverage
from mpq.network.prepare import prepared
from mpq.quantized import pack_model

QUERIES, KEYS = 5, 7


def attention(width=16, **options):
    torch.manual_seed(0)
    made = nn.MultiheadAttention(width, 4, **options).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return made


def tensors(generator, first, dims=(16, 16, 16)):
    shapes = [(3, QUERIES, dims[0]), (3, KEYS, dims[1]), (3, KEYS, dims[2])]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return made if first else [one.transpose(0, 1) for one in made]


def same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_outputs_equal_the_fused_modules(first, options, call):
    draw = seeded(0, "inputs")
    fused = attention(batch_first=first, **options)
    apart = split_attention(copy.deepcopy(fused))
    assert type(apart) is SplitAttention
    given = tensors(draw, first, (16, options.get("kdim", 16), options.get("vdim", 16)))
    padding = torch.zeros(3, KEYS, dtype=torch.bool)
    padding[1, 4:] = True
    hidden = torch.rand(QUERIES, KEYS, generator=draw) > 0.7
    hidden[:, 0] = False
    by_head = torch.randn(12, QUERIES, KEYS, generator=draw)
    for masks in ({}, {"attn_mask": hidden}, {"attn_mask": by_head}, {"key_padding_mask": padding}):
        same(apart(*given, **masks, **call), fused(*given, **masks, **call))
    both = {"attn_mask": hidden, "key_padding_mask": padding}
    same(apart(*given, **both, **call), fused(*given, **both, **call))
    one = [tensor[0] if first else tensor[:, 0] for tensor in given]
    alone = {"attn_mask": by_head[:4], "key_padding_mask": padding[1].float()}
    same(apart(*one, **alone, **call), fused(*one, **alone, **call))
    if not options.get("kdim"):
        assert torch.equal(apart.in_proj_weight, fused.in_proj_weight)
        assert apart.in_proj_bias is None if options else torch.equal(apart.in_proj_bias, fused.in_proj_bias)


def test_dropout_acts_in_training_alone():
    apart = split_attention(attention(dropout=0.5))
    given = tensors(seeded(0), False)
    assert torch.equal(apart(*given)[0], apart(*given)[0])
    apart.train()
    assert not torch.equal(apart(*given)[0], apart(*given)[0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


BATCH = (torch.randn(6, 5, 16, generator=seeded(0, "x")), torch.arange(6) % 4)
SCHEMES = ["int2-channel", "int4-channel"]


def test_torch_encoders_are_fully_quantized(tmp_path):
    model = Encoder().eval()
    table = mpq.profile(model, [BATCH], cross_entropy, SCHEMES, progress=False)
    names = [f"encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert [layer.name for layer in table.layers][:4] == names
    assert {layer.tie for layer in table.layers[:3]} == {"encoder.layers.0.self_attn.qkv"}
    assert (table.scores > 0).all()
    covered = Coverage.from_json(table.provenance["coverage"])
    assert not any(each.reason == ATTENTION for each in covered.left)
    allocation = mpq.frontier(table).at(bits=5.0)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    mpq.export(model, allocation, tmp_path / "out", inputs=BATCH[0])
    with torch.no_grad():
        expected = mpq.simulate(model, allocation, trainable=False)(BATCH[0])
        loaded = mpq.load(tmp_path / "out", model=Encoder())
        torch.testing.assert_close(loaded(BATCH[0]), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(pack_model(model, allocation)(BATCH[0]), expected, rtol=1e-3, atol=1e-4)
        assert (expected - model(BATCH[0])).norm() > 0.01 * expected.norm()
    student = mpq.simulate(model, allocation)
    cross_entropy(student, BATCH).backward()
    assert student.encoder.layers[1].self_attn.k_proj.parametrizations.weight.original.grad.any()


class Own(nn.MultiheadAttention):
    """A class of its own, which is not split."""


def test_folders_with_the_fused_weight_are_read(tmp_path):
    model = Encoder().eval()
    for layer in model.encoder.layers:
        layer.self_attn.__class__ = Own
    table = mpq.profile(model, [BATCH], cross_entropy, SCHEMES, progress=False)
    assert ATTENTION in str(Coverage.from_json(table.provenance["coverage"]))
    allocation = mpq.frontier(table).at(bits=5.0)
    mpq.export(model, allocation, tmp_path / "out", inputs=BATCH[0])
    loaded = mpq.load(tmp_path / "out", model=Encoder())
    assert type(loaded.encoder.layers[0].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        expected = mpq.simulate(model, allocation, trainable=False)(BATCH[0])
        torch.testing.assert_close(loaded(BATCH[0]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "weight norm"])
def test_a_failed_load_restores_the_structure(kind, tmp_path):
    def build():
        model = Encoder()
        return model if kind == "attention" else parametrizations.weight_norm(model.head) and model

    model = build().eval()
    table = mpq.profile(model, [BATCH], cross_entropy, SCHEMES, progress=False)
    mpq.export(model, mpq.frontier(table).at(bits=5.0), tmp_path / "out", inputs=BATCH[0])
    other = build()
    other.extra = nn.Linear(3, 3)
    state = list(other.state_dict())
    with pytest.raises(MpqError, match="no tensor extra"):
        mpq.load(tmp_path / "out", model=other)
    assert list(other.state_dict()) == state
    given = build()
    assert mpq.load(tmp_path / "out", model=given) is given


def test_parameters_that_modules_share_stay_shared():
    one, other = attention(), attention()
    other.in_proj_weight = one.in_proj_weight
    model = prepared(nn.ModuleList([one, other]))
    assert model[0].k_proj.weight is model[1].k_proj.weight
    assert model[0].k_proj.bias is not model[1].k_proj.bias


@pytest.mark.parametrize("kind", ["further keys", "zeros", "computed", "replaced"])
def test_other_subclasses_are_not_split(kind):
    made = attention(add_bias_kv=kind == "further keys", add_zero_attn=kind == "zeros")
    if kind == "computed":
        parametrizations.orthogonal(made, "in_proj_weight")
    if kind == "replaced":
        made.out_proj = nn.Linear(16, 16)
    assert not isinstance(split_attention(made), SplitAttention)
