"""Fine-tuning in stages: groups of layers, quantized layers of each stage, and the order of `finetune`."""

import pytest
import torch

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.finetuning import finetune
from mpq.network.calibration import cross_entropy
from mpq.network.layers import find_layers
from mpq.quantized import rounding_of, simulate
from mpq.sensitivity.eigenvalue import fine_tuning_order
from mpq.training.settings import Finetuning
from mpq.training.stages import quantize_only, stages
from tests.sensitivity.small_models import Convolutions, TiedLanguageModel, class_batches, seed_weights, token_batches

SCHEME = "int2-channel+a:int4-token"


def setting():
    model = seed_weights(Convolutions()).eval()
    layers = find_layers(model)  # first, depthwise, line, head
    return model, Allocation(layers, (SCHEME,) * len(layers))


def test_runs_are_nearly_equal_and_lose_nothing():
    order = tuple("abcdefg")
    for count in range(1, 8):
        runs = stages(order, count)
        assert sum(runs, ()) == order
        assert len(runs) == count
        assert max(map(len, runs)) - min(map(len, runs)) <= 1
    with pytest.raises(MpqError, match="invalid number of stages 8: expected 1 to 7"):
        stages(order, 8)


def test_only_the_named_layers_compute_in_their_schemes():
    model, allocation = setting()
    images = class_batches((4, 6, 6))[0][0]
    student = simulate(model, allocation).eval()
    whole = student(images)
    quantize_only(student, ())
    torch.testing.assert_close(student(images), model(images))
    quantize_only(student, ("first", "head"))
    partial = simulate(model, Allocation(allocation.layers, (SCHEME, "fp32", "fp32", SCHEME))).eval()
    torch.testing.assert_close(student(images), partial(images))
    quantize_only(student, None)
    assert torch.equal(student(images), whole)


def test_shared_weights_go_by_any_name():
    model = seed_weights(TiedLanguageModel()).eval()
    layers = find_layers(model)
    student = simulate(model, Allocation(layers, ("int2-channel",) * len(layers)))
    for name in ("embed", "head"):
        quantize_only(student, (name,))
        assert rounding_of(student.embed).active
        assert not rounding_of(student.twice).active
    assert torch.equal(student(token_batches()[0]), student(token_batches()[0]))


def test_finetune_quantizes_run_after_run_in_the_order_of_eigenvalue_times_error():
    model, allocation = setting()
    batches = class_batches((4, 6, 6))
    seen = []

    def watching(net, batch):
        if net is not model:
            active = [name for name, module in net.named_modules() if (one := rounding_of(module)) and one.active]
            if not seen or seen[-1] != set(active):
                seen.append(set(active))
        return cross_entropy(net, batch)

    order = fine_tuning_order(model, allocation, batches, cross_entropy)
    settings = Finetuning(steps=6, stages=4, lr=1e-3)
    result = finetune(model, allocation, batches, watching, settings, acceptance=batches[:1])
    everything = set(order)
    assert seen == [everything, *(set(order[: count + 1]) for count in range(4))]
    assert all(rounding_of(result.model.get_submodule(name)).active for name in order)
    given = tuple(reversed(order))
    seen.clear()
    finetune(model, allocation, batches, watching, settings, acceptance=batches[:1], order=given)
    assert seen[1] == {given[0]}
    with pytest.raises(MpqError, match="each of the allocation's 4 once"):
        finetune(model, allocation, batches, watching, settings, order=given[1:])
    with pytest.raises(MpqError, match="stages <= steps"):
        Finetuning(steps=3, stages=4)
