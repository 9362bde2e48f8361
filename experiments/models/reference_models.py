"""Pretrained models and data of the benchmarks, read from the data folder beside the repository.

The networks are the CIFAR ResNets of He et al. 2015 (weights: Y. Idelbayev's pytorch_resnet_cifar10) and a small
Llama trained on WikiText-2.
"""

import importlib.util
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTHS = (20, 32, 44, 56)


def data_file(name: str) -> Path:
    """Path of a data file or folder; MpqError if it is missing."""
    path = DATA / name
    if not path.exists():
        raise MpqError(f"{path.name} is missing: this benchmark reads pretrained models and data from {DATA.parent}")
    return path


@contextmanager
def skipping(*errors: type[Exception]) -> Iterator[None]:
    """Context manager: end the script with a message and status 0 if data or packages are missing."""
    try:
        yield
    except (MpqError, *errors) as error:
        print(f"skipped: {error}")
        sys.exit(0)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: subsampled, channels padded with zeros on both sides."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, height, width) -> (batch, channels, height / stride, width / stride)."""
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(out + shortcut)


class CifarResNet(nn.Module):
    """ResNet with 6n + 2 layers for 32x32 images: (batch, 3, 32, 32) -> (batch, 10)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten classes."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet(depth: int = 20) -> CifarResNet:
    """A pretrained CIFAR-10 ResNet in evaluation mode; depth 20, 32, 44 or 56."""
    if depth not in DEPTHS:
        raise MpqError(f"unknown ResNet-{depth}: expected one of {', '.join(map(str, DEPTHS))}")
    model = CifarResNet(depth)
    model.load_state_dict(load_file(data_file(f"cifar10_resnet{depth}.safetensors")), strict=False)
    return model.eval()


def _cifar(name: str) -> tuple[Tensor, Tensor]:
    with np.load(data_file(name)) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["labels"]).long()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))
    return (images - mean) / std, labels


def batched(images: Tensor, labels: Tensor, batch_size: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """(inputs, labels) batches in order; the last may be smaller."""
    return tuple(zip(images.split(batch_size), labels.split(batch_size), strict=True))


def cifar10_calibration(samples: int = 512, batch_size: int = 64) -> tuple[tuple[Tensor, Tensor], ...]:
    """The first images of the calibration set (from the training set), normalized."""
    images, labels = _cifar("cifar10_calib.npz")
    return batched(images[:samples], labels[:samples], batch_size)


def cifar10_test(batch_size: int = 250) -> tuple[tuple[Tensor, Tensor], ...]:
    """The 1,000 lossless test images."""
    return batched(*_cifar("cifar10_test.npz"), batch_size)


@torch.no_grad()
def top1(model: nn.Module, batches: tuple[tuple[Tensor, Tensor], ...]) -> float:
    """Top-1 accuracy."""
    right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def wikitext_llama() -> nn.Module:
    """The 5.5 M parameter Llama trained on WikiText-2, float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(data_file("wikitext2_llama_5m"), dtype=torch.float32)
    return model.eval()


def smollm2(windows: int = 48, length: int = 256) -> tuple[nn.Module, Tensor]:
    """SmolLM2-135M off its 4-bit lattice, float32, and tokens of WikiText-2's training text, (windows, length)."""
    model, tokens_of = smollm2_and_text()
    return model, tokens_of("train", windows, length)


def smollm2_and_text() -> tuple[nn.Module, Callable[[str, int, int], Tensor]]:
    """The same model, and a function that gives so many windows of so many tokens of "train", "raw_test", ..."""
    model, tokenizer = _smollm2()

    def tokens_of(split: str, windows: int, length: int) -> Tensor:
        tokens = torch.tensor(tokenizer(_wikitext(split)[: windows * length * 12])["input_ids"])
        return tokens[: windows * length].view(windows, length)

    return model, tokens_of


