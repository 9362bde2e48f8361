"""Live activations of models, against the memory that PyTorch allocates, and as a budget."""

import gc

import pytest
import torch
from caching_models import model_of
from small_cnn import images, small_cnn
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mpq.core.errors import MpqError
from mpq.core.scheme import parse_scheme
from mpq.models.tiny_lm import LMConfig, TinyLM
from mpq.network.calibration import cross_entropy, logits_of, next_token_loss
from mpq.network.layers import find_layers
from mpq.network.live_activations import live_activations


def allocated_peak(model: nn.Module, inputs: Tensor) -> int:
    """Peak of the bytes allocated in one pass, from the allocator's events."""
    with torch.no_grad():
        model(inputs)  # allocations made once and kept
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            outputs = model(inputs)
        del outputs
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def layers_alone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 32), nn.ReLU(inplace=True), nn.Linear(32, 16))


class WithShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        hidden = torch.tanh(self.first(x))
        return x + self.second(hidden)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return logits_of(model(batch)).square().mean()


@pytest.mark.parametrize("make", [layers_alone, WithShortcut])
@pytest.mark.parametrize("batch", [1, 40])
def test_the_peak_is_what_pytorch_allocates(make, batch: int) -> None:
    model = make().eval()
    live = live_activations(model, find_layers(model), torch.zeros(1, 64), loss, batch)
    measured = allocated_peak(model, torch.zeros(batch, 64))
    assert live.peak({}) <= measured <= live.peak({}) + 64 * len(list(model.modules()))  # allocations are aligned


def test_the_peak_of_a_language_model_is_what_pytorch_allocates() -> None:
    model = TinyLM(LMConfig(vocabulary=64, width=64, hidden=512, layers=2, heads=2, kv_heads=1)).eval()
    live = live_activations(model, find_layers(model), torch.zeros(1, 8, dtype=torch.long), next_token_loss, 2, 48)
    measured = allocated_peak(model, torch.zeros(2, 48, dtype=torch.long))
    assert live.peak({}) <= measured <= 1.1 * live.peak({})
    assert live.where({}).endswith("mlp")


def test_inputs_of_layers_alone_count_in_their_formats() -> None:
    model = layers_alone().eval()
    live = live_activations(model, find_layers(model), torch.zeros(1, 64), loss, 10)
    assert live.peak({}) == 4 * 10 * (256 + 256)  # GELU's input and output
    int8 = parse_scheme("int4-g32+a:int8-token")
    assert live.peak({"2": int8}) == 4 * 10 * 256 + 10 * (256 + 2)  # codes and a scale for each token
    assert live.peak({"0": int8, "4": int8}) == live.peak({})  # formats of other layers change nothing
    both = WithShortcut().eval()
    live = live_activations(both, find_layers(both), torch.zeros(1, 64), loss, 10)
    assert live.peak({"first": int8}) == live.peak({})  # the sum reads it too


def test_architectures_are_counted_at_lengths_that_nothing_runs_at() -> None:
    for name in ("llama", "gpt2", "gemma2"):
        model = model_of(name)
        short, long = (
            live_activations(model, find_layers(model), torch.zeros(1, 8, dtype=torch.long), next_token_loss, 1, tokens)
            for tokens in (16, 64)
        )
        assert 3.5 * short.peak({}) < long.peak({})
    model = small_cnn()
    (batch,) = images(1)
    sample = batch[0]
    live = live_activations(model, find_layers(model), batch, cross_entropy, 7)
    assert live.peak({}) <= allocated_peak(model, sample.repeat(7, 1, 1, 1)) * 1.01


class Keeping(nn.Module):
    """Stores its results on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(8, 8), torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.linear(x)
        return self.kept.tanh()


def test_a_model_that_stores_tensors_is_restored() -> None:
    model = Keeping()
    live = live_activations(model, find_layers(model), torch.zeros(1, 8), loss, 3)
    assert live.peak({}) == 2 * 4 * 3 * 8
    assert torch.equal(model.kept, torch.ones(1))
    assert torch.is_tensor(model(torch.zeros(2, 8)).sum())


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else self.linear(-x)


def test_data_dependent_code_is_reported() -> None:
    model = Looking()
    with pytest.raises(MpqError, match="cannot be counted without running it"):
        live_activations(model, find_layers(model), torch.zeros(1, 8), loss)
