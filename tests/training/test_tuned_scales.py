"""Scales tuned against the float model."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from mpq.core.allocation import Allocation
from mpq.core.formats import parse_format
from mpq.network.calibration import next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.quantized import quantized_layers, simulate
from mpq.rounding.codes import round_scales
from mpq.rounding.reference import dequantize, quantize
from mpq.training.tuned_scales import ScaledWeight, Tuning, _student, computed_once, divergence, tune_scales
from tests.mixes import mixed_allocation
from tests.sensitivity.small_models import Tagger, TiedLanguageModel, seed_weights

TOKENS = [torch.randint(0, 7, (8, 12), generator=seeded(index)) for index in range(4)]


def rounded(model, scheme):
    allocation = Allocation(find_layers(model), (scheme,) * len(find_layers(model)))
    return allocation, {layer.name: found for layer, _, found in quantized_layers(model, allocation, "mse")}


@pytest.mark.parametrize("scheme", ["int3-channel", "int3-channel-asym", "mxfp4", "nvfp4", "q4_k", "bf16"])
def test_divergence_falls_while_codes_stay(scheme):
    model = seed_weights(TiedLanguageModel()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allocation, start = rounded(model, scheme)
    tuned = tune_scales(model, allocation, start, TOKENS, next_token_loss, Tuning(steps=40, rate=1e-2))
    assert all(torch.equal(tuned[name].codes, start[name].codes) for name in start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if not scheme.startswith("int3"):
        assert all(tuned[name] is start[name] for name in start)
    else:
        assert mean_divergence(model, allocation, tuned) < 0.8 * mean_divergence(model, allocation, start)
    for found in tuned.values():
        if found.scales is not None and found.format.scale in ("fp16", "e4m3", "e8m0"):
            assert torch.equal(found.scales, round_scales(found.scales, found.format.scale))


def mean_divergence(model, allocation, weights):
    student = seed_weights(TiedLanguageModel()).eval()
    with torch.no_grad():
        for layer in allocation.layers:
            module = student.get_submodule(layer.name)
            numbers = dequantize(weights[layer.name])
            module.weight.copy_(numbers.t() if layer.kind == "transformers-conv1d" else numbers)
        return sum(divergence(student(batch), model(batch))[0].item() for batch in TOKENS)


def test_rows_in_formats_of_their_own_are_tuned_too():
    model = seed_weights(TiedLanguageModel()).eval()
    allocation = mixed_allocation(model, ("int2-g4", "int3-g4", "mxfp4"))
    start = {layer.name: found for layer, _, found in quantized_layers(model, allocation, "mse")}
    tuned = tune_scales(model, allocation, start, TOKENS, next_token_loss, Tuning(steps=40, rate=1e-2))
    assert mean_divergence(model, allocation, tuned) < 0.9 * mean_divergence(model, allocation, start)
    for name, found in tuned.items():
        for part, before in zip(found.parts, start[name].parts, strict=True):
            assert torch.equal(part.codes, before.codes)
            assert torch.equal(part.scales, before.scales) == (part.format.name == "mxfp4")


@pytest.mark.parametrize("name", ["int4-g8", "int4-g5-asym", "int8", "fp4-e2m1-channel", "q4_1"])
def test_gradients_are_those_of_the_numbers(name):
    format, owner = parse_format(name), torch.nn.Linear(12, 6)
    start = quantize(owner.weight, format)
    weight = ScaledWeight(start, lambda matrix: matrix, torch.float32)
    direction = torch.randn(6, 12, generator=seeded(1))
    (weight(owner.weight) * direction).sum().backward()
    step = 1e-3
    for index in range(min(5, weight.shift.numel())):
        moved = []
        for sign in (1, -1):
            scales = start.scales.clone()
            scales.view(-1)[index] *= torch.exp(torch.tensor(sign * step))
            moved.append((dequantize(replace(start, scales=scales)) * direction).sum().item())
        expected = (moved[0] - moved[1]) / (2 * step)
        assert weight.shift.grad.view(-1)[index].item() == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_weights_computed_once_for_several_passes_have_the_same_gradients():
    owner = torch.nn.Linear(12, 6)
    start = [quantize(owner.weight, parse_format(name)) for name in ("int4-g8", "mxfp4")]  # of these one has shifts
    directions = torch.randn(3, 6, 12, generator=seeded(1))
    found = []
    for once in (False, True):
        weights = [ScaledWeight(one, lambda matrix: matrix, torch.float32) for one in start]
        with computed_once(weights) if once else nullcontext():
            for direction in directions:
                total = sum((weight(owner.weight).square() * direction).sum() for weight in weights)
                total.backward()
                assert not once or weights[0](owner.weight) is weights[0](owner.weight)
        found.append(weights[0].shift.grad)
        assert not torch.equal(weights[0](owner.weight), owner.weight)  # computed anew after the block
    torch.testing.assert_close(found[1], found[0])


def test_hidden_positions_do_not_count():
    wanted, logits = torch.randn(2, 2, 5, 7, generator=seeded(3))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    plain, gradient = divergence(logits[:, :3], wanted[:, :3])
    value, padded = divergence(logits, wanted, mask)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(padded[:, :3], gradient)
    assert not padded[:, 3:].any()


def test_the_divergence_s_gradient_is_autograd_s():
    wanted, logits = torch.randn(2, 2, 5, 7, generator=seeded(4))
    logits.requires_grad_()
    targets = wanted.log_softmax(-1)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), targets, log_target=True, reduction="sum") / 10
    expected.backward()
    value, gradient = divergence(logits.detach(), wanted)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, logits.grad)


def test_the_same_seed_gives_the_same_scales():
    model = seed_weights(TiedLanguageModel()).eval()
    allocation, start = rounded(model, "int3-channel")
    one, two = (
        tune_scales(model, allocation, start, TOKENS, next_token_loss, Tuning(steps=3, samples=3)) for _ in range(2)
    )
    assert all(torch.equal(one[name].scales, two[name].scales) for name in start)


def test_texts_that_come_time_first_are_tuned_by_text():
    tokens = torch.randint(0, 9, (8, 7), generator=seeded(6))

    def by_text(model, batch):
        return torch.nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def by_time(model, batch):
        return by_text(lambda tokens: model(tokens.T).transpose(0, 1), batch.T)

    found = []
    for model, data, loss_fn in ((Tagger(True), tokens, by_text), (Tagger(False), tokens.T, by_time)):
        allocation, start = rounded(model.eval(), "int3-channel")
        found.append(tune_scales(model, allocation, start, [data], loss_fn, Tuning(steps=3, samples=3)))
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name].scales, one.scales)


def test_tuning_for_no_steps_gives_the_simulated_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, (2, 3)), nn.Flatten(), nn.LazyLinear(5))
    inputs = torch.randn(2, 3, 8, 8, generator=seeded(5))
    model(inputs)
    allocation, start = rounded(model.eval(), "int3-channel")
    student, _ = _student(model, allocation, start)
    torch.testing.assert_close(student(inputs), simulate(model, allocation, trainable=False)(inputs))
