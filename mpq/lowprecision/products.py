"""The three products of a layer in few bits: forward, gradient by inputs, gradient by weight."""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from mpq.lowprecision.loss_scale import DynamicScale
from mpq.lowprecision.masking import Mask, masked
from mpq.lowprecision.operands import operand_gradient, round_operand
from mpq.lowprecision.recipe import BY_INPUTS, BY_WEIGHT, FORWARD, Recipe
from mpq.rounding.hadamard import Rotation, random_rotation

AnyRecipe: TypeAlias = Recipe | Mask


def products(
    inputs: Tensor,  # (rows, in)
    weight: Tensor,  # (out, in)
    recipe: AnyRecipe,
    generator: torch.Generator,
    dynamic: DynamicScale | None = None,
) -> Tensor:
    """inputs @ weight.T, float32 (rows, out), whose gradients are products in few bits, too.

    `dynamic` is the layer's loss scale where the recipe's is "dynamic"; the backward pass changes it.
    """
    outputs: Tensor = _Products.apply(inputs, weight, recipe, generator, dynamic)  # type: ignore[no-untyped-call]
    return outputs


class Operands(NamedTuple):
    """Both operands of a product, (rows, summed dimension) each."""

    rotation: Rotation | None
    exact: tuple[Tensor, Tensor]  # after the rotation, before rounding
    rounded: tuple[Tensor, Tensor]


def operands_of(
    left: Tensor,  # (m, k)
    right: Tensor,  # (n, k)
    recipe: Recipe,
    generator: torch.Generator,
    roles: tuple[str, str] = FORWARD,
) -> Operands:
    """Both operands rounded along k, each in the format of its role.

    In a backward product the gradient alone is rounded stochastically. A rotated operand has no square tiles, since
    rotation mixes along k, which differs between its two products.
    """
    backward = "gradients" in roles
    rotation = random_rotation(recipe.rotation_block, generator) if recipe.rotates(backward) else None
    exact = (left.float(), right.float())
    if rotation is not None:
        exact = (rotation.rotate(exact[0]), rotation.rotate(exact[1]))
    first, second = (
        round_operand(
            operand,
            recipe.format_of(role),
            convention=recipe.convention,
            scale_rounding=recipe.scale_rounding,
            square=has_square_tiles(recipe, role, backward),
            generator=generator if recipe.rounds_stochastically(role, backward) else None,
        )
        for operand, role in zip(exact, roles, strict=True)
    )
    return Operands(rotation, exact, (first, second))


def has_square_tiles(recipe: Recipe, role: str, backward: bool) -> bool:
    """Whether the operand's scales are those of square tiles."""
    return role == "weights" and recipe.square_weights and not recipe.rotates(backward)


def product(
    left: Tensor,  # (m, k)
    right: Tensor,  # (n, k)
    recipe: AnyRecipe,
    generator: torch.Generator,
    roles: tuple[str, str] = FORWARD,
    dynamic: DynamicScale | None = None,
) -> Tensor:
    """left @ right.T with both operands rounded along k, or masked; float32 (m, n)."""
    if isinstance(recipe, Mask):
        return functional.linear(masked(left.float(), recipe), masked(right.float(), recipe))
    scale = 1.0
    if "gradients" in roles:
        scale = dynamic.value if dynamic is not None else recipe.fixed_loss_scale
    operands = operands_of(left * scale if scale != 1 else left, right, recipe, generator, roles)
    if dynamic is not None and "gradients" in roles:
        dynamic.update(operands.exact[0], operands.rounded[0])
    outputs = functional.linear(*operands.rounded)
    return outputs / scale if scale != 1 else outputs


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, recipe: AnyRecipe, generator: torch.Generator,
        dynamic: DynamicScale | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(inputs, weight)
        ctx.recipe, ctx.generator, ctx.operands, ctx.dynamic = recipe, generator, None, dynamic
        if isinstance(recipe, Mask) or recipe.plain_gradient:
            return product(inputs, weight, recipe, generator)
        ctx.operands = operands_of(inputs, weight, recipe, generator)
        return functional.linear(*ctx.operands.rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        inputs, weight = ctx.saved_tensors
        by_inputs = product(gradient, weight.t(), ctx.recipe, ctx.generator, BY_INPUTS, ctx.dynamic)
        by_weight = product(gradient.t(), inputs.t(), ctx.recipe, ctx.generator, BY_WEIGHT, ctx.dynamic)
        if ctx.operands is not None:
            by_inputs, by_weight = _through(ctx.operands, (by_inputs, by_weight), ctx.recipe)
        return by_inputs, by_weight, None, None, None


def _through(operands: Operands, gradients: tuple[Tensor, Tensor], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Gradients by the rounded operands as gradients by the operands before rotation and rounding."""
    results = []
    for exact, rounded, gradient, role in zip(operands.exact, operands.rounded, gradients, FORWARD, strict=True):
        cols, rotation = gradient.shape[1], operands.rotation
        upstream = gradient if rotation is None else rotation.rotate(gradient)
        square = has_square_tiles(recipe, role, False)
        through = operand_gradient(exact, rounded, upstream, recipe.format_of(role), recipe, square)
        results.append(through if rotation is None else rotation.undo(through, cols))
    return results[0], results[1]
