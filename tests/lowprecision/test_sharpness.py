import pytest
import torch
from torch.nn import functional

from mpq.lowprecision.sharpness import logit_sharpness, sharpness, sharpness_by_search
from mpq.models import bundled_model
from mpq.network.calibration import seeded


@pytest.mark.parametrize(("classes", "epsilon"), [(50, 1e-3), (50, 1e-1), (1000, 1e-3), (1000, 1e-1)])
def test_no_search_finds_more_and_a_good_one_little_less(classes, epsilon):
    logits = 3 * torch.randn(10, classes, generator=seeded(0, classes))
    targets = torch.randint(0, classes, (10,), generator=seeded(1, classes))
    exact, found = sharpness(logits, targets, epsilon), sharpness_by_search(logits, targets, epsilon)
    assert (found <= exact * (1 + 1e-9)).all()
    assert (found >= exact * (1 - 1e-3)).all()


def test_no_corner_of_the_box_is_worse():
    logits, targets = 2 * torch.randn(1, 6, generator=seeded(2)), torch.tensor([4])
    radius = 0.3 * (logits.abs() + 1)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6)
    losses = functional.cross_entropy(logits + corners * radius, targets.expand(64), reduction="none")
    before = functional.cross_entropy(logits, targets)
    expected = 100 * (losses.max() - before) / (1 + before)
    assert sharpness(logits, targets, 0.3).item() == pytest.approx(expected.item(), rel=1e-5)


def test_of_a_model_it_is_that_of_its_last_logits():
    model = bundled_model("tiny-lm")
    tokens = torch.randint(0, 1024, (3, 12), generator=seeded(3))
    with torch.no_grad():
        logits = model(tokens)[:, -2]
    torch.testing.assert_close(logit_sharpness(model, tokens), sharpness(logits, tokens[:, -1]), rtol=1e-4, atol=1e-6)
