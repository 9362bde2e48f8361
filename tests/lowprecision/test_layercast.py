import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.lowprecision.layercast import LayerCast, layercast
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import seeded


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_float32_product_of_bfloat16_weights(bias):
    linear = nn.Linear(40, 24, bias=bias)
    cast, inputs = LayerCast(linear), torch.randn(3, 5, 40, generator=seeded(0))
    stored = [None if p is None else p.detach().bfloat16().float() for p in (linear.weight, linear.bias)]
    assert torch.equal(cast(inputs), functional.linear(inputs, *stored))
    assert torch.equal(cast(inputs.bfloat16()), functional.linear(inputs.bfloat16().float(), *stored))
    assert sum(p.numel() * p.element_size() for p in cast.parameters()) == 2 * sum(
        p.numel() for p in linear.parameters()
    )
    assert not any(p.requires_grad for p in cast.parameters())


def test_its_state_goes_round_and_to_plain_layers():
    linear = nn.Linear(8, 4)
    cast, fresh, plain = LayerCast(linear), LayerCast(nn.Linear(8, 4)), nn.Linear(8, 4)
    fresh.load_state_dict(cast.state_dict())
    plain.load_state_dict(cast.state_dict())
    assert torch.equal(fresh.weight, cast.weight)
    assert fresh.weight.dtype == torch.bfloat16
    assert torch.equal(plain.weight, linear.weight.bfloat16().float())


def test_a_model_computes_as_its_bfloat16_checkpoint_does_in_float32():
    model = TinyLM(LMConfig(64, 32, 48, 2, 4, 2)).bfloat16()
    tokens = torch.randint(0, 64, (2, 9), generator=seeded(1))
    exact = copy.deepcopy(model).float()
    cast = layercast(model, exclude="head")
    assert isinstance(cast.blocks[1].mlp.up_proj, LayerCast)
    assert isinstance(cast.head, nn.Linear)
    with torch.no_grad():
        assert torch.equal(cast(tokens), exact(tokens))
    with pytest.raises(MpqError, match="no linear layer"):
        layercast(nn.Sequential(nn.ReLU()))
