import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv1d_input, conv2d_input

from mpq.core.scheme import parse_scheme
from mpq.kernels.cpu import native as cpu
from mpq.kernels.layout import pack, to_layout, unpack
from mpq.kernels.modules import packed_module
from mpq.kernels.weight import PackedWeight
from mpq.network.calibration import seeded
from mpq.rounding.reference import dequantize
from tests.kernels.cpu.test_native import TYPES, bound, level, needs_native, poisoned, weight_of  # noqa: F401  (fixtures)

NAMES = ("int4-g32", "int8-channel", "int3-g16-asym", "nvfp4", "fp8-e4m3", "fp6-e3m2-channel", "nf4-g64")


def patches(x, conv):
    """The unfolded input rows in float64, (positions, cols)."""
    sides, mode = conv._reversed_padding_repeated_twice, conv.padding_mode
    x = functional.pad(x.double(), sides, mode="constant" if mode == "zeros" else mode)
    if x.dim() == 3:
        x = x[:, :, None]
        taps, apart, step = [(1, values[0]) for values in (conv.kernel_size, conv.dilation, conv.stride)]
    else:
        taps, apart, step = conv.kernel_size, conv.dilation, conv.stride
    return functional.unfold(x, taps, apart, stride=step).transpose(1, 2).flatten(0, 1)


def packed_conv(conv, name, layout="panels"):
    packed, _ = weight_of(name, conv.out_channels, conv.weight[0].numel())
    weight = PackedWeight(packed)
    weight.arrange(layout)
    return packed_module(conv, weight, parse_scheme(name)), packed


def check(x, conv, name):
    """Check both paths: by patches, and by the module's choice, which may unpack weights and sum in PyTorch's order."""
    module, packed = packed_conv(conv, name)
    padded = functional.pad(x, module.side_padding, mode=module.padding_mode) if module.side_padding else x
    weight, where = module.weight, (module.kernel, module.stride, module.padding, module.dilation)
    found, chosen = cpu.patches(padded, weight.tensors, module.bias, *weight.signature, *where), module(x)
    assert found.dtype == chosen.dtype == x.dtype
    rows = patches(x, conv)
    exact = rows @ dequantize(unpack(packed)).double().T
    if conv.bias is not None:
        exact = exact + conv.bias.double()
    error = (found.movedim(1, -1).reshape(exact.shape).double() - exact).abs()
    allowed = bound(rows, packed, x.dtype) + (TYPES[x.dtype] + 2**-22) * exact.abs()
    allowed += 2**-24 if x.dtype == torch.float16 else 0  # its subnormals
    assert (error <= allowed).all(), (error / allowed).max()
    error = (chosen.movedim(1, -1).reshape(exact.shape).double() - exact).abs()
    allowed += (rows.shape[1] + 1) * 2**-24 * (rows.abs() @ dequantize(unpack(packed)).double().abs().T)
    assert (error <= allowed).all(), (error / allowed).max()


@needs_native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@torch.no_grad()
def test_equals_the_reference(level, data):  # noqa: F811
    draw, two = data.draw, data.draw(st.booleans())
    build = nn.Conv2d if two else nn.Conv1d
    number = st.integers(1, 3)
    pair = st.tuples(number, number) if two else st.tuples(number)
    taps, mode = draw(pair), draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    stride, apart = draw(pair), draw(pair)
    around = draw(st.one_of(st.just("valid"), st.just("same") if set(stride) == {1} else st.just("valid"), pair))
    channels, rows = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    size = draw(st.tuples(*[st.integers(8, 17)] * (2 if two else 1)))
    conv = build(channels, rows, taps, stride, around, apart, bias=draw(st.booleans()), padding_mode=mode)
    dtype = draw(st.sampled_from(sorted(TYPES, key=str)))
    x = torch.randn((draw(st.integers(1, 3)), channels, *size), generator=seeded(draw(st.integers(0, 9))))
    if two and draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    check(x.to(dtype)[..., ::1], conv.to(dtype), draw(st.sampled_from(NAMES)))


