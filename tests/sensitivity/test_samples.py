"""Batch layouts of metrics: samples first, samples second, or batches that cannot be split."""

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mpq
from mpq.core.errors import MpqError
from mpq.network.calibration import samples_in, seeded, take
from mpq.network.samples import arranged
from tests.sensitivity.small_models import Tagger

FORMATS = ["int2-channel", "int4-channel"]


class Recurrent(nn.Module):
    """Reads (time, samples, 4), or (samples, time, 4) when `batch_first`; the classes of each sample's last step."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.cell = nn.RNN(6, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 3)
        self.batch_first = batch_first

    def forward(self, x):
        """(samples, 3)."""
        hidden, _ = self.cell(self.first(x))
        return self.head(hidden[:, -1] if self.batch_first else hidden[-1])


def last_step(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def scores(model, batches, loss_fn, metric, **options):
    return mpq.profile(model, batches, loss_fn, FORMATS, metric=metric, progress=False, options=options).scores


@pytest.mark.parametrize("metric", ["kl-curvature", "kronecker", "fisher", "output", "gradient", "quadratic", "loss"])
@pytest.mark.parametrize("samples", [3, 5])  # as many as steps, too
def test_time_first_batches_have_the_scores_of_samples_first(metric, samples):
    inputs, labels = torch.randn(samples, 5, 4, generator=seeded(0)), torch.arange(samples) % 3
    random = metric in ("kl-curvature", "quadratic")
    options = {"draws": 100} if random else {}
    own = scores(Recurrent(True), [(inputs, labels)], last_step, metric, **options)
    other = scores(Recurrent(False), [(inputs.transpose(0, 1), labels)], last_step, metric, **options)
    np.testing.assert_allclose(other, own, rtol=0.3 if random else 1.0 if metric == "kronecker" else 1e-3)


@pytest.mark.parametrize("metric", ["kl-curvature", "fisher", "output"])
def test_time_first_language_models_have_the_scores_of_samples_first(metric):
    tokens = torch.randint(0, 9, (3, 7), generator=seeded(1))

    def first(model, batch):
        return functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def second(model, batch):
        return functional.cross_entropy(model(batch)[:-1].flatten(0, 1), batch[1:].flatten())

    options = {"draws": 100} if metric == "kl-curvature" else {}
    own = scores(Tagger(True), [tokens], first, metric, **options)
    other = scores(Tagger(False), [tokens.T.contiguous()], second, metric, **options)
    np.testing.assert_allclose(other, own, rtol=0.4 if metric == "kl-curvature" else 1e-3)


class Towers(nn.Module):
    """An embedding (samples, 5) of tokens (samples, time), whose layers see samples and time as one dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Unit vectors."""
        hidden = self.out(self.embed(tokens).flatten(0, 1)).unflatten(0, tokens.shape).mean(1)
        return functional.normalize(hidden, dim=-1)


def contrastive(model, batch):
    similar = model(batch[0]) @ model(batch[1]).T / 0.2
    return functional.cross_entropy(similar, torch.arange(len(similar)))


def test_contrastive_losses_are_detected_and_never_split(caplog):
    pairs = [tuple(torch.randint(0, 9, (4, 3), generator=seeded(2, name)) for name in "ab")]
    with caplog.at_level(logging.WARNING), pytest.raises(MpqError, match="take a metric of whole batches"):
        scores(Towers(), pairs, contrastive, "kl-curvature")
    assert "not the mean of its samples' losses" in caplog.text
    assert scores(Towers(), pairs, contrastive, "loss").any()
    assert (scores(Towers(), pairs, contrastive, "hessian") > 0).all()


def test_interacting_samples_are_detected(caplog):
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0), nn.Softmax(0))
    assert arranged(model, (torch.randn(5, 4),), lambda model, batch: model(batch).square().mean()).together
    assert "not the mean of its samples' losses" in caplog.text


def test_a_loss_that_takes_no_single_sample_takes_whole_batches(caplog):
    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]).view(5, 3), batch[1])

    batch = (torch.randn(5, 4, generator=seeded(3)), torch.arange(5) % 3)
    assert arranged(nn.Linear(4, 3), (batch,), loss).together
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0), nn.Unflatten(0, (5, 3)))
    for metric in ("kl-curvature", "hessian", "loss"):
        assert (scores(model, [batch], loss, metric) != 0).all()


def test_images_of_several_sizes_take_whole_batches():
    """A list of images, whose first dimension is not the samples'."""

    class Each(nn.Sequential):
        def forward(self, images):
            return torch.stack([super(Each, self).forward(image[None])[0] for image in images])

    model = Each(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    batch = {"images": [torch.randn(3, size, size, generator=seeded(size)) for size in (8, 6)], "y": torch.arange(2)}
    for metric in ("hessian", "loss"):
        found = scores(model, [batch], lambda m, b: functional.cross_entropy(m(b["images"]), b["y"]), metric)
        assert (found != 0).all()


def test_samples_without_labels_do_not_hide_that_batches_can_be_cut(caplog):
    batch = (torch.randn(5, 4, generator=seeded(3)), torch.tensor([-100, -100, 0, 1, 2]))
    samples = arranged(nn.Linear(4, 3), (batch,), last_step)
    assert not samples.together
    assert not samples.second
    assert not caplog.text


def test_a_random_loss_is_reported(caplog):
    def noisy(model, batch):
        return model(batch).square().mean() * torch.rand(())

    assert not arranged(nn.Linear(4, 3), (torch.randn(5, 4),), noisy).together
    assert "the loss is random" in caplog.text


def test_a_sum_over_samples_is_refused():
    with pytest.raises(MpqError, match="return their mean"):
        arranged(nn.Linear(4, 3), (torch.randn(5, 4),), lambda model, batch: model(batch).square().sum())


@dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    name: str = "one"


def test_batches_may_be_dataclasses():
    batch = Record(torch.randn(5, 4, generator=seeded(3)), torch.arange(5) % 3)
    assert samples_in(batch) == 5
    few = take(batch, slice(0, 2))
    assert (len(few.x), len(few.y), few.name) == (2, 2, "one")
    model = nn.Sequential(nn.Linear(4, 3))
    own = scores(model, [batch], lambda model, batch: last_step(model, (batch.x, batch.y)), "fisher")
    np.testing.assert_array_equal(own, scores(model, [(batch.x, batch.y)], last_step, "fisher"))


def test_a_batch_of_another_kind_is_reported():
    with pytest.raises(MpqError, match="calibration batch 0, a object, holds no tensor"):
        scores(nn.Sequential(nn.Linear(4, 3)), [object()], last_step, "loss")


def test_numbers_beside_the_samples_do_not_count_as_samples():
    batch = {"temperature": torch.ones(1), "x": torch.randn(5, 4), "y": torch.arange(5) % 3}
    assert samples_in(batch) == 5
    assert take(batch, slice(0, 2))["temperature"].shape == (1,)


def test_logits_may_be_an_entry_of_a_mapping():
    class Named(nn.Sequential):
        def forward(self, x):
            return {"logits": super().forward(x), "x": x}

    batch = (torch.randn(5, 4, generator=seeded(3)), torch.arange(5) % 3)
    plain = nn.Sequential(nn.Linear(4, 3))
    found = scores(
        Named(*plain), [batch], lambda m, b: functional.cross_entropy(m(b[0])["logits"], b[1]), "kl-curvature"
    )
    np.testing.assert_array_equal(found, scores(plain, [batch], last_step, "kl-curvature"))


class ClassesLast(nn.Module):
    """A segmentation network whose logits are (samples, height, width, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).movedim(1, -1)


@pytest.mark.parametrize(
    ("metric", "room"),
    [("kl-curvature", 0.3), ("kronecker", 0.3), ("divergence", 1e-3), ("wrong", 1e-3), ("loss", 1e-3)],
)
def test_segmentation_has_the_scores_of_classes_last(metric, room):
    """Classes as the second dimension, (samples, classes, height, width), are what cross_entropy takes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    batch = torch.randn(4, 2, 6, 7, generator=seeded(4)), torch.randint(0, 5, (4, 6, 7), generator=seeded(5))

    def second(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    def last(model, batch):
        return functional.cross_entropy(model(batch[0]).flatten(0, 2), batch[1].flatten())

    found, known = scores(model, [batch], second, metric), scores(ClassesLast(model), [batch], last, metric)
    assert found.any()
    np.testing.assert_allclose(found, known, rtol=room, atol=1e-6)
