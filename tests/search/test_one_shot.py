"""One-shot search in a training loop: costs, final choice, and an unchanged model."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.core.costs import bitops
from mpq.core.errors import MpqError
from mpq.core.hardware import Machine
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import cross_entropy, seeded
from mpq.network.layers import find_layers
from mpq.network.macs import count_macs
from mpq.search.controller import Schedule
from mpq.search.one_shot import OneShot
from mpq.search.repair import likeliest_within
from tests.one_shot_loop import loop
from tests.sensitivity.small_models import Convolutions, class_batches, seed_weights

SPACE = ("int2-channel+a:int2", "int4-channel+a:int4", "fp8-e4m3-channel+a:fp8-e4m3")


class Blocks(nn.Module):
    """Two blocks of attention-like siblings: (n, 6) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block1 = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.block2 = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in (self.block1, self.block2):
            x = x + block["o_proj"](torch.tanh(block["q_proj"](x) * block["k_proj"](x) + block["v_proj"](x)))
        return self.head(x)


def test_costs_are_shares_of_the_target_in_bit_operations():
    model, batches = seed_weights(Convolutions()).eval(), class_batches((4, 6, 6))
    search = OneShot(model, SPACE, cost="bitops", target=0.25)
    with pytest.raises(MpqError, match="are not counted yet"):
        search.allocation()
    loop(model, search, batches, 1)
    layers = count_macs(model, find_layers(model), batches[0], cross_entropy)
    assert search.layers == layers
    dearest = sum(bitops(parse_scheme(SPACE[2]), layer.macs) for layer in layers)
    choices = [0, 1, 2, 1]
    cost = sum(bitops(parse_scheme(SPACE[c]), layer.macs) for c, layer in zip(choices, layers, strict=True))
    assert search.cost_of(choices) == pytest.approx(cost / (0.25 * dearest))
    assert search.cost_of([1, 1, 1, 1]) == pytest.approx(1.0)  # 4 * 4 bit operations are a quarter of 8 * 8
    assert search.allocation().layers == layers


