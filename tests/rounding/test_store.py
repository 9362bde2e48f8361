"""Each layer is rounded once in each format, and files store exactly the rounded values."""

import torch
from small_cnn import images, small_cnn

from mpq.core.allocation import Allocation
from mpq.core.formats import parse_format
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import cross_entropy
from mpq.network.layers import find_layers
from mpq.network.moments import second_moments
from mpq.quantized import simulate
from mpq.rounding.reference import dequantize, quantize
from mpq.rounding.store import Finished, RoundingStore, moments_needed
from mpq.sensitivity.profile import profile
from mpq.trial import Trial


def allocation(model, *schemes):
    return Allocation(find_layers(model), schemes)


def test_a_layer_is_rounded_once_and_simulated_alike_from_memory_and_from_files():
    model = small_cnn()
    wanted = allocation(model, "int3-channel", "int4-g32", "int2-g32-asym")
    moments = second_moments(model, wanted.layers, images(), cross_entropy)
    expected = simulate(model, wanted, "gptq", moments, trainable=False).state_dict()
    for limit in (2**30, 0):
        store = RoundingStore("gptq", moments, limit)
        for _ in range(2):
            found = simulate(model, wanted, store, trainable=False).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        layer = wanted.layers[0]
        weight, scheme = model[0].weight.flatten(1), wanted.scheme_of[layer.name]
        first = store.quantized(layer, weight, scheme)
        again = store.quantized(layer, weight * 7, scheme)  # not rounded again
        assert torch.equal(dequantize(again), dequantize(first))
        assert bool((dequantize(first) != weight).any())


def test_a_layer_s_moment_is_one_tensor_for_all_formats():
    """Its factor is reused only for the same tensor."""
    seen = []

    def method(weight, format, moment):
        seen.append(moment)
        return quantize(weight, format)

    model = small_cnn()
    layers = find_layers(model)[:2]
    moments = {layers[0].name: torch.eye(layers[0].cols)[None]}
    store = RoundingStore(method, moments.items(), limit=0)
    for layer in (*layers, layers[0]):
        for name in ("int3-channel", "int4-channel"):
            weight = model.get_submodule(layer.name).weight.flatten(1) + len(seen)  # not rounded before
            store._rounded.clear()
            store.quantized(layer, weight, parse_scheme(name))
    first, second, third, fourth, fifth, sixth = seen
    assert first is second
    assert third is fourth is None
    assert fifth is sixth
    assert torch.equal(fifth, moments[layers[0].name])


def test_finished_layers_come_before_others_in_their_own_format_alone():
    model = small_cnn()
    one, other = find_layers(model)[:2]
    weight = model.get_submodule(one.name).weight.flatten(1)
    mine = quantize(weight * 3, parse_format("int3-channel"))
    rounder = Finished("tuned", {one.name: mine}, RoundingStore("nearest"))
    assert rounder.quantized(one, weight, parse_scheme("int3-channel")) is mine
    assert rounder.quantized(one, weight, parse_scheme("int4-channel")).format.name == "int4-channel"
    theirs = model.get_submodule(other.name).weight.flatten(1)
    found = rounder.quantized(other, theirs, parse_scheme("int3-channel"))
    assert torch.equal(dequantize(found), dequantize(quantize(theirs, parse_format("int3-channel"))))


def test_stored_layers_take_no_memory():
    """An empty slice of the codes would keep all of them alive."""
    model = small_cnn()
    store = RoundingStore("nearest", None, limit=0)
    simulate(model, allocation(model, "int3-channel", "int4-g32", "int2-g32-asym"), store, trainable=False)
    assert store._rounded
    assert all(tables.codes.untyped_storage().nbytes() == 0 for tables, _ in store._rounded.values())


def test_a_trial_model_takes_several_allocations_in_turn():
    model = small_cnn()
    trial = Trial(model, RoundingStore())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = allocation(model, "int2-g32", "int4-g32", "int8-channel+a:int4-token")
    second = allocation(model, "int2-g32", "int3-channel", "int8-channel")
    inputs = images()[0][0]
    for wanted in (first, second, first):
        expected = simulate(model, wanted, trainable=False)
        assert torch.equal(trial.take_on(wanted)(inputs), expected(inputs))
    moved = trial.take_on(second, {"1": torch.ones(8)})
    assert moved[1].running_mean.tolist() == [1.0] * 8
    assert torch.equal(trial.take_on(second)(inputs), simulate(model, second, trainable=False)(inputs))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_late_moments_are_those_of_the_original_model():
    """Also if the metric rounds inputs while it measures."""
    model, batches = small_cnn(), images()
    layers = find_layers(model)
    late = RoundingStore("gptq", lambda: moments_needed("gptq", model, layers, batches, cross_entropy))
    settings = {"formats": ["int3-channel+a:int4-channel"], "metric": "loss", "progress": False}
    tables = [profile(model, batches, cross_entropy, method=method, **settings) for method in ("gptq", late)]
    assert (tables[0].scores == tables[1].scores).all()
