"""Fine-tuning: never worse, resumable with identical results, equal on two processes, and its objective."""

import copy
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

import mpq
from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporting import CHECKED, export_to, few_samples
from mpq.finetuning import finetune
from mpq.network.calibration import cross_entropy, next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.network.samples import Arrangement, arrangement
from mpq.sensitivity.eigenvalue import fine_tuning_order
from mpq.sources import Source
from mpq.training.objective import Objective, block_names, harms, objective_loss
from mpq.training.settings import Finetuning
from tests.sensitivity.small_models import Tagger, TiedLanguageModel, seed_weights, token_batches
from tests.two_processes import on_two_processes

QUICK = Finetuning(steps=6, lr=3e-3, scale_lr=3e-3)


class Normed(nn.Module):
    """A classifier with batch normalization and dropout: (n, 4, 6, 6) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(self.blocks(x).mean((2, 3))))


def uniform(model, scheme):
    layers = find_layers(model)
    return Allocation(layers, (scheme,) * len(layers))


def images(count=8):
    inputs = torch.randn(count, 16, 4, 6, 6, generator=seeded(0, "images"))
    return [(batch, batch.mean((2, 3)).argmax(1).clamp(max=2)) for batch in inputs]


def language_model():
    return seed_weights(TiedLanguageModel()).eval()


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_lowers_the_divergence_and_leaves_the_model_alone(optimizer, learned):
    model = seed_weights(Normed()).eval()
    state = copy.deepcopy(model.state_dict())
    lr = 0.05 if optimizer == "sgd" else 3e-3
    settings = Finetuning(steps=40, lr=lr, optimizer=optimizer, learned=learned)
    result = finetune(model, uniform(model, "int2-channel"), images(), cross_entropy, settings)
    assert result.kept
    assert result.after < 0.6 * result.before
    assert "took the harm on acceptance data from" in result.verdict()
    assert len(result.losses) == 40
    assert not result.model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert any(name.endswith("shift") for name, _ in result.model.named_parameters()) == learned


def test_a_worse_result_is_not_returned():
    model = seed_weights(Normed()).eval()
    allocation, data = uniform(model, "int8-channel"), images()
    start = mpq.simulate(model, allocation)(data[0][0])
    for lr in (0.5, 1e30):
        result = finetune(model, allocation, data, cross_entropy, Finetuning(steps=4, lr=lr))
        assert not result.kept
        assert "the start is kept" in result.verdict()
        torch.testing.assert_close(result.model(data[0][0]), start)


def test_data_for_acceptance_are_held_out():
    model, (batch, *_) = seed_weights(Normed()).eval(), images()
    allocation, seen = uniform(model, "int2-channel"), []

    def watching(net, part):
        seen.append((net.training, len(part[0])))
        return cross_entropy(net, part)

    result = finetune(model, allocation, [batch], watching, QUICK)
    assert {count for training, count in seen if training} == {15}
    assert {count for training, count in seen} == {16, 15, 2, 1}  # two passes find the samples' dimension
    assert result.established
    single = tuple(part[:1] for part in batch)
    alone = finetune(model, allocation, [single], cross_entropy, replace(QUICK, freeze_batchnorm=True))
    assert "Not established on unseen data" in alone.verdict()


def next_step(model, tokens):
    return torch.nn.functional.cross_entropy(model(tokens)[:-1].flatten(0, 1), tokens[1:].flatten())


def test_texts_that_come_time_first_are_held_out_and_compared_whole():
    model, tokens, seen = Tagger(batch_first=False).eval(), torch.randint(0, 9, (7, 20)), []

    def watching(net, part):
        seen.append((net.training, tuple(part.shape)))
        return next_step(net, part)

    allocation = uniform(model, "int2-channel")
    result = finetune(model, allocation, [tokens], watching, QUICK)
    assert {shape for training, shape in seen if training} == {(7, 18)}
    assert result.established
    student = mpq.simulate(model, allocation)
    for objective in (Objective(), Objective(kl=0.0, task=1.0)):
        each = harms(student, model, [tokens], next_step, objective, arrangement(model, [tokens], next_step))
        alone = [
            harms(student, model, [tokens[:, [i]]], next_step, objective, Arrangement(second=True)).item()
            for i in range(20)
        ]
        assert each.tolist() == pytest.approx(alone, rel=1e-4)


def test_the_order_of_fine_tuning_is_the_same_for_texts_that_come_time_first():
    model, tokens = Tagger(batch_first=False).eval(), torch.randint(0, 9, (7, 20))
    allocation, calls = uniform(model, "int2-channel"), []

    def watching(net, part):
        calls.append(tuple(part.shape))
        return next_step(net, part)

    fine_tuning_order(model, allocation, [tokens], watching, samples=4)
    assert (7, 4) in calls
    assert (4, 20) not in calls


def test_a_killed_training_resumes_with_identical_results(tmp_path):
    model = seed_weights(Normed()).eval()
    allocation, data = uniform(model, "int3-channel"), images()
    settings = replace(QUICK, steps=9, save_every=2, accumulate=2, lr="auto")
    expected = finetune(model, allocation, data, cross_entropy, settings)
    path, calls = tmp_path / "unfinished", []

    def killing(model, batch):
        calls.append(1)
        if len(calls) > 60:  # two passes a batch to find its layout, 19 batches, then two a step, to the fifth
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(model, batch)

    child = os.fork()
    if child == 0:
        finetune(model, allocation, data, killing, settings, checkpoint=path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.exists()
    with pytest.raises(MpqError, match=r"another steps \(9, not 10\): remove it"):
        finetune(model, allocation, data, cross_entropy, replace(settings, steps=10), checkpoint=path)
    with pytest.raises(MpqError, match="another data"):
        finetune(model, allocation, data[1:], cross_entropy, settings, checkpoint=path)
    resumed = finetune(model, allocation, data, cross_entropy, settings, checkpoint=path)
    assert resumed.losses == expected.losses
    theirs = expected.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.model.state_dict().items())
    assert not path.exists()
    path.write_bytes(b"nothing")
    with pytest.raises(MpqError, match="is not a checkpoint of a fine-tuning"):
        finetune(model, allocation, data, cross_entropy, settings, checkpoint=path)


def losses_of(rank=None):
    """Losses and outputs of `finetune`, and losses of a custom loop under DistributedDataParallel."""
    model, (tokens, *_) = language_model(), token_batches((4,))
    allocation = uniform(model, "int3-g4")
    result = finetune(model, allocation, token_batches(), next_token_loss, replace(QUICK, accumulate=2))
    student = mpq.simulate(model, allocation, learned=True)
    net = student if rank is None else nn.parallel.DistributedDataParallel(student)
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.5), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = next_token_loss(net, tokens if rank is None else tokens[rank::2])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return result.losses, losses, result.model(token_batches()[0]).detach()


def test_two_processes_have_the_losses_of_one():
    ours, own_loop, outputs = losses_of()
    first, second = on_two_processes(losses_of)
    for losses, _, theirs in (first, second):
        assert losses == pytest.approx(ours, rel=2e-5)
        torch.testing.assert_close(theirs, outputs, rtol=1e-3, atol=1e-4)
    means = [(one + other) / 2 for one, other in zip(first[1], second[1], strict=True)]
    assert means == pytest.approx(own_loop, rel=2e-5)
    assert own_loop[-1] < own_loop[0]


def time_first_losses(rank=None):
    """Losses of `finetune` on texts of 6 tokens that come time-first: 5 in one batch, 4 in the other."""
    model = Tagger(batch_first=False).eval()
    data = [torch.randint(0, 9, (6, count), generator=seeded(count)) for count in (5, 4)]
    settings = replace(QUICK, steps=4, accumulate=2)
    return finetune(model, uniform(model, "int3-channel"), data, next_step, settings, acceptance=data).losses


def test_two_processes_share_texts_that_come_time_first():
    expected = time_first_losses()
    for losses in on_two_processes(time_first_losses):
        assert losses == pytest.approx(expected, rel=1e-3)


def test_exports_are_checked_on_whole_texts_that_come_time_first(tmp_path):
    model, tokens, seen = Tagger(batch_first=False).eval(), torch.randint(0, 9, (7, 20), generator=seeded(0)), []

    def watching(net, part):
        seen.append(tuple(part.shape))
        return next_step(net, part)

    source = Source("tagger", model, (tokens,), (tokens,), watching)
    assert few_samples(source, CHECKED).shape == (7, CHECKED)
    seen.clear()
    export_to("mpq", source, uniform(model, "int4-channel"), tmp_path / "out", "nearest")
    assert seen[-2:] == [(7, CHECKED)] * 2  # the simulated model and the loaded one


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_rate_is_found_from_the_curvature(optimizer):
    model, data = seed_weights(Normed()).eval(), images()
    settings = Finetuning(steps=40, optimizer=optimizer)
    result = finetune(model, uniform(model, "int2-channel"), data, cross_entropy, settings)
    assert result.kept
    assert result.after < 0.6 * result.before
    again = replace(settings, lr=result.lr, momentum=result.momentum)
    theirs = finetune(model, uniform(model, "int2-channel"), data, cross_entropy, again)
    assert theirs.losses == result.losses  # finding the rate changes nothing else


def test_batches_of_a_step_count_as_one_batch():
    model, tokens = language_model(), torch.randint(0, 5, (8, 6), generator=seeded(1))
    allocation = uniform(model, "int3-g4")
    whole = finetune(model, allocation, [tokens], next_token_loss, QUICK, acceptance=[tokens])
    settings = replace(QUICK, accumulate=2)
    parts = finetune(model, allocation, tokens.split(4), next_token_loss, settings, acceptance=[tokens])
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_bfloat16_models_are_trained_in_float32_and_given_back_in_bfloat16(tmp_path):
    model = language_model().to(torch.bfloat16)
    allocation = uniform(model, "int2-g4")
    settings, data = replace(QUICK, bfloat16=True, steps=30, lr=1e-3), token_batches()
    result = finetune(model, allocation, data, next_token_loss, settings, acceptance=data)
    assert result.kept
    numbers = result.model.embed.weight
    assert {parameter.dtype for name, parameter in result.model.named_parameters() if "shift" not in name} == {
        torch.bfloat16
    }
    mpq.export(result.model, allocation, tmp_path / "out")
    loaded = mpq.load(tmp_path / "out", model=TiedLanguageModel().to(torch.bfloat16))
    assert torch.equal(loaded.embed.weight.dequantize().to(numbers.dtype), numbers)


def test_statistics_of_batch_normalization_move_unless_frozen():
    model = seed_weights(Normed()).eval()
    allocation = uniform(model, "int2-channel")
    for frozen in (True, False):
        settings = replace(QUICK, steps=30, freeze_batchnorm=frozen)
        result = finetune(model, allocation, images(), cross_entropy, settings)
        moved = not torch.equal(result.model.blocks[1].running_mean, model.blocks[1].running_mean)
        assert result.kept
        assert moved != frozen


def test_the_objective_is_the_weighted_sum_of_its_parts():
    model, (batch, *_) = seed_weights(Normed()).eval(), images()
    student = mpq.simulate(model, uniform(model, "int2-channel"))
    kl, task, blocks = (
        objective_loss(student, model, batch, cross_entropy, Objective(**weights)).item()
        for weights in ({"kl": 1}, {"kl": 0, "task": 1}, {"kl": 0, "blocks": 1})
    )
    logs, wanted = student(batch[0]).log_softmax(1), model(batch[0]).softmax(1)
    assert kl == pytest.approx((wanted * (wanted.log() - logs)).sum(1).mean().item(), rel=1e-4)
    assert task == pytest.approx(cross_entropy(student, batch).item())
    assert block_names(model) == ("blocks.0", "blocks.1", "blocks.3")
    expected, distances = {}, []
    for name in block_names(model):
        model.get_submodule(name).register_forward_hook(lambda m, i, output, name=name: expected.update({name: output}))
    model(batch[0])
    for name in block_names(model):
        student.get_submodule(name).register_forward_hook(
            lambda m, i, output, name=name: distances.append(
                ((output - expected[name]).square().sum() / expected[name].square().sum()).item()
            )
        )
    student(batch[0])
    assert blocks == pytest.approx(sum(distances) / 3, rel=1e-4)
    both = objective_loss(student, model, batch, cross_entropy, Objective(kl=2, task=0.5, blocks=3)).item()
    assert both == pytest.approx(2 * kl + 0.5 * task + 3 * blocks, rel=1e-4)


def test_a_temperature_softens_both_and_masks_hide_positions():
    model = language_model()
    student = mpq.simulate(model, uniform(model, "int2-g4"))
    tokens = token_batches()[0]
    mask = torch.ones_like(tokens)
    mask[:, 3:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}

    def loss(model, batch):
        return next_token_loss(model, batch["input_ids"])

    hidden = objective_loss(student, model, batch, loss, Objective()).item()
    short = objective_loss(student, model, tokens[:, :3], next_token_loss, Objective()).item()
    assert hidden == pytest.approx(short, rel=1e-4)
    logs, wanted = (net(tokens).div(4).log_softmax(-1) for net in (student, model))
    expected = 16 * (wanted.exp() * (wanted - logs)).sum(-1).mean().item()
    found = objective_loss(student, model, tokens, next_token_loss, Objective(temperature=4)).item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"lr": -1.0}, "invalid lr -1.0: expected a positive number or 'auto'"),
        ({"lr": "fast"}, "invalid lr 'fast'"),
        ({"momentum": 1.0}, "a momentum in"),
        ({"optimizer": "adan"}, "unknown optimizer 'adan'"),
    ],
)
def test_invalid_settings_are_refused(wrong, message):
    with pytest.raises(MpqError, match=message):
        Finetuning(**wrong)


def test_models_without_logits_need_another_objective():
    model = seed_weights(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    data = [torch.randn(8, 4, generator=seeded(2, i)) for i in range(4)]

    def loss(model, inputs):
        return (model(inputs) - inputs.sum(1)).square().mean()

    allocation = uniform(model, "int3-channel")
    with pytest.raises(MpqError, match=r"no logits .* take Objective\(kl=0, task=1\)"):
        finetune(model, allocation, data, loss, QUICK)
    settings = Finetuning(steps=30, lr=0.05, objective=Objective(kl=0, task=1))
    assert finetune(model, allocation, data, loss, settings).kept
    with pytest.raises(MpqError, match="one of them positive"):
        Objective(kl=0)


def test_contrastive_losses_are_compared_on_whole_batches():
    def contrastive(model, batch):
        one, other = (torch.nn.functional.normalize(model(part), dim=-1) for part in batch)
        return torch.nn.functional.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)))

    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
    batches = [(torch.randn(5, 8), torch.randn(5, 8)) for _ in range(3)]
    found = harms(student, teacher, batches, contrastive, Objective(kl=0.0, task=1.0), Arrangement(together=True))
    assert found.tolist() == pytest.approx([contrastive(student, batch).item() for batch in batches])
