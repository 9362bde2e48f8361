"""Non-linear levels against integers: how the levels were fitted, and their KL divergence at equal bytes.

    python -m experiments.benchmarks.bench_codebooks [--quick] [--models Llama SmolLM2 ...]

First the levels: fitted by Lloyd's algorithm (IEEE Transactions on Information Theory 28, 1982) to groups of 64 numbers
with a scale, and their squared error on groups of 64 normal numbers. Then the KL divergence from the original of
uniform formats rounded by GPTQ, on held-out data: the WikiText Llama, ResNet-20 and -56, SmolLM2. Goal: 10 % less than
integers of the same bytes.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from experiments.benchmarks.bench_importance import Case, cases
from experiments.models import reference_models
from experiments.result import result
from mpq.core.formats import Format, parse_format
from mpq.core.grids import NON_LINEAR, codebook
from mpq.network.calibration import seeded
from mpq.rounding.clip_search import clip_search
from mpq.rounding.reference import dequantize, group_scales, to_groups

FREEDOM = 15  # degrees of freedom of the t-distribution that levels are fitted to
LARGEST = 127
LANGUAGE = ("2-g64", "3-g64", "4-g64", "5-g64")
IMAGES = ("2-g32", "3-channel", "4-channel")
GOAL = 0.9


def numbers(groups: int, freedom: int, seed: int = 0) -> Tensor:
    """Samples of a t-distribution, as a matrix with 64 groups of 64 in each row."""
    shape, generator = (groups // 64, 64 * 64), seeded(seed, "codebooks")
    squares = sum(torch.randn(shape, generator=generator).square() for _ in range(freedom))
    return torch.randn(shape, generator=generator) / (squares / freedom).sqrt()


def format_of(levels: Sequence[float]) -> Format:
    """The format with groups of 64 and these levels."""
    return replace(parse_format("nl4-g64"), grid=codebook("fitted", levels))


def error(matrix: Tensor, format: Format) -> float:
    """Relative squared error."""
    return float((dequantize(clip_search(matrix, format)) - matrix).square().sum() / matrix.square().sum())


def improved(levels: Sequence[float], matrix: Tensor) -> list[float]:
    """One step of Lloyd's algorithm: the mean of the numbers at each level, in units of the largest, times LARGEST."""
    quantized = clip_search(matrix, format_of(levels))
    scales = group_scales(quantized).unsqueeze(-1)
    elements = to_groups(matrix, quantized.format) / scales
    weights = scales.square().expand_as(elements).flatten().double()
    codes = quantized.codes.flatten().long()
    sums, sizes = torch.zeros(2, len(levels), dtype=torch.float64)
    sums.index_add_(0, codes, elements.flatten().double() * weights)
    means = sums / sizes.index_add_(0, codes, weights)
    scaled: list[float] = (means * (LARGEST / means.abs().max())).tolist()
    return scaled


def fitted(levels: Sequence[float], matrix: Tensor, steps: int) -> list[int]:
    """Levels after `steps` of Lloyd's algorithm, rounded to integers."""
    for _ in range(steps):
        levels = improved(levels, matrix)
    return [round(level) for level in levels]


def check_levels(quick: bool) -> Iterator[str]:
    """Check the stored levels of every width, and their error on normal numbers."""
    fresh, normal = numbers(2**12 if quick else 2**15, FREEDOM), torch.randn(64, 64 * 64, generator=seeded(1))
    for bits, levels in enumerate(NON_LINEAR, 2):
        again = fitted(levels, fresh, 1 if quick else 20)
        moved = max(abs(one - other) for one, other in zip(again, levels, strict=True))
        print(f"nl{bits}: {again}", flush=True)
        yield result(f"codebook_{bits}_moved", moved, "<=3", moved <= 3)
        ratio = error(normal, format_of(levels)) / error(normal, parse_format(f"int{bits}-g64"))
        yield result(f"codebook_{bits}_error_ratio", ratio, f"<={GOAL}", ratio <= GOAL)


def compare_divergences(case: Case, formats: Sequence[str]) -> Iterator[str]:
    """Integers and non-linear levels on a model, with the standard error of the paired difference."""
    for name in formats:
        integers, levels = (case.divergence(f"{grid}{name}") for grid in ("int", "nl"))
        apart = (levels - integers).std() / len(levels) ** 0.5
        ratio = float(levels.mean() / integers.mean())
        figures = f"int {integers.mean():.5f}  nl {levels.mean():.5f}  difference +- {apart:.1g}"
        print(f"{case.name:10} {name:10} {figures}", flush=True)
        yield result(f"codebook_{case.name}_{name}_kl_ratio", ratio, f"<={GOAL}", ratio <= GOAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="of those above (default: all)")
    parser.add_argument("--quick", action="store_true", help="few groups, one format of the Llama, few windows")
    options = parser.parse_args()
    lines = list(check_levels(options.quick))
    with reference_models.skipping():
        reference_models.data_file("wikitext2_llama_5m")
        for case in cases(0, options.quick):
            if not options.models or case.name in options.models:
                formats = IMAGES if case.name.startswith("ResNet") else LANGUAGE
                lines += compare_divergences(case, formats[1:2] if options.quick else formats)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