def write_smollm2(folder: Path) -> tuple[Path, Path]:
    """Write the model and tokenizer to one folder, and WikiText-2's training text to a file: their paths."""
    model, tokenizer = _smollm2()
    model.save_pretrained(folder / "smollm2")
    tokenizer.save_pretrained(folder / "smollm2")
    (folder / "train.txt").write_text(_wikitext("train"), encoding="utf-8")
    return folder / "smollm2", folder / "train.txt"


def _smollm2() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    spec = importlib.util.spec_from_file_location("smollm2", data_file("smollm2.py"))
    assert spec is not None
    assert spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    loaded: tuple[Any, Any] = loader.load()
    return loaded


def _wikitext(split: str) -> str:
    with zipfile.ZipFile(data_file("texts.zip")) as archive:
        return archive.read(f"wikitext2_{split}.txt").decode("utf-8")


def wikitext_tokens(split: str = "test", windows: int | None = None, length: int = 256) -> Tensor:
    """Tokens of WikiText-2 ("train", "valid" or "test") in consecutive windows, (windows, length)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_file("wikitext2_llama_5m"))
    text = _wikitext(split)
    if windows is not None:
        text = text[: windows * length * 12]  # more than enough characters: a token has about four
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = tokens[: len(tokens) // length * length].view(-1, length)
    return tokens if windows is None else tokens[:windows]


STAGES = (  # expansion, channels, repeats, stride, kernel
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


def _padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution with TensorFlow's "same" padding: an odd row or column goes to the bottom and right."""
    axes = zip(x.shape[:1:-1], conv.stride[::-1], conv.kernel_size[::-1], strict=True)  # last dimension first
    extra = [max((-(-size // step) - 1) * step + kernel - size, 0) for size, step, kernel in axes]
    output: Tensor = conv(functional.pad(x, [side for each in extra for side in (each // 2, each - each // 2)]))
    return output


class InvertedResidual(nn.Module):
    """EfficientNet-Lite's block: expand, depthwise, project; a shortcut where the shape stays."""

    def __init__(self, channels_in: int, channels: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide, 1e-3)
        self.depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.bn1 = nn.BatchNorm2d(wide, 1e-3)
        self.project_conv, self.bn2 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels, 1e-3)
        self.expands, self.residual = expansion > 1, stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, height, width) -> (batch, channels, height / stride, width / stride)."""
        out = functional.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        out = self.bn2(self.project_conv(functional.relu6(self.bn1(_padded(self.depthwise_conv, out)))))
        return x + out if self.residual else out


class EfficientNetLite0(nn.Module):
    """(batch, 3, 224, 224) -> (batch, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-3)
        blocks, width = [], 32
        for expansion, channels, repeats, stride, kernel in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(width, channels, expansion, 1 if repeat else stride, kernel))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280, 1e-3)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ImageNet's classes."""
        x = self.blocks(functional.relu6(self.bn0(_padded(self.conv_stem, x))))
        return self.fc(functional.relu6(self.bn1(self.conv_head(x))).mean((2, 3)))


def efficientnet_lite0() -> EfficientNetLite0:
    """The pretrained EfficientNet-Lite0 in evaluation mode."""
    model = EfficientNetLite0()
    model.load_state_dict(load_file(data_file("imagenet_efficientnet_lite0.safetensors")), strict=False)
    return model.eval()


def imagenet_sample(start: int, samples: int, batch_size: int = 32) -> tuple[tuple[Tensor, Tensor], ...]:
    """Images of the ImageNet sample, in a fixed random order from number `start`, as EfficientNet-Lite takes them."""
    with np.load(data_file("imagenet_1k_sample.npz")) as file:
        order = np.random.default_rng(0).permutation(len(file["labels"]))[start : start + samples]
        bytes_, offsets, labels = file["jpeg"], file["offsets"], file["labels"]
        images = [Image.open(io.BytesIO(bytes_[offsets[i] : offsets[i + 1]].tobytes())) for i in order]
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
    return batched((pixels.permute(0, 3, 1, 2).float() - 127) / 128, torch.from_numpy(labels[order]).long(), batch_size)
