"""Networks small enough for exact derivatives, with every kind of layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mpq.core.scheme import parse_scheme
from mpq.network.calibration import cross_entropy, next_token_loss, seeded
from mpq.network.layers import find_layers
from mpq.rounding.store import MethodRounder
from mpq.sensitivity.task import Task


def seed_weights(model: nn.Module, scale: float = 0.6) -> nn.Module:
    """Normal weights that depend on the parameters' names alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(0, name)) * scale)
    return model


def mlp() -> nn.Module:
    """122 weights."""
    layers = (
        nn.Linear(5, 8, bias=False),
        nn.Tanh(),
        nn.Linear(8, 6, bias=False),
        nn.Tanh(),
        nn.Linear(6, 3, bias=False),
    )
    return seed_weights(nn.Sequential(*layers))


class Convolutions(nn.Module):
    """Grouped and depthwise convolutions, batch normalization, dropout, in-place ReLU: (n, 4, 6, 6) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, stride=2, groups=6)
        self.drop = nn.Dropout(0.5)
        self.line = nn.Conv1d(6, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        x = functional.relu(self.norm(self.first(x)), inplace=True)
        x = self.drop(torch.tanh(self.depthwise(x))).flatten(2)
        return self.head(self.line(x).mean(2))


class TiedLanguageModel(nn.Module):
    """Embedding shared with the output layer, transformers' Conv1D, a layer used twice: (n, t) -> (n, t, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = Conv1D(4, 4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        x = self.embed(tokens)
        x = x + torch.tanh(self.mix(x.cumsum(1)))
        return self.head(self.twice(torch.tanh(self.twice(x))))


class Routed(nn.Module):
    """Experts that see some positions of many samples: (n, t, 4) -> (n, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        """Class logits."""
        chosen = x[..., 0] > 0
        out = x.new_zeros(*x.shape[:2], 3)
        out[chosen] = self.experts[0](x[chosen])
        out[~chosen] = self.experts[1](x[~chosen])
        return out.mean(1)


def class_batches(shape: tuple[int, ...], sizes=(6, 6), classes: int = 3):
    """(inputs, labels) batches."""
    return tuple(
        (
            torch.randn((size, *shape), generator=seeded(1, index)),
            torch.randint(0, classes, (size,), generator=seeded(2, index)),
        )
        for index, size in enumerate(sizes)
    )


def token_batches(sizes=(3, 2), length: int = 5, vocabulary: int = 7):
    """Batches of tokens."""
    return tuple(
        torch.randint(0, vocabulary, (size, length), generator=seeded(3, index)) for index, size in enumerate(sizes)
    )


def make_task(model, batches, loss_fn, schemes=("int3-channel", "int4-g32"), **options) -> Task:
    """A metric's input, for a model in evaluation mode."""
    model.eval()
    return Task(
        model,
        tuple(batches),
        loss_fn,
        find_layers(model),
        tuple(map(parse_scheme, schemes)),
        MethodRounder("mse"),
        **options,
    )


CASES = {
    "mlp": lambda **options: make_task(mlp(), class_batches((5,), (7, 4)), cross_entropy, **options),
    "convolutions": lambda **options: make_task(
        seed_weights(Convolutions()), class_batches((4, 6, 6), (6, 5)), cross_entropy, **options
    ),
    "tied": lambda **options: make_task(seed_weights(TiedLanguageModel()), token_batches(), next_token_loss, **options),
}


class Tagger(nn.Module):
    """Reads tokens (time, samples), or (samples, time) when `batch_first`; the next token's logits everywhere."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.cell = nn.GRU(6, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 9)

    def forward(self, x):
        """Logits in the order of the tokens."""
        return self.head(self.cell(self.embed(x))[0])
