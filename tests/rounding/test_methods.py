"""Rounding methods: each is at least as good as the plain one at its objective."""

import sys
from dataclasses import replace

import pytest
import torch

from mpq.core.errors import MpqError
from mpq.core.formats import FORMATS, parse_format
from mpq.rounding import METHODS, method_named
from mpq.rounding.clip_search import clip_search
from mpq.rounding.gptq import _compensate, _factor, _importance, gptq, row_errors
from mpq.rounding.reference import dequantize, quantize
from mpq.rounding.scale_fit import fit_scales

QUANTIZED = sorted(name for name, format in FORMATS.items() if not format.is_float_copy)


def layer(rows=24, cols=160, samples=400, seed=0):
    """A weight with a few large columns, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(cols, generator=generator).exp()
    mix = torch.randn(cols, cols, generator=generator) * 0.2 + torch.eye(cols)
    inputs = torch.randn(samples, cols, generator=generator) @ mix
    return weight, inputs


@pytest.mark.parametrize("name", QUANTIZED)
def test_clip_search_never_leaves_more_squared_error_than_nearest(name):
    weight, _ = layer()
    format = parse_format(name)
    searched = (dequantize(clip_search(weight, format)) - weight).square().sum()
    plain = (dequantize(quantize(weight, format)) - weight).square().sum()
    assert searched <= plain * (1 + 1e-6)


@pytest.mark.parametrize("name", QUANTIZED)
def test_clip_search_in_blocks_of_rows_is_the_whole_search(name, monkeypatch):
    weight, _ = layer()
    whole = clip_search(weight, parse_format(name), importance=weight.abs())
    monkeypatch.setattr(sys.modules[clip_search.__module__], "BLOCK", 5 * weight.shape[1])
    assert torch.equal(dequantize(clip_search(weight, parse_format(name), importance=weight.abs())), dequantize(whole))


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q6_k", "q4_1", "iq4_nl"])
def test_important_columns_are_rounded_more_finely(name):
    """A column whose squared errors have a weight of 100 keeps less error than with equal weights."""
    weight, _ = layer(cols=256)
    format, importance = parse_format(name), torch.ones(24, 256)
    importance[:, ::16] = 100

    def errors(quantized):
        return (dequantize(quantized) - weight).square()

    plain, weighted = errors(clip_search(weight, format)), errors(clip_search(weight, format, importance=importance))
    assert weighted[:, ::16].sum() < 0.8 * plain[:, ::16].sum()
    assert (weighted * importance).sum() < (plain * importance).sum()


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q6_k"])
def test_super_blocks_of_gptq_beat_clip_search_on_correlated_inputs(name):
    weight, inputs = layer(cols=256)
    hessian = (inputs.T @ inputs)[None]
    searched = row_errors(weight, clip_search(weight, parse_format(name)), hessian).sum()
    assert row_errors(weight, gptq(weight, parse_format(name), hessian), hessian).sum() < 0.8 * searched


@pytest.mark.parametrize(("name", "free"), [("q4_k", "uint4-g32-sfp32-mfp32"), ("q6_k", "int6-g16-sfp32")])
def test_integer_scales_cost_little_beside_free_ones(name, free):
    """Scales of 6 or 8 bits in a super-block: within 5 % of the squared error that float32 scales leave."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    settled, best = (
        (dequantize(clip_search(weight, parse_format(format))) - weight).square().sum() for format in (name, free)
    )
    assert settled <= 1.05 * best


def test_clip_search_names_the_whole_weight_that_it_refuses(monkeypatch):
    weight, _ = layer()
    weight[-1, -1] = torch.nan
    monkeypatch.setattr(sys.modules[clip_search.__module__], "BLOCK", 5 * weight.shape[1])
    with pytest.raises(MpqError, match=r"of shape \(24, 160\) holds NaN"):
        clip_search(weight, parse_format("int4-g32"))


