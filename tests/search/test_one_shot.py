"""The search drops into a training loop, counts costs right, and leaves the model as it was."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.core.costs import bitops
from mpq.core.errors import MpqError
from mpq.core.scheme import parse_scheme
from mpq.network.calibration import cross_entropy, seeded
from mpq.network.layers import find_layers
from mpq.network.macs import count_macs
from mpq.search.controller import Schedule
from mpq.search.one_shot import OneShot
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


def loop(model, search, batches, steps, optimizer=None):
    for step in range(steps):
        inputs, labels = batches[step % len(batches)]
        with search.sample():
            loss = functional.cross_entropy(model(inputs), labels)
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        search.update(quality=-loss.item())


def test_costs_are_shares_of_the_target_in_bit_operations():
    model, batches = seed_weights(Convolutions()).eval(), class_batches((4, 6, 6))
    search = OneShot(model, SPACE, cost="bitops", target=0.25)
    with pytest.raises(MpqError, match="cost nothing so far"):
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
    """One layer of four carries the answer: it must get the wide format when not all can have it."""
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
    allocation = search.allocation()
    assert abs(allocation.provenance["cost_over_target"] - 1) < 0.1
    with search.chosen() as schemes:
        accuracy = (model(inputs).argmax(1) == labels).float().mean()
    assert tuple(scheme.name for scheme in schemes) == allocation.schemes
    assert accuracy > 0.85
    assert len(search.history) == 300


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
    with pytest.raises(MpqError, match=r"puts the tied layers block1\.qkv in different blocks"):
        shared(blocks=r"block1\.q")
    with pytest.raises(MpqError, match="matches no layer"):
        shared(blocks="layer")
    with pytest.raises(MpqError, match="invalid regular expression"):
        shared(blocks="(")


def test_ctrl_c_loses_nothing_but_the_running_step(tmp_path):
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
        ({"cost": "bitop"}, "unknown cost 'bitop'"),
        ({"cost": "size", "target": 0.05}, r"a target of 0.05 cannot be reached: these schemes cost 0\.\d+ to 1"),
        ({"cost": "size", "target": 1.5}, "cannot be reached"),
        ({"include": "nothing"}, "matches nothing"),
    ],
)
def test_mistakes_are_told(wrong, message):
    with pytest.raises(MpqError, match=message):
        OneShot(seed_weights(Convolutions()), **{"space": SPACE, **wrong})


def test_unreachable_bit_operations_are_told_at_the_first_pass():
    model, ((inputs, _), *_) = seed_weights(Convolutions()), class_batches((4, 6, 6))
    search = OneShot(model, SPACE, target=0.01)
    with pytest.raises(MpqError, match=r"cannot be reached: these schemes cost 0\.0625 to 1"), search.sample():
        model(inputs)


def test_update_wants_a_sample():
    search = OneShot(seed_weights(Convolutions()), SPACE)
    with pytest.raises(MpqError, match="no sample to update from"):
        search.update(quality=1.0)


def test_any_cost_can_be_searched():
    model = Blocks()
    search = OneShot(model, ("int4", "int8"), lambda layer, scheme: scheme.weight.grid.bits - 2, target=0.5)
    assert search.cost_of(np.zeros(6, int)) == pytest.approx(2 / 6 / 0.5)
