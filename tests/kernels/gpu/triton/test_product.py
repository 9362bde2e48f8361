"""The Triton product against float64, in Triton's interpreter unless TRITON_INTERPRET=0 and a GPU say otherwise."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mpq.kernels.ops  # noqa: F401  (registers the layouts)
from devices import poisoned
from mpq.core.formats import FORMATS, Format, parse_format
from mpq.kernels.gpu.fragments import FRAGMENTS, covers
from mpq.kernels.gpu.triton.config import Config, default_config, step_cols
from mpq.kernels.gpu.triton.linear import EMULATE, linear, product
from mpq.kernels.gpu.triton.spec import spec_of
from mpq.kernels.gpu.triton.stream import Stream
from mpq.kernels.layout import pack, to_layout
from mpq.rounding.reference import dequantize, quantize

DEVICE = "cpu" if EMULATE else "cuda"
COVERED = [name for name in FORMATS if covers(parse_format(name))]
SIXTEEN = [torch.float16, torch.bfloat16]
BASE = Config(block_n=64, block_m=16)


def problem(format: Format, tokens: int, rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs, bias, the float64 product and the weight's fragments."""
    random = torch.Generator().manual_seed(seed)
    quantized = quantize(torch.randn(rows, cols, generator=random), format)
    inputs = torch.randn(tokens, cols, generator=random).to(dtype)
    bias = torch.randn(rows, generator=random).to(dtype)
    truth = inputs.double() @ dequantize(quantized).double().T + bias.double()
    weight = to_layout(pack(quantized), FRAGMENTS).tensors.values()
    return inputs.to(DEVICE), bias.to(DEVICE), truth.to(DEVICE), *(tensor.to(DEVICE) for tensor in weight)


def cancels(truth: Tensor, cols: int) -> bool:
    """Whether sums of products of standard normal numbers are far below their usual magnitude, to which rounding errors
    are relative; single outputs often are.
    """
    return bool(truth.norm() < 0.5 * (truth.numel() * cols) ** 0.5)


def relative(output: Tensor, truth: Tensor) -> float:
    return float((output.double() - truth).norm() / truth.norm())


def tolerance(format: Format, dtype: torch.dtype, config: Config) -> float:
    """float32 sums of exact products: 1e-6. Weights that no 16-bit float holds exactly add half a unit of its last
    place; the interpreter cuts bfloat16 off instead of rounding: a whole one.
    """
    spec = spec_of(format)
    spanning = spec.group and spec.group % config.block_k
    exact = spec.kind != "table" and not (spanning and spec.scale in ("fp16", "bf16", "fp32"))
    return 1e-6 if exact else torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 0.5)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", [*COVERED, "int7-g64-asym", "int4-g16", "fp5-e2m2-g48", "int5"])
def test_every_format(name: str, dtype: torch.dtype) -> None:
    format = parse_format(name)
    config = replace(BASE, block_k=min(64, step_cols(spec_of(format))))
    inputs, bias, truth, *weight = problem(format, 5, 50, 200, dtype)
    output = product(inputs, weight, bias, format, 50, config, torch.float32)
    assert relative(output, truth) < tolerance(format, dtype, config)


def test_values_beyond_float16_use_bfloat16_or_the_reference() -> None:
    format = parse_format("fp8-e6m1-g32")
    inputs, bias, truth, *weight = problem(format, 5, 50, 64, torch.bfloat16)
    config = replace(BASE, block_k=32)
    assert relative(product(inputs, weight, bias, format, 50, config, torch.float32), truth) < 1e-6
    output = linear(inputs.half(), weight, bias.half(), format.name, 50, 64, FRAGMENTS, "")
    assert relative(output, truth) < 0.01  # inputs and bias are small and lose nothing


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["int4-g128", "int3-g32-asym", "int8-channel", "nvfp4", "mxfp6-e2m3"]),
    tokens=st.integers(1, 40),
    rows=st.integers(1, 150),
    cols=st.integers(1, 300),
    dtype=st.sampled_from(SIXTEEN),
    blocks=st.sampled_from([(32, 16, 32), (64, 16, 64), (64, 32, 128), (128, 32, 16)]),
    split=st.integers(1, 4),
)
def test_any_shape_blocks_and_split(
    name: str, tokens: int, rows: int, cols: int, dtype: torch.dtype, blocks: tuple[int, int, int], split: int
) -> None:
    format = parse_format(name)
    config = Config(*blocks, split=split)
    inputs, bias, truth, *weight = problem(format, tokens, rows, cols, dtype, seed=rows)
    assume(not cancels(truth, cols))
    output = product(inputs, weight, bias, format, rows, config, torch.float32)
    assert relative(output, truth) < 2 * tolerance(format, dtype, config)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_strided_inputs_and_leading_axes(dtype: torch.dtype) -> None:
    format = parse_format("int4-g64-asym")
    inputs, bias, truth, *weight = problem(format, 6, 40, 128, dtype)
    columns = torch.empty(128, 6, dtype=dtype, device=DEVICE).copy_(inputs.T).T  # column-major
    spaced = torch.empty(6, 256, dtype=dtype, device=DEVICE)[:, ::2].copy_(inputs)
    expected = product(inputs, weight, bias, format, 40, BASE, dtype)
    assert relative(expected, truth) < torch.finfo(dtype).eps
    for view in (columns, spaced, inputs.reshape(2, 3, 128)):
        output = linear(view, weight, bias, format.name, 40, 128, FRAGMENTS, "")
        assert output.shape == (*view.shape[:-1], 40)
        assert torch.equal(output.reshape(6, 40), expected)