@needs_native
@pytest.mark.parametrize("channels", [3, 70])
@torch.no_grad()
def test_many_positions_are_the_same_for_any_number_of_threads(level, channels):  # noqa: F811
    conv = nn.Conv2d(channels, 70, 3, 1, 1)
    x = torch.randn((2, channels, 40, 37), generator=seeded(channels))
    check(x, conv, "int4-g32")
    module, _ = packed_conv(conv, "int4-g32")
    where = (module.kernel, module.stride, module.padding, module.dilation)
    arguments = (module.weight.tensors, module.bias, *module.weight.signature, *where)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            found.append(cpu.patches(x, *arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_native
@torch.no_grad()
def test_nan_and_infinities_stay_local_and_zeros_stay_zero(level):  # noqa: F811
    conv = nn.Conv2d(5, 9, 3, padding=1, bias=False)
    module, _ = packed_conv(conv, "int8-channel")
    where = (module.kernel, module.stride, module.padding, module.dilation)
    reference, _ = packed_conv(conv, "int8-channel", "rows")
    x = torch.randn((2, 5, 9, 9), generator=seeded(0))
    x[0, 2, 4, 4], x[1, 0, 0, 0], x[1, 1, 8, 8] = float("nan"), float("inf"), 1e-38
    found = cpu.patches(x, module.weight.tensors, None, *module.weight.signature, *where)
    wanted = reference(x)
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert torch.equal(found.isnan(), wanted.isnan())
    zeros = torch.zeros(1, 5, 4, 4)
    assert not cpu.patches(zeros, module.weight.tensors, None, *module.weight.signature, *where).any()
    assert cpu.patches(zeros[:0], module.weight.tensors, None, *module.weight.signature, *where).shape == (0, 9, 4, 4)
    assert module(zeros[:0]).shape == (0, 9, 4, 4)


@pytest.mark.parametrize("layout", ["rows", pytest.param("panels", marks=needs_native)])
@pytest.mark.parametrize(
    ("build", "size", "groups"), [(nn.Conv2d, (7, 6), 1), (nn.Conv1d, (9,), 1), (nn.Conv2d, (7, 6), 2)]
)
def test_the_op_is_sound_and_has_the_reference_gradient(layout, build, size, groups):
    conv = build(6, 8, 3, 2, 1, groups=groups)
    module, packed = packed_conv(conv, "int4-g32", layout)
    weight = dequantize(unpack(packed)).reshape(conv.weight.shape)
    x = torch.randn((2, 6, *size), generator=seeded(1)).requires_grad_()
    where = (module.kernel, module.stride, module.padding, module.dilation, groups)
    arguments = (x, module.weight.tensors, module.bias, *module.weight.signature, *where)
    torch.library.opcheck(torch.ops.mpq.conv.default, arguments)
    plain = functional.conv2d if len(size) == 2 else functional.conv1d
    out = torch.randn_like(module(x))
    wanted = torch.autograd.grad(plain(x, weight, conv.bias, 2, 1, 1, groups), (x, conv.bias), out)
    found = torch.autograd.grad(module(x), (x, conv.bias), out)
    torch.testing.assert_close(found, wanted)  # float32 sums of the same numbers
    apart = 2 * bound(patches(x.detach(), conv), packed).max() if groups == 1 else 1e-5  # other batches, other sums
    torch.testing.assert_close(module(x[0]), module(x)[0], rtol=0, atol=float(apart))  # one image without a batch


@pytest.mark.parametrize("layout", ["rows", pytest.param("panels", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bit_inputs_are_summed_in_float32(layout, dtype):
    """PyTorch 2.13's own bfloat16 convolution reads uninitialized memory here, on a machine with AMX."""
    conv = nn.Conv2d(16, 64, (1, 3), (1, 2), bias=False).to(dtype)
    module, packed = packed_conv(conv, "int8-channel", layout)
    x = torch.randn((1, 16, 8, 3), generator=seeded(0)).to(dtype)
    rows = patches(x, conv)
    exact = rows @ dequantize(unpack(packed)).double().T
    for size in (2**10, 2**14, 2**16):
        torch.full((size,), 3e34)  # freed at once: poisons memory that a wrong kernel would read
    error = (module(x).movedim(1, -1).reshape(exact.shape).double() - exact).abs()
    # One rounding to the type, and 48 float32 sums.
    products = rows.abs() @ dequantize(unpack(packed)).double().abs().T
    allowed = bound(rows, packed) + TYPES[dtype] * exact.abs() + 48 * 2**-24 * products
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("layout", ["rows", pytest.param("panels", marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [nn.Conv1d, nn.Conv2d])
def test_sixteen_bit_gradients_are_summed_in_float32(layout, dtype, build):
    """A weight rounded to 16 bits would err by more than the gradient's rounding where products cancel."""
    conv = build(16, 64, 3, 2, bias=False).to(dtype)
    module, packed = packed_conv(conv, "int8-channel", layout)
    weight = dequantize(unpack(packed)).reshape(conv.weight.shape).double()
    x = torch.randn((2, 16, *[9] * (weight.ndim - 2)), generator=seeded(0)).to(dtype).requires_grad_()
    output = module(x)
    out = torch.randn(output.shape, generator=seeded(1)).to(dtype)
    (found,) = torch.autograd.grad(output, x, out)
    find = conv1d_input if build is nn.Conv1d else conv2d_input
    exact = find(x.shape, weight, out.double(), 2)
    magnitudes = find(x.shape, weight.abs(), out.double().abs(), 2)
    allowed = TYPES[dtype] * exact.abs() + 64 * 9 * 2**-24 * magnitudes + (2**-24 if dtype == torch.float16 else 0)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= allowed).all()


def test_arranging_weights_is_lossless():
    conv = nn.Conv2d(7, 11, 3)
    module, packed = packed_conv(conv, "int4-g32")
    restored = to_layout(module.weight.matrix(), "rows")
    for key, tensor in packed.tensors.items():
        assert torch.equal(restored.tensors[key], tensor)
    assert pack(unpack(restored)).nbytes == packed.nbytes
