"""Re-estimated running means are the means of the rounded network's activations; nothing else changes."""

import torch
from torch import nn

from mpq.network.batchnorm import estimate_means, put_means, with_means
from mpq.network.calibration import cross_entropy, seeded
from tests.small_cnn import images


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(20, 4),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.5, generator=seeded(0, name))
    return model.eval()


def test_means_are_estimated_layer_after_layer():
    model, batch = network(), images(1, 32)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    means = estimate_means(model, [batch], cross_entropy)
    first = model[0](batch[0])
    torch.testing.assert_close(means["1"], first.mean((0, 2, 3)))
    normalized = nn.functional.batch_norm(first, None, None, model[1].weight, model[1].bias, training=True)
    torch.testing.assert_close(means["4"], model[3](normalized.relu()).mean((0, 2, 3)))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model[1].momentum == 0.1


def test_the_number_of_samples_is_limited_and_single_samples_are_skipped():
    model, (first, second) = network(), images(2, 8)
    whole = estimate_means(model, [first], cross_entropy)
    few = estimate_means(model, [first, second], cross_entropy, samples=8)
    assert torch.equal(few["1"], whole["1"])
    one = estimate_means(model, [(first[0][:1], first[1][:1])], cross_entropy)
    assert one == {}
    assert estimate_means(nn.Linear(2, 2), [torch.ones(4, 2)], lambda model, batch: model(batch)) == {}


def test_a_corrected_copy_shares_its_parameters():
    model = network()
    corrected = with_means(model, {"1": torch.full((4,), 3.0)})
    assert corrected[0].weight is model[0].weight
    assert corrected[1].running_mean.tolist() == [3.0] * 4
    assert model[1].running_mean.tolist() == [0.0] * 4
    assert with_means(model, {}) is model
    put_means(model, {"4": torch.ones(5)})
    assert model[4].running_mean.tolist() == [1.0] * 5