def test_clip_search_finds_the_best_scale_of_a_fine_ladder():
    """Against 2,000 scales of both signs for one row: the search's ladder and refit come within 2 %."""
    weight, _ = layer(rows=1, cols=64)
    format = parse_format("int3-channel")
    ladder = torch.linspace(0.05, 1.2, 1000) * weight.abs().max() / 3
    errors = [
        (dequantize(quantize(weight, format, scales=scale.reshape(1, 1))) - weight).square().sum()
        for scale in torch.cat([ladder, -ladder])
    ]
    searched = (dequantize(clip_search(weight, format)) - weight).square().sum()
    assert searched <= min(errors) * 1.02


@pytest.mark.parametrize("name", QUANTIZED)
def test_gptq_keeps_the_output_better_than_nearest(name):
    weight, inputs = layer()
    format = parse_format(name)
    hessian = inputs.T @ inputs
    best = row_errors(weight, gptq(weight, format, hessian), hessian[None])
    plain = row_errors(weight, quantize(weight, format), hessian[None])
    assert best.sum() <= plain.sum() * (1 + 1e-5)


@pytest.mark.parametrize("name", ["int3-g32", "int4-g32-asym", "nf4-g32", "fp8-e4m3-tensor"])
@pytest.mark.parametrize("groups", [1, 2])
def test_compensation_knows_each_row_s_damped_error(name, groups):
    weight, inputs = layer(samples=50)
    hessian = torch.stack([inputs.T @ inputs, 2.0 * torch.eye(160)][:groups])
    start, factor = clip_search(weight, parse_format(name)), _factor(hessian, 0.01)
    codes, errors = _compensate(weight, start, factor)
    ridge = factor.ridge.reshape(-1, 1, 1) * torch.eye(160)
    assert torch.allclose(factor.ridge, 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1))
    expected = row_errors(weight, replace(start, codes=codes), hessian + ridge)
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["int2-g32", "int2-channel", "fp4-e2m1-g32", "fp8-e4m3-tensor"])
def test_no_row_of_gptq_is_worse_than_its_clip_search(name):
    """Inputs of one direction: errors compensated past the grid's end may leave more than they take."""
    weight = torch.randn(500, 160, generator=torch.Generator().manual_seed(0))
    format, hessian = parse_format(name), torch.ones(160, 160) + 0.01 * torch.eye(160)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160))[None]
    importance = _importance(hessian[None], len(weight))
    rounded = (gptq(weight, format, hessian), clip_search(weight, format, importance=importance))
    best, start = (row_errors(weight, one, damped) for one in rounded)
    if format.granularity == "tensor":
        best, start = best.sum(), start.sum()
    assert (best <= start * (1 + 1e-4)).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["int2-g32", "int2-channel", "fp8-e4m3-tensor"])
def test_rows_take_the_codes_of_smaller_damped_error(name, groups):
    """With a damping that decides between the two."""
    weight, inputs = layer(rows=200, samples=50)
    hessian = torch.stack([torch.ones(160, 160) + 0.01 * torch.eye(160), inputs.T @ inputs][:groups])
    format = parse_format(name)
    start, factor = clip_search(weight, format, importance=_importance(hessian, 200)), _factor(hessian, 0.1)
    compensated = replace(start, codes=_compensate(weight, start, factor)[0])
    damped = hessian + factor.ridge.reshape(-1, 1, 1) * torch.eye(160)
    errors, others = (row_errors(weight, one, damped) for one in (compensated, start))
    better = errors < others if format.granularity != "tensor" else (errors.sum() < others.sum()).expand(200)
    assert format.granularity == "tensor" or 0 < better.sum() < 200
    chosen = replace(start, codes=torch.where(better.unsqueeze(-1), compensated.codes, start.codes))
    expected = dequantize(fit_scales(weight, chosen, damped))
    rows = (dequantize(gptq(weight, format, hessian, damping=0.1)) != expected).any(1).sum()
    assert rows <= 2  # sums in another order, where both are as good


