import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.lowprecision.layercast import layercast
from mpq.lowprecision.reduction import ChunkedLinear, chunked_linear, in_chunks
from mpq.network.calibration import seeded


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


@pytest.mark.parametrize("chunks", [1, 3, 8, 50])
def test_another_order_is_the_same_product_but_for_rounding(chunks):
    inputs, weight, bias = normal(4, 50), normal(6, 50, seed=1), normal(6, seed=2)
    exact = functional.linear(inputs.double(), weight.double(), bias.double())
    assert (chunked_linear(inputs, weight, bias, chunks) - exact).abs().max() < 50 * 2**-24 * 50
    torch.testing.assert_close(chunked_linear(inputs.double(), weight.double(), bias.double(), chunks), exact)


def test_partial_sums_are_rounded_one_after_the_other():
    inputs, weight = normal(3, 12, dtype=torch.bfloat16), normal(5, 12, seed=1, dtype=torch.bfloat16)
    ours = chunked_linear(inputs, weight, None, 3)
    total = torch.zeros(3, 5)
    for start in (0, 4, 8):
        partial = (inputs[:, start : start + 4].double() @ weight[:, start : start + 4].double().T).float().bfloat16()
        total = (total + partial.float()).bfloat16().float()
    assert torch.equal(ours.float(), total)


def test_fewer_bits_drift_further():
    inputs, weight = normal(64, 256), normal(64, 256, seed=1)
    drift = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one, eight = (chunked_linear(inputs.to(dtype), weight.to(dtype), None, chunks).double() for chunks in (1, 8))
        drift[dtype] = (one - eight).abs().mean().item()
    assert drift[torch.bfloat16] > 4 * drift[torch.float16] > 16 * drift[torch.float32] > 0


def test_copies_of_models_sum_in_chunks_in_their_own_type():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    layercast(model, include="2")
    chunked = in_chunks(model, 4)
    assert isinstance(model[0], nn.Linear)
    assert isinstance(chunked[0], ChunkedLinear)
    assert chunked[2].weight.dtype == torch.bfloat16
    inputs = normal(3, 16)
    torch.testing.assert_close(chunked(inputs), model(inputs))
    assert chunked(inputs).dtype == torch.float32
    with pytest.raises(MpqError, match="number of chunks"):
        in_chunks(model, 0)(inputs)
    with pytest.raises(MpqError, match="no linear layer"):
        in_chunks(nn.ReLU(), 2)