def test_accesses_stay_within_bounds_and_outputs_are_complete() -> None:
    format = parse_format("int4-g32")
    inputs, _, _, *weight = problem(format, 3, 20, 70, torch.float16)
    room = torch.full((5, 90), torch.nan, dtype=torch.float16, device=DEVICE)
    room[1:4, 10:80] = inputs
    expected = product(inputs, weight, None, format, 20, BASE, torch.float32)
    output = product(room[1:4, 10:80], weight, None, format, 20, BASE, torch.float32)
    assert output.isfinite().all()
    assert torch.equal(output, expected)


def test_shares_are_added_in_one_order() -> None:
    format = parse_format("int4-g128")
    inputs, bias, _, *weight = problem(format, 4, 32, 512, torch.float16)
    config = replace(BASE, split=4)
    outputs = [product(inputs, weight, bias, format, 32, config, torch.float32) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["int4-g128", "int3-g32-asym", "int8-channel", "nvfp4", "mxfp6-e2m3"]),
    tokens=st.integers(1, 40),
    rows=st.integers(1, 200),
    cols=st.integers(1, 300),
    blocks=st.sampled_from([(32, 16, 32), (64, 16, 64), (64, 32, 128), (128, 32, 16)]),
    programs=st.integers(1, 9),
    bias=st.booleans(),
)
def test_persistent_programs(
    name: str, tokens: int, rows: int, cols: int, blocks: tuple[int, int, int], programs: int, bias: bool
) -> None:
    format, dtype = parse_format(name), torch.float16
    config = Config(*blocks, programs=programs)
    inputs, added, truth, *weight = problem(format, tokens, rows, cols, dtype, seed=rows)
    truth = truth if bias else truth - added.double()
    assume(not cancels(truth, cols))
    with poisoned():
        outputs = [
            product(inputs, weight, added if bias else None, format, rows, config, torch.float32) for _ in range(2)
        ]
    assert relative(outputs[0], truth) < 2 * tolerance(format, dtype, config)
    assert torch.equal(outputs[0], outputs[1])


def test_poison_is_detected() -> None:
    with poisoned():
        assert torch.ones(1).new_empty(100).isnan().all()


@given(programs=st.integers(1, 300), blocks=st.integers(1, 2000), steps=st.integers(1, 200))
def test_every_step_of_every_block_is_assigned_once(programs: int, blocks: int, steps: int) -> None:
    cut = Stream(programs, blocks, steps)
    assert cut.waves * programs + cut.shared == blocks
    assert programs * cut.quota >= cut.shared * steps > (programs - 1) * cut.quota - programs
    assert cut.quota <= 2 * steps  # a program works at most two blocks beyond its waves
    assert cut.shared == 0 or blocks % programs


@pytest.mark.parametrize(("tokens", "split"), [(1, 8), (16, 8), (64, 1), (4096, 1)])
def test_few_programs_share_blocks_and_many_are_persistent(tokens: int, split: int) -> None:
    config = default_config(spec_of(parse_format("int4-g128")), tokens, 4096, 4096, processors=132)
    assert config.split >= split if split > 1 else config.split == 1
    assert (config.programs > 0) == (tokens > 32)
    assert 128 % config.block_k == 0
