"""The policy finds known optima, meets costs, converges, and resumes."""

import numpy as np
import pytest
import torch

from mpq.core.errors import MpqError
from mpq.network.calibration import seeded
from mpq.search.controller import Controller, Schedule

DECISIONS, OPTIONS = 20, 4
BITS = torch.tensor([2.0, 4.0, 6.0, 8.0])


def known_optimum(seed: int):
    """The best options and costs (decisions, options) as shares of a target that the best options meet exactly."""
    best = torch.randint(0, OPTIONS, (DECISIONS,), generator=seeded(seed, "best"))
    macs = torch.rand(DECISIONS, generator=seeded(seed, "macs")) + 0.5
    costs = macs[:, None] * BITS
    return best.numpy(), (costs / costs[torch.arange(DECISIONS), best].sum()).numpy()


def distance(choices, best) -> float:
    """Quality: minus the mean distance of the options to the best ones."""
    return -float(np.abs(choices - best).mean())


def search(seed: int, schedule: Schedule, quality=distance) -> tuple[Controller, np.ndarray, float]:
    best, costs = known_optimum(seed)
    controller = Controller(DECISIONS, OPTIONS, schedule, seed)
    for _ in range(schedule.steps):
        choices = controller.sample()
        controller.update(choices, quality(choices, best), costs[np.arange(DECISIONS), choices].sum())
    return controller, best, float(costs[np.arange(DECISIONS), controller.best()].sum())


def test_known_optima_are_found_in_2000_steps_within_cost_and_with_certainty():
    found = [search(seed, Schedule(steps=1950)) for seed in range(10)]
    assert sum(np.array_equal(controller.best(), best) for controller, best, _ in found) >= 9
    assert max(abs(cost - 1) for _, _, cost in found) < 0.03
    assert max(controller.entropy for controller, _, _ in found) < 0.05


def test_the_entropy_penalty_is_what_makes_the_policy_certain():
    without = [search(seed, Schedule(steps=1000, entropy_weight=0))[0].entropy for seed in range(2)]
    with_it = [search(seed, Schedule(steps=1000))[0].entropy for seed in range(2)]
    assert max(with_it) < min(without) / 2


def test_the_gradient_is_reinforce_with_the_baseline_of_before():
    controller = Controller(2, 3, Schedule(steps=10, delay=0.1, rate=0.0, entropy_weight=0.3, decay=0.5, cost_weight=2))
    controller.update([0, 1], 1.0, 1.5)  # uniform: sets the baseline to 1 - 2 * 0.5 = 0
    assert controller.baseline == 0
    with torch.no_grad():
        controller.logits.copy_(torch.tensor([[0.1, -0.2, 0.5], [1.0, 0.0, -1.0]]))
    p = controller.probabilities
    controller.update([2, 0], 3.0, 0.75)  # reward 3 - 2 * 0.25 = 2.5, advantage 2.5 - 0
    chosen = torch.eye(3)[[2, 0]]
    entropy = torch.special.entr(p).sum(1, keepdim=True)
    weight = controller.schedule.entropy_at(1)
    expected = -2.5 * (chosen - p) - weight * p * (p.log() + entropy)
    torch.testing.assert_close(controller.logits.grad, expected)
    assert controller.baseline == 1.25


def test_the_delay_samples_uniformly_and_freezes_the_policy():
    controller = Controller(50, 4, Schedule(steps=400, delay=0.5))
    samples = []
    for _ in range(200):
        samples.append(controller.sample())
        controller.update(samples[-1], float(samples[-1].mean()), 1.0)
    counts = np.bincount(np.concatenate(samples), minlength=4) / 10000
    assert abs(counts - 0.25).max() < 5 * (0.25 * 0.75 / 10000) ** 0.5  # five standard errors
    assert controller.logits.detach().abs().max() == 0
    controller.update(controller.sample(), 1.0, 1.0)
    assert controller.logits.detach().abs().max() > 0


def test_entropy_schedules_end_at_the_same_weight():
    for kind, half in (("cosine", 0.2), ("linear", 0.2), ("step", 0.4), ("constant", 0.4)):
        schedule = Schedule(steps=120, delay=1 / 6, entropy_weight=0.4, entropy=kind)
        assert schedule.entropy_at(120) == pytest.approx(0.4)
        assert schedule.entropy_at(70) == pytest.approx(half)
        assert schedule.entropy_at(20) == (0.4 if kind == "constant" else 0)
    with pytest.raises(MpqError, match="unknown entropy schedule 'cosin': did you mean cosine"):
        Schedule(entropy="cosin")


def test_the_policy_is_fixed_when_the_schedule_is_over():
    controller = Controller(3, 2, Schedule(steps=20, delay=0.1))
    for _ in range(20):
        controller.update(controller.sample(), float(controller.step % 3), 1.0)
    assert controller.is_fixed
    logits = controller.logits.detach().clone()
    controller.update(controller.sample(), 5.0, 1.0)
    assert torch.equal(controller.logits, logits)


def test_the_entropy_weight_follows_half_a_cosine():
    schedule = Schedule(steps=120, delay=1 / 6, entropy_weight=0.4)
    assert [schedule.entropy_at(step) for step in (0, 20, 70, 120, 500)] == pytest.approx([0, 0, 0.2, 0.4, 0.4])


def test_resuming_a_checkpoint_gives_identical_results(tmp_path):
    best, costs = known_optimum(3)

    def run(controller, steps):
        for _ in range(steps):
            choices = controller.sample()
            controller.update(choices, distance(choices, best), costs[np.arange(DECISIONS), choices].sum())
        return controller

    schedule = Schedule(steps=60)
    whole = run(Controller(DECISIONS, OPTIONS, schedule, 5), 60)
    torch.save(run(Controller(DECISIONS, OPTIONS, schedule, 5), 33).state_dict(), tmp_path / "c")
    resumed = Controller(DECISIONS, OPTIONS, schedule, 5)
    resumed.load_state_dict(torch.load(tmp_path / "c", weights_only=True))
    assert torch.equal(run(resumed, 27).logits, whole.logits)
    with pytest.raises(MpqError, match="another schedule or seed"):
        Controller(DECISIONS, OPTIONS, schedule, 6).load_state_dict(whole.state_dict())
    with pytest.raises(MpqError, match="decisions and options"):
        Controller(2, OPTIONS, schedule, 5).load_state_dict(whole.state_dict())


def test_nan_qualities_are_skipped():
    controller = Controller(3, 2, Schedule(steps=10, delay=0.0))
    controller.update([0, 0, 0], 1.0, 1.0)
    before = controller.logits.detach().clone()
    controller.update([1, 1, 1], float("nan"), 1.0)
    assert torch.equal(controller.logits, before)
    assert controller.baseline == 1.0
    assert controller.step == 2


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"delay": 1.0}, {"rate": -1.0}, {"decay": 1.0}])
def test_invalid_schedules_are_refused(wrong):
    with pytest.raises(MpqError, match="invalid schedule"):
        Schedule(**wrong)
