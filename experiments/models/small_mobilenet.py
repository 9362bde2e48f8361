"""A small MobileNet for CIFAR-10, trained on the 9,000 JPEG test images that have no lossless copy."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from experiments.models.reference_models import CIFAR_MEAN, CIFAR_STD, cifar10_test, data_file
from mpq.network.calibration import seeded

BATCH = 32
BLOCKS = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1))  # channels in and out, stride
EXPANSION = 4


class Block(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = channels_in * EXPANSION
        self.expand, self.norm1 = nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project, self.norm3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, height, width) -> (batch, channels, height / stride, width / stride)."""
        wide = functional.relu6(self.norm2(self.depthwise(functional.relu6(self.norm1(self.expand(x))))))
        out: Tensor = self.norm3(self.project(wide))
        return x + out if self.residual else out


class SmallMobileNet(nn.Module):
    """(batch, 3, 32, 32) -> (batch, 10); 2.6 million multiplications, 26 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(*block) for block in BLOCKS))
        self.last, self.last_norm = nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten classes."""
        x = self.blocks(functional.relu6(self.norm(self.stem(x))))
        out: Tensor = self.head(functional.relu6(self.last_norm(self.last(x))).mean((2, 3)))
        return out


class Data:
    """The 9,000 images to train on, and the 1,000 lossless ones to judge on."""

    def __init__(self, few: bool = False) -> None:
        with np.load(data_file("cifar10_test_jpeg.npz")) as file:
            places = np.setdiff1d(np.arange(len(file["labels"])), file["lossless_index"])[: 256 if few else None]
            content, offsets, labels = file["jpeg"], file["offsets"], file["labels"][places]
            images = [
                np.asarray(Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]].tobytes()))) for i in places
            ]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
        self.images, self.labels = (pixels - mean) / std, torch.from_numpy(labels).long()
        self.unseen, self.answers = (torch.cat(parts) for parts in zip(*cifar10_test(), strict=True))
        if few:
            self.unseen, self.answers = self.unseen[:100], self.answers[:100]

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """A random batch, flipped and shifted by up to 4 pixels: the same for every run of a seed."""
        generator = seeded(seed, "batch", step)
        chosen = torch.randint(len(self.images), (BATCH,), generator=generator)
        y, x = torch.randint(9, (2,), generator=generator).tolist()
        images = functional.pad(self.images[chosen], (4, 4, 4, 4))[:, :, y : y + 32, x : x + 32]
        flip = torch.rand(BATCH, generator=generator) < 0.5
        return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images), self.labels[chosen]

    @torch.no_grad()
    def judge(self, model: nn.Module, count: int | None = None) -> tuple[float, float]:
        """Accuracy and loss on the first `count` unseen images, or all, in evaluation mode."""
        model.eval()
        logits, answers = model(self.unseen[:count]), self.answers[:count]
        model.train()
        accuracy = float((logits.argmax(1) == answers).float().mean())
        return accuracy, float(functional.cross_entropy(logits, answers))


def trained(data: Data, seed: int, steps: int) -> SmallMobileNet:
    """The network in floating point, from random weights."""
    torch.manual_seed(seed)
    model = SmallMobileNet().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images, labels = data.batch(seed + 1000, step)
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return model
