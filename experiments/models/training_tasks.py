"""Small tasks of the training studies: regression, classification, diffusion, language; seconds per run."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.models.small_lm import BATCH, loss_of, training_windows, unseen_loss, unseen_windows, untrained
from mpq.lowprecision.sharpness import logit_sharpness, sharpness
from mpq.lowprecision.study import Task
from mpq.models import digit_batches
from mpq.network.calibration import Batch, LossFn, cross_entropy, seeded

FEATURES, HIDDEN, NOISE_LEVELS = 32, 64, 16


def initialized(model: nn.Module, seed: int) -> nn.Module:
    """The model with weights of linear layers and convolutions drawn by the seed."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            spread = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(0, spread, generator=seeded(seed, name))
            if module.bias is not None:
                module.bias.data.zero_()
    return model


def perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs)
    )


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return functional.mse_loss(model(inputs), targets)


@torch.no_grad()
def mean_of(loss_fn: LossFn, model: nn.Module, batch: Batch) -> float:
    return float(loss_fn(model, batch))


def sampled(inputs: Tensor, targets: Tensor, seed: int, size: int) -> Iterator[Batch]:
    generator = seeded(seed, "batches")
    while True:
        index = torch.randint(0, len(inputs), (size,), generator=generator)
        yield inputs[index], targets[index]


@lru_cache(maxsize=1)
def teacher() -> nn.Module:
    return initialized(perceptron(FEATURES, 4), seed=1000).eval()


@torch.no_grad()
def gaussian(count: int, *names: object) -> Batch:
    """Standard normal inputs and the outputs of a fixed network of the student's shape."""
    inputs = torch.randn(count, FEATURES, generator=seeded(0, *names))
    return inputs, teacher()(inputs)


def regression() -> Task:
    """Gaussian regression: a network learns the function of another one of the same shape."""
    unseen = gaussian(1024, "unseen")

    def batches(seed: int) -> Iterator[Batch]:
        step = 0
        while True:
            yield gaussian(64, "seen", seed, step)
            step += 1

    return Task(
        "regression", lambda seed: initialized(perceptron(FEATURES, 4), seed), batches, squared_error,
        lambda model: mean_of(squared_error, model, unseen), 3e-3, ("4",),
    )  # fmt: skip


class SmallCNN(nn.Module):
    """Images (n, 1, 8, 8) to the logits of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.deep, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (16, 16, 32, 32))

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for layer, norm in zip((self.stem, self.wide, self.narrow, self.deep), self.norms, strict=True):
            hidden = functional.relu(norm(layer(hidden)))
        return self.head(hidden.mean((2, 3)))


def digits() -> tuple[Batch, Batch]:
    """Training and test digits: images (n, 1, 8, 8) and labels."""
    seen, unseen = digit_batches(10**6, batch_size=10**6, seed=0)
    return seen[0], tuple(torch.cat(parts) for parts in zip(*unseen, strict=True))


def classification() -> Task:
    """Handwritten digits by a convolutional network with BatchNorm."""
    seen, unseen = digits()
    return Task(
        "classification", lambda seed: initialized(SmallCNN(), seed), lambda seed: sampled(*seen, seed, 16),
        cross_entropy, lambda model: mean_of(cross_entropy, model, unseen), 3e-3, ("head", "stem"),
        lambda model: sharpness(model(unseen[0]).detach(), unseen[1]).mean().item(),
    )  # fmt: skip


class Denoiser(nn.Module):
    """Noisy images (n, 64) and their level (n,) to the noise (n, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron(64 + NOISE_LEVELS, 64)

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        return self.body(torch.cat((noisy, functional.one_hot(level, NOISE_LEVELS).to(noisy)), 1))


def noised(images: Tensor, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Images mixed with noise along a cosine: ((noisy, level), noise)."""
    level = torch.randint(0, NOISE_LEVELS, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    angle = (level + 1).unsqueeze(1) / (NOISE_LEVELS + 1) * torch.pi / 2
    return (angle.cos() * images + angle.sin() * noise, level), noise


def noise_error(model: nn.Module, batch: Batch) -> Tensor:
    (noisy, level), noise = batch
    return functional.mse_loss(model(noisy, level), noise)


def diffusion() -> Task:
    """A denoiser of handwritten digits, which predicts the noise (DDPM)."""
    (seen, _), (unseen, _) = digits()
    seen, unseen = ((4 * images.flatten(1) - 1) for images in (seen, unseen))
    held_out = noised(unseen.repeat(4, 1), seeded(0, "noise"))

    def batches(seed: int) -> Iterator[Batch]:
        generator = seeded(seed, "batches")
        while True:
            yield noised(seen[torch.randint(0, len(seen), (64,), generator=generator)], generator)

    return Task(
        "diffusion", lambda seed: initialized(Denoiser(), seed), batches, noise_error,
        lambda model: mean_of(noise_error, model, held_out), 3e-3, ("body.4",),
    )  # fmt: skip


def language() -> Task:
    """Jane Austen by a LLaMA of 139,392 parameters."""
    seen, unseen = training_windows(), unseen_windows()

    def batches(seed: int) -> Iterator[Batch]:
        generator = seeded(seed, "batches")
        while True:
            yield seen[torch.randint(0, len(seen), (BATCH,), generator=generator)]

    return Task(
        "language", untrained, batches, loss_of, lambda model: unseen_loss(model, unseen), 1e-2, ("head",),
        lambda model: logit_sharpness(model, unseen[:32]).mean().item(),
    )  # fmt: skip


TASKS = {"regression": regression, "classification": classification, "diffusion": diffusion, "language": language}
