"""Linear layers whose three products (forward, input gradient, weight gradient) run in few bits.

The weight stays in full precision (the master copy); its gradient passes rounding as if it were the identity.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq.core.errors import MpqError
from mpq.core.formats import parse_format
from mpq.core.patterns import match_names
from mpq.lowprecision.masking import Mask, masked
from mpq.lowprecision.recipe import Recipe, round_operand
from mpq.network.calibration import seeded
from mpq.rounding.hadamard import random_rotation


class LowPrecisionLinear(nn.Module):
    """A linear layer that simulates training with a recipe; (..., in) to (..., out)."""

    def __init__(self, linear: nn.Linear, recipe: Recipe | Mask, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.recipe, self.generator = recipe, generator

    def forward(self, input: Tensor) -> Tensor:
        """The product in few bits; the bias is added in full precision."""
        rows = input.reshape(-1, input.shape[-1])
        outputs: Tensor = _Products.apply(rows, self.weight, self.recipe, self.generator)  # type: ignore[no-untyped-call]
        outputs = outputs.view(*input.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, recipe: Recipe | Mask, generator: torch.Generator) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.recipe, ctx.generator = recipe, generator
        return product(inputs, weight, recipe, generator, square=(False, _square(recipe)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inputs, weight = ctx.saved_tensors
        recipe, generator = ctx.recipe, ctx.generator
        square = (False, _square(recipe))
        by_inputs = product(gradient, weight.t(), recipe, generator, backward=True, square=square)
        by_weight = product(gradient.t(), inputs.t(), recipe, generator, backward=True)
        return by_inputs, by_weight, None, None


def product(
    left: Tensor,  # (m, k)
    right: Tensor,  # (n, k)
    recipe: Recipe | Mask,
    generator: torch.Generator,
    *,
    backward: bool = False,
    square: tuple[bool, bool] = (False, False),
) -> Tensor:
    """left @ right.T with both operands rounded along k, or masked; float32 (m, n).

    In a backward product `left` is the gradient, and only it is rounded stochastically. A rotated operand has no square
    tiles, since rotation mixes along k, which differs between its two products.
    """
    if isinstance(recipe, Mask):
        return functional.linear(masked(left.float(), recipe), masked(right.float(), recipe))
    format = parse_format(recipe.format)
    rotates = recipe.rotates(backward)
    if rotates:
        rotation = random_rotation(recipe.rotation_block, generator)
        left, right = rotation.rotate(left.float()), rotation.rotate(right.float())
    draws = generator if recipe.rounds_stochastically(backward) else None
    operands = [
        round_operand(operand, format, convention=recipe.convention, square=tiles and not rotates, generator=draw)
        for operand, tiles, draw in ((left, square[0], draws), (right, square[1], None if backward else draws))
    ]
    return functional.linear(*operands)


def _square(recipe: Recipe | Mask) -> bool:
    return isinstance(recipe, Recipe) and recipe.square_weights


def train_in(
    model: nn.Module,
    recipe: Recipe | Mask,
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Replace the model's linear layers, in place, by layers of the recipe with the same parameters; return the model.

    Args:
        model: changed in place. Usually without the output layer: exclude=("head",).
        recipe: of all replaced layers.
        include: patterns of the layers' names.
        exclude: patterns of layers to leave alone.
        seed: of stochastic rounding and rotations, together with each layer's name.

    Raises:
        MpqError: no linear layer, or a pattern that matches none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    if not names:
        raise MpqError(f"{type(model).__name__} has no linear layer to train in few bits")
    left_out = set(match_names(exclude, names))
    for name in match_names(include, names):
        if name not in left_out:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, LowPrecisionLinear(linear, recipe, seeded(seed, "low precision", name)))
    return model


@contextmanager
def computing_in(model: nn.Module, recipe: Recipe | Mask, **options: Any) -> Iterator[nn.Module]:
    """Inside the block the model computes as after `train_in`, forward and backward; its layers are restored after."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name}
    try:
        yield train_in(model, recipe, **options)
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
