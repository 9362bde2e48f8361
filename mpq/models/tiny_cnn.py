"""A residual network for 8x8 handwritten digits, with plain, grouped and depthwise convolutions."""

from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut; (batch, channels, h, w) to the same."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """relu(x + convolutions(x))."""
        out = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(out)))


class Separable(nn.Module):
    """A depthwise 3x3 convolution of stride 2, then a 1x1; (batch, n, h, w) to (batch, m, h / 2, w / 2)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels_in, channels_in, 3, 2, 1, groups=channels_in, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.pointwise = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, h, w) to (batch, m, h / 2, w / 2)."""
        x = functional.relu(self.norm1(self.depthwise(x)))
        return functional.relu(self.norm2(self.pointwise(x)))


class TinyCNN(nn.Module):
    """Images (batch, 1, 8, 8) with values from 0 to 1 to the logits of ten digits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.stage1 = Residual(32)
        self.down1 = Separable(32, 64)
        self.stage2 = Residual(64, groups=4)
        self.down2 = Separable(64, 96)
        self.stage3 = Residual(96, groups=3)
        self.head = nn.Linear(96, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits."""
        x = functional.relu(self.norm(self.stem(images)))
        x = self.stage2(self.down1(self.stage1(x)))
        x = self.stage3(self.down2(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