def test_a_search_in_a_training_loop_keeps_accuracy_and_meets_the_target():
    """One layer of four determines the output: it must get the wide format when not all can have it."""
    generator = seeded(7)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    seed_weights(model, 0.4)
    inputs = torch.randn(256, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 4, generator=generator)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    search = OneShot(
        model, ("int2-channel", "int4-channel", "int8-channel"), cost="size", target=0.6,
        schedule=Schedule(steps=300, rate=0.05), seed=1, method="mse",
    )  # fmt: skip
    loop(model, search, [(inputs, labels)], 300, optimizer)
    logits = search.controller.logits.detach().clone()
    loop(model, search, [(inputs, labels)], 60, optimizer)  # the weights settle in the final choice
    assert torch.equal(search.controller.logits, logits)
    allocation = search.allocation()
    assert 0.7 < allocation.provenance["cost_over_target"] <= 1
    assert abs(allocation.provenance["likeliest_over_target"] - 1) < 0.1
    assert all(step.choices == search.history[-1].choices for step in search.history[300:])
    with search.chosen() as schemes:
        accuracy = (model(inputs).argmax(1) == labels).float().mean()
    assert tuple(scheme.name for scheme in schemes) == allocation.schemes
    assert accuracy > 0.85
    assert len(search.history) == 360


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("method", ["nearest", "mse"])
def test_what_is_exported_is_what_was_trained(method, learned, tmp_path):
    model, batches = seed_weights(Convolutions()).train(), class_batches((4, 6, 6))
    space = ("int2-channel+a:int8-token", "fp4-e2m1-channel+a:int8-token", "int4-channel+a:int8-token")
    search = OneShot(model, space, target=0.7, method=method, learned=learned, schedule=Schedule(steps=6))
    loop(model, search, batches, 8, torch.optim.Adam([*model.parameters(), *search.parameters()], lr=0.01))
    model.eval()
    allocation, rounder = search.allocation(), search.rounder()
    assert allocation.provenance["rounding"] == method
    inputs = batches[0][0]
    with search.chosen():
        expected = model(inputs).detach()
    search.close()
    mpq.export(model, allocation, tmp_path / "out", method=rounder, inputs=inputs)
    loaded = mpq.load(tmp_path / "out", model=Convolutions())
    torch.testing.assert_close(loaded(inputs), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["rounding"] == f"{method}, trained"


def test_the_final_choice_is_the_likeliest_that_uses_the_target():
    model, batches = seed_weights(Convolutions()).eval(), class_batches((4, 6, 6))
    for seed in range(8):
        search = OneShot(model, SPACE, cost="bitops", target=0.3, seed=seed)
        loop(model, search, batches, 1)
        with torch.no_grad():
            search.controller.logits.copy_(torch.randn(4, 3, generator=seeded(seed)))
        every = np.array(list(np.ndindex(3, 3, 3, 3)))
        logs = search.controller.logits.detach().log_softmax(1).numpy()
        best = logs.argmax(1)
        if not 0.97 <= search.cost_of(best) <= 1:
            costs = np.array([search.cost_of(row) for row in every])
            floor = next(floor for floor in (0.97, 0.9, 0.0) if ((costs >= floor) & (costs <= 1)).any())
            within = every[(costs >= floor) & (costs <= 1)]
            best = max(within, key=lambda row: logs[np.arange(4), row].sum())
        allocation = search.allocation()
        assert allocation.schemes == tuple(parse_scheme(SPACE[option]).name for option in best)
        assert allocation.provenance["cost_over_target"] <= 1
        search.close()
    with pytest.raises(MpqError, match="below the cheapest choice"):
        likeliest_within(np.zeros((2, 2)), np.ones((2, 2)), 1.5)


def test_switching_errors_are_losses_of_one_switch_above_the_final_choice():
    model, batches = seed_weights(Convolutions()).eval(), class_batches((4, 6, 6))
    search = OneShot(model, SPACE, target=0.4)
    loop(model, search, batches, 3)

    def loss():
        with torch.no_grad():
            return cross_entropy(model, batches[0]).item()

    errors = search.switching_errors(loss)
    names = [parse_scheme(name) for name in SPACE]
    with search.chosen() as schemes:
        start = loss()
    best = [names.index(scheme) for scheme in schemes]
    assert errors.shape == (4, 3)
    assert (errors[np.arange(4), best] == 0).all()
    other = (best[2] + 1) % 3
    quantization = search.quantization
    wanted = {layer.name: scheme for layer, scheme in zip(search.layers, schemes, strict=True)}
    quantization.use(wanted | {search.layers[2].name: names[other]})
    assert errors[2, other] == pytest.approx(loss() - start)
    quantization.use({})


@pytest.mark.parametrize(("cost", "share"), [("area", 48 / 96), ("latency", 0.5)])
def test_costs_of_hardware_are_counted_with_the_multiplications(cost, share):
    model, batches = seed_weights(Convolutions()).eval(), class_batches((4, 6, 6))
    machine = Machine(bytes_per_second=1e30)  # multiplications alone
    search = OneShot(
        model,
        ("int4-channel+a:int4", "int8-channel+a:int8"),
        machine.seconds if cost == "latency" else cost,
        target=1.0,
    )
    loop(model, search, batches, 1)
    assert search.cost_of([1, 1, 1, 1]) == pytest.approx(1)
    assert search.cost_of([0, 0, 0, 0]) == pytest.approx(share)


def test_the_model_outside_of_samples_is_untouched():
    model, ((inputs, labels), *_) = seed_weights(Convolutions()).eval(), class_batches((4, 6, 6))
    before, state = model(inputs), set(model.state_dict())
    search = OneShot(model, SPACE)
    with pytest.raises(KeyError), search.sample():
        raise KeyError
    loop(model, search, [(inputs, labels)], 2)
    assert torch.equal(model(inputs), before)
    assert set(model.state_dict()) == state
    search.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_ties_and_blocks_share_a_decision():
    model = Blocks()
    names = [layer.name for layer in find_layers(model)]

    def shared(**options):
        groups = OneShot(model, SPACE, cost="size", target=0.5, **options).groups
        return [[names[index] for index in group] for group in groups]

    qkv = [[f"block{i}.{name}_proj" for name in "qkv"] for i in (1, 2)]
    assert shared() == [["stem"], qkv[0], ["block1.o_proj"], qkv[1], ["block2.o_proj"], ["head"]]
    assert shared(blocks=r"block\d") == [["stem"], [*qkv[0], "block1.o_proj"], [*qkv[1], "block2.o_proj"], ["head"]]
    with pytest.raises(MpqError, match=r"puts the tied layers block1\.qkv, which share a scheme, in different blocks"):
        shared(blocks=r"block1\.q")
    with pytest.raises(MpqError, match="matches no layer"):
        shared(blocks="layer")
    with pytest.raises(MpqError, match="invalid regular expression"):
        shared(blocks="(")


def test_an_interrupt_loses_only_the_running_step(tmp_path):
    def start():
        model = seed_weights(Convolutions()).train()
        model.drop.p = 0.0
        schedule = Schedule(steps=30, delay=0.2)
        search = OneShot(
            model, ("int2-channel+a:int4", "int4-channel+a:int4"), schedule=schedule, target=0.7, learned=True
        )
        optimizer = torch.optim.Adam([*model.parameters(), *search.parameters()], lr=0.01)
        return model, search, optimizer

    batches = class_batches((4, 6, 6))
    model, search, optimizer = start()
    loop(model, search, batches, 20, optimizer)
    parts = (model, search, optimizer)
    torch.save([part.state_dict() for part in parts], tmp_path / "checkpoint")
    loop(model, search, batches, 10, optimizer)
    expected = search.controller.logits.detach().clone()
    again = start()
    for part, state in zip(again, torch.load(tmp_path / "checkpoint", weights_only=True), strict=True):
        part.load_state_dict(state)
    with again[1].sample():  # interrupted before its update
        pass
    loop(again[0], again[1], batches, 10, again[2])
    assert torch.equal(again[1].controller.logits, expected)
    assert again[1].allocation().schemes == search.allocation().schemes
    for part, other in zip((again[0], again[1].quantization), (model, search.quantization), strict=True):
        ours, theirs = part.state_dict(), other.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"space": ("int4",)}, "at least two schemes"),
        ({"cost": "bitop"}, "unknown cost 'bitop': did you mean bitops"),
        ({"cost": "size", "target": 0.05}, r"a target of 0.05 cannot be reached: these schemes cost 0\.\d+ to 1"),
        ({"cost": "size", "target": 1.5}, "cannot be reached"),
        ({"include": "nothing"}, "matches nothing"),
    ],
)
def test_invalid_arguments_are_refused(wrong, message):
    with pytest.raises(MpqError, match=message):
        OneShot(seed_weights(Convolutions()), **{"space": SPACE, **wrong})


def test_unreachable_bit_operations_are_reported_at_the_first_pass():
    model, ((inputs, _), *_) = seed_weights(Convolutions()), class_batches((4, 6, 6))
    search = OneShot(model, SPACE, target=0.01)
    with pytest.raises(MpqError, match=r"cannot be reached: these schemes cost 0\.0625 to 1"), search.sample():
        model(inputs)


def test_update_needs_a_sample():
    search = OneShot(seed_weights(Convolutions()), SPACE)
    with pytest.raises(MpqError, match="no sample to update from"):
        search.update(quality=1.0)


def test_any_cost_can_be_searched():
    model = Blocks()
    search = OneShot(model, ("int4", "int8"), lambda layer, scheme: scheme.weight.grid.bits - 2, target=0.5)
    assert search.cost_of(np.zeros(6, int)) == pytest.approx(2 / 6 / 0.5)
