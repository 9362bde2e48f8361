import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS
from mpq.core.layer import Layer
from mpq.core.scheme import parse_scheme
from mpq.kernels.cpu import panels
from mpq.kernels.layout import pack, to_layout
from mpq.kernels.modules import PackedEmbedding, PackedLinear
from mpq.kernels.weight import PackedWeight
from mpq.network.calibration import next_token_loss, seeded
from mpq.network.layers import find_layers, weight_matrix
from mpq.network.moments import second_moments
from mpq.quantized import pack_model, quantized_layers, simulate
from mpq.rounding import METHODS
from mpq.rounding.reference import dequantize
from packed_error import assert_close, radius, room
from tests.sensitivity.small_models import Convolutions, TiedLanguageModel, seed_weights

TOKENS = torch.randint(0, 7, (3, 5), generator=seeded(3))
IMAGES = torch.randn(2, 4, 6, 6, generator=seeded(4))


def convolutions() -> nn.Module:
    return seed_weights(Convolutions()).eval()


def language_model() -> nn.Module:
    return seed_weights(TiedLanguageModel()).eval()


def allocate(model, *schemes) -> Allocation:
    """Assign the schemes to the layers round-robin."""
    layers = find_layers(model)
    return Allocation(layers, tuple(schemes[i % len(schemes)] for i in range(len(layers))))


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(("build", "inputs"), [(convolutions, IMAGES), (language_model, TOKENS)])
def test_simulated_packed_and_plainly_rounded_models_agree(build, inputs, name):
    model = build()
    allocation = allocate(model, name)
    plain = copy.deepcopy(model)
    for layer in allocation.layers:
        matrix = weight_matrix(plain.get_submodule(layer.name))
        rounded = METHODS["mse"](matrix, FORMATS[name], None)
        with torch.no_grad():
            matrix.copy_(dequantize(rounded))
    expected = plain(inputs)
    # Equal values at other addresses: a BLAS may sum them in another order.
    torch.testing.assert_close(simulate(model, allocation)(inputs), expected)
    torch.testing.assert_close(simulate(model, allocation, trainable=False)(inputs), expected)
    allowed = room(plain, inputs, integers=panels.supports(FORMATS[name]))
    assert_close(pack_model(model, allocation)(inputs), expected, allowed)


