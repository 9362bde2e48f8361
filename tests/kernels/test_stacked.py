import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpq.core.allocation import Allocation
from mpq.kernels.cpu import native as cpu
from mpq.kernels.modules import PackedLinear
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import seeded
from mpq.network.layers import find_layers
from mpq.quantized import fuse, pack_model
from tests.sensitivity.small_models import seed_weights

pytestmark = pytest.mark.skipif(cpu.native() is None, reason="the kernels are not compiled here")
TOKENS = torch.randint(0, 50, (2, 9), generator=seeded(1))


def packed(*schemes, bias=False, config=None, grown=()):
    """A TinyLM whose layers take the schemes in turn; the `grown` ones have weights 8 times as large."""
    model = seed_weights(TinyLM(config or LMConfig(50, 128, 192, 2, kv_heads=2)), 0.1).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(grown) and grown:
                module.weight.mul_(8)
    if bias:
        for block in model.blocks:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(block.attention, name).bias = nn.Parameter(
                    torch.randn(getattr(block.attention, name).out_features, generator=seeded(2, name))
                )
    layers = find_layers(model)
    return pack_model(model, Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers)))))


def stacks(model):
    return {id(module.stack) for module in model.modules() if isinstance(module, PackedLinear) and module.stack}


class Calls(TorchDispatchMode):
    """The rows of every product."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.mpq.linear.default:
            self.rows.append(args[4])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "scheme", ["int4-g64", "int3-g32-asym", "fp8-e4m3-channel", "nf4-g64", "int8-channel+a:int8-token"]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_products_are_bit_identical(scheme, bias, dtype):
    model = packed(scheme, bias=bias).to(dtype)
    with torch.no_grad():
        expected = model(TOKENS)
        fused = fuse(copy.deepcopy(model))
        with Calls() as calls:
            assert torch.equal(fused(TOKENS), expected)
    assert len(stacks(fused)) == 4
    assert calls.rows == [256, 128, 384, 128] * 2 + [50]
    with torch.inference_mode():
        assert torch.equal(fused(TOKENS), expected)
    state = model.state_dict()
    assert state.keys() == fused.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fused.state_dict().items())


def test_stacking_stores_nothing_more():
    model = fuse(packed("int4-g64"))
    pieces = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in model.buffers()}
    plain = packed("int4-g64")
    assert sum(pieces.values()) == sum(buffer.nbytes for buffer in {id(one): one for one in plain.buffers()}.values())


@pytest.mark.parametrize(
    ("schemes", "config"),
    [
        (("int4-g64", "int3-g64"), None),  # siblings differ
        (("nvfp4",), None),  # a scale of its own for each tensor
        (("int8",), None),
        (("bf16",), None),  # not in panels
        (("int4-g32",), LMConfig(50, 96, 160, 2, heads=3, kv_heads=3)),  # 96 and 160 rows are no whole panels
    ],
)
def test_incompatible_layers_are_not_stacked(schemes, config):
    model = packed(*schemes, config=config, grown=("k_proj", "up_proj"))
    with torch.no_grad():
        expected = model(TOKENS)
        fused = fuse(model)
        assert not stacks(fused)
        assert torch.equal(fused(TOKENS), expected)


def test_stacked_members_follow_changes():
    model, other = fuse(packed("int4-g64")), packed("int4-g64")
    attention = model.blocks[0].attention
    x, y = torch.randn(1, 3, 128, generator=seeded(3)), torch.randn(1, 3, 128, generator=seeded(4))
    with torch.no_grad():
        alone = {name: other.blocks[0].attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")}
        for input in (x, y, y):
            assert torch.equal(attention.q_proj(input), alone["q_proj"](input))
        assert torch.equal(attention.k_proj(x), alone["k_proj"](x))  # another input than q's
        attention.q_proj(x)
        x.add_(1)
        assert torch.equal(attention.v_proj(x), alone["v_proj"](x))
        state = {name: tensor.roll(1, 0) for name, tensor in alone["k_proj"].state_dict().items()}
        attention.k_proj.load_state_dict(state)
        alone["k_proj"].load_state_dict(state)
        for name, module in alone.items():
            assert torch.equal(attention.get_submodule(name)(x), module(x))


def test_gradients_and_compiled_graphs():
    model, plain = fuse(packed("int4-g64")), packed("int4-g64")
    grads = []
    for one in (model, plain):
        leaf = torch.randn(1, 3, 128, generator=seeded(3)).requires_grad_()
        one.blocks[0].mlp(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    compiled = torch.compile(model.blocks[0].mlp, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 3, 128, generator=seeded(5))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain.blocks[0].mlp(x), rtol=1e-5, atol=1e-5)