def test_damping_grows_tenfold_until_the_moment_is_positive_definite():
    """An eigenvalue of minus half the mean of the diagonal takes 100 times 1 %, in all blocks alike."""
    indefinite = torch.eye(4) + 1.5 * torch.eye(4).flip(0)
    moments = torch.stack([3 * torch.eye(4), indefinite])
    assert torch.linalg.eigvalsh(indefinite).min().item() == pytest.approx(-0.5)
    for order in ([0, 1], [1, 0]):
        mean = moments[order].diagonal(dim1=1, dim2=2).mean(1)
        torch.testing.assert_close(_factor(moments[order], 0.01).ridge, mean)
        torch.testing.assert_close(_factor(moments[order], 0.07).ridge, 0.7 * mean)
    assert _factor(moments[:1], 0.0).ridge.tolist() == [0.0]
    with pytest.raises(MpqError, match="not positive definite even with heavy damping"):
        _factor(-moments, 0.01)


def test_columns_count_by_the_root_of_their_inputs_second_moment():
    hessian = torch.stack([torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([9.0, 1.0]))])
    expected = torch.tensor([[2.0, 1.0], [2.0, 1.0], [3.0, 1.0], [3.0, 1.0]])
    torch.testing.assert_close(_importance(hessian, 4), expected, rtol=1e-3, atol=0)


def test_gptq_beats_clip_search_clearly_on_correlated_inputs():
    weight, inputs = layer()
    format = parse_format("int3-g32")
    hessian = (inputs.T @ inputs)[None]
    searched = row_errors(weight, clip_search(weight, format), hessian).sum()
    assert row_errors(weight, gptq(weight, format, hessian), hessian).sum() < 0.8 * searched


def test_gptq_with_white_inputs_equals_clip_search():
    """With H = identity every correction is zero, so its codes are the clip search's (GPTQ, equation 2)."""
    weight, _ = layer()
    format = parse_format("int4-g32")
    assert torch.equal(dequantize(gptq(weight, format, torch.eye(160))), dequantize(clip_search(weight, format)))


def test_row_errors_are_the_squared_errors_of_the_outputs():
    weight, inputs = layer(samples=50)
    quantized = quantize(weight, parse_format("int4-g32"))
    direct = (inputs @ (dequantize(quantized) - weight).T).square().sum(0)
    assert torch.allclose(row_errors(weight, quantized, (inputs.T @ inputs)[None]), direct, rtol=1e-3)


def test_gptq_of_a_grouped_convolution_is_gptq_of_each_group():
    weight, inputs = layer(rows=24, cols=160)
    hessians = torch.stack([part.T @ part for part in inputs.split(200)])
    format = parse_format("int3-channel")
    together = dequantize(gptq(weight, format, hessians))
    apart = [dequantize(gptq(weight[i * 12 : i * 12 + 12], format, hessians[i])) for i in range(2)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-5)


def test_dead_inputs_and_few_samples_give_finite_weights():
    weight, inputs = layer(samples=20)
    inputs[:, :30] = 0
    quantized = gptq(weight, parse_format("int4-g32"), inputs.T @ inputs)
    assert torch.isfinite(dequantize(quantized)).all()


def test_invalid_arguments_name_the_expected_ones():
    weight, _ = layer()
    with pytest.raises(MpqError, match=r"finite \(160, 160\)"):
        gptq(weight, parse_format("int4-g32"), torch.eye(10))
    for wrong in (torch.eye(160).index_fill(0, torch.tensor([3]), torch.nan), torch.eye(160).expand(7, 160, 160)):
        with pytest.raises(MpqError, match="invalid second moment for GPTQ"):
            gptq(weight, parse_format("int4-g32"), wrong)
    with pytest.raises(MpqError, match="gptq"):
        method_named("gtpq")
    assert set(METHODS) == {"nearest", "mse", "gptq"}


@pytest.mark.parametrize("name", ["int3-g32-asym", "mxfp4", "nvfp4", "int4-tensor"])
def test_gptq_rounds_a_large_weight_in_parts_alike(name, monkeypatch):
    weight, inputs = layer()
    moment = inputs.mT @ inputs
    whole = gptq(weight, parse_format(name), moment)
    monkeypatch.setattr("mpq.core.pieces.PIECE", 5 * weight.shape[1])
    parts = gptq(weight, parse_format(name), moment)
    assert torch.allclose(dequantize(parts), dequantize(whole), atol=1e-5)