@pytest.mark.parametrize("scheme", ["int4-channel+a:int8-token", "fp8-e4m3+a:fp8-e4m3", "int8-channel+a:mxfp8-e4m3"])
@pytest.mark.parametrize(("build", "inputs"), [(convolutions, IMAGES), (language_model, TOKENS)])
def test_activations_are_rounded_alike(build, inputs, scheme):
    model = build()
    simulated = simulate(model, allocate(model, scheme))
    rounded = simulated(inputs)
    weights_alone = simulate(model, allocate(model, scheme.partition("+")[0]))(inputs)
    assert not torch.equal(rounded, weights_alone)
    packed = pack_model(model, allocate(model, scheme))(inputs)
    assert_close(packed, rounded, room(simulated, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_their_type(dtype):
    model = language_model().to(dtype)
    allocation = allocate(model, "int4-g32", "int8-channel+a:int8-token")
    simulated, packed = simulate(model, allocation)(TOKENS), pack_model(model, allocation)(TOKENS)
    assert simulated.dtype == packed.dtype == dtype
    # The packed model multiplies by unrounded weights and accumulates in float32: a few roundings of the dtype apart.
    assert (simulated - packed).float().abs().max() <= 8 * torch.finfo(dtype).eps * simulated.float().abs().max()


def test_rounding_methods_apply_to_simulated_and_packed_models():
    model = language_model()
    allocation = allocate(model, "int2-g64")
    moments = second_moments(model, allocation.layers, [TOKENS], next_token_loss)
    simulated = simulate(model, allocation, "gptq", moments)
    by_gptq = simulated(TOKENS)
    assert not torch.equal(by_gptq, simulate(model, allocation, "nearest")(TOKENS))
    assert_close(pack_model(model, allocation, "gptq", moments)(TOKENS), by_gptq, room(simulated, TOKENS))


def test_the_original_is_left_alone():
    model = language_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allocation = allocate(model, "int2-g64+a:int8-token")
    simulated = simulate(model, allocation)
    pack_model(model, allocation)
    functional.cross_entropy(simulated(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_shared_weights_stay_shared():
    model = language_model()
    allocation = allocate(model, "int4-g32")
    simulated = simulate(model, allocation)
    original = simulated.embed.parametrizations.weight.original
    assert simulated.head.parametrizations.weight.original is original
    packed = pack_model(model, allocation)
    assert isinstance(packed.embed, PackedEmbedding)
    assert isinstance(packed.head, PackedLinear)
    assert packed.embed.weight is packed.head.weight
    moved = copy.deepcopy(packed).to(torch.float64)
    assert moved.embed.weight is moved.head.weight


def test_training_moves_the_weights_and_lowers_the_loss():
    model = language_model()
    simulated = simulate(model, allocate(model, "int3-channel+a:int8-token"))
    optimizer = torch.optim.Adam(simulated.parameters(), lr=0.03)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = next_token_loss(simulated, TOKENS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    rounding = simulated.mix.parametrizations.weight[0]
    steps = simulated.mix.weight.t() / rounding.rounding.scales
    assert torch.allclose(steps, steps.round(), atol=1e-5)  # still on the initial grid
    latent = simulated.mix.parametrizations.weight.original
    assert not torch.equal(latent, model.mix.weight)


def test_gradients_pass_rounding_as_the_identity():
    layer = nn.Sequential(nn.Linear(4, 3, bias=False))
    seed_weights(layer)
    simulated = simulate(layer, allocate(layer, "int3-channel"))
    x = torch.randn(5, 4, generator=seeded(1))
    simulated(x).square().sum().backward()
    rounded = simulated[0].weight.detach().requires_grad_()
    functional.linear(x, rounded).square().sum().backward()
    assert torch.equal(simulated[0].parametrizations.weight.original.grad, rounded.grad)


def test_packed_tensors_survive_casts_and_state_dicts():
    model = language_model()
    packed = pack_model(model, allocate(model, "int4-g32", "nvfp4", "bf16"))
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert cast(TOKENS).dtype == torch.bfloat16
    for name, tensor in packed.state_dict().items():
        if ".weight." in name:
            assert torch.equal(cast.state_dict()[name], tensor), name
            assert cast.state_dict()[name].dtype == tensor.dtype
    other = pack_model(seed_weights(TiedLanguageModel(), 0.1).eval(), allocate(model, "int4-g32", "nvfp4", "bf16"))
    assert not torch.equal(other(TOKENS), packed(TOKENS))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(TOKENS), packed(TOKENS))


def test_packed_weights_have_the_predicted_size():
    model = language_model()
    allocation = allocate(model, "int3-g32", "nvfp4", "int8-channel")
    weights = {module for module in pack_model(model, allocation).modules() if isinstance(module, PackedWeight)}
    assert sum(to_layout(weight.matrix(), "rows").nbytes for weight in weights) == allocation.size
    quantized = {layer.name: pack(q) for layer, _, q in quantized_layers(model, allocation, "mse")}
    assert sum(packed.nbytes for packed in quantized.values()) == allocation.size


class Padded(nn.Module):
    """Convolutions with every padding mode, strides and dilations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect", bias=False)
        self.b = nn.Conv2d(6, 6, 3, stride=2, padding=(2, 1), dilation=(1, 2), groups=3, padding_mode="circular")
        self.c = nn.Conv1d(6, 5, 3, padding="same")

    def forward(self, x):
        return self.c(self.b(self.a(x)).flatten(-2))


@pytest.mark.parametrize("inputs", [IMAGES, IMAGES[0]])
def test_convolutions_pad_like_the_originals(inputs):
    model = seed_weights(Padded()).eval()
    allocation = allocate(model, "fp32")
    assert_close(pack_model(model, allocation)(inputs), model(inputs), room(model, inputs, integers=False))


def test_an_allocation_for_another_model_is_refused():
    model = language_model()
    stranger = Allocation((Layer("twic", "linear", 4, 4),), ("int8",))
    with pytest.raises(MpqError, match="names a layer twic that the model lacks: did you mean twice"):
        simulate(model, stranger)
    bent = Allocation((Layer("twice", "linear", 4, 5),), ("int8",))
    with pytest.raises(MpqError, match=r"twice is Linear \(4, 4\) in the model, but linear \(4, 5\)"):
        pack_model(model, bent)


def test_a_weight_that_cannot_be_rounded_is_named():
    model = language_model()
    with torch.no_grad():
        model.twice.weight[0, 0] = torch.nan
    with pytest.raises(MpqError, match=r"layer twice in int8: .* NaN"):
        simulate(model, allocate(model, "int8"))


def test_gradients_flow_to_inputs_of_packed_layers():
    model = nn.Sequential(nn.Linear(4, 3))
    seed_weights(model)
    allocation = allocate(model, "int4-channel")
    packed, simulated = pack_model(model, allocation), simulate(model, allocation)
    x = torch.randn(5, 4, generator=seeded(1))
    grads = []
    for form in (packed, simulated):
        leaf = x.clone().requires_grad_()
        form(leaf).square().sum().backward()
        grads.append(leaf.grad)
    # d(sum y**2)/dx = 2 y W: twice the error of y, through W, plus three products and their sums in float32.
    weight, y = simulated[0].weight.detach().double().abs(), simulated(x).detach().double().abs()
    assert_close(*grads, 2 * (radius(simulated[0], x) + 5 * 2**-24 * y) @ weight)
    assert parse_scheme("int4-channel").weight == packed[0].weight.format


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel+a:int8-token"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_inputs_of_unsupported_types_are_refused(scheme, dtype):
    layers = [nn.Linear(8, 64), nn.Conv1d(4, 32, 3), nn.Conv2d(4, 32, 3, padding=1, padding_mode="reflect")]
    for layer, shape in zip(layers, [(3, 8), (2, 4, 8), (2, 4, 8, 8)], strict=True):
        model = nn.Sequential(layer)
        packed = pack_model(model, Allocation(find_layers(model), (scheme,)))
        packed(torch.ones(shape))
        with pytest.raises(MpqError, match=r"invalid input of type \w+ to a packed layer: expected float32"):
            packed(torch.ones(shape).to(dtype))
