"""Operations that a recipe adds to a training step, beside the multiply-adds of its products.

A product of (m, k) with (n, k) has 2 m n k operations. Rounding an operand adds, for each of its elements, those of
`OPERATIONS`; they are counted once for each product that the operand enters, as nothing is kept between products.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mpq.lowprecision.convert import LowPrecisionLayer, chosen_layers
from mpq.lowprecision.masking import Mask
from mpq.lowprecision.products import AnyRecipe
from mpq.lowprecision.recipe import BY_INPUTS, BY_WEIGHT, FORWARD, Recipe
from mpq.network.calibration import Batch, LossFn, evaluating
from mpq.network.layers import weight_matrix

OPERATIONS = {
    "round": 3,  # largest magnitude, division, rounding
    "tensor scale": 2,  # largest magnitude of the tensor, division
    "stochastic": 2,  # a random number, an addition
    "relaxation": 3,  # fraction of the step, its slope, a multiplication
    "scale gradient": 4,  # a multiply-add, a sum, the share
    "mask": 2,  # bits cut off, range clipped
    "rotation": 1,  # the sign; log2(block) additions come on top
}


def added_operations(recipe: AnyRecipe, m: int, n: int, k: int) -> float:
    """Operations that a recipe adds to the three products of a layer: inputs (m, k), weight (n, k), outputs (m, n)."""
    operands = {"activations": m * k, "weights": n * k, "gradients": m * n}
    if isinstance(recipe, Mask):
        return 2.0 * OPERATIONS["mask"] * sum(operands.values())
    total = 0.0
    for roles in (FORWARD, BY_INPUTS, BY_WEIGHT):
        for role in roles:
            total += operands[role] * _operations(recipe, role, "gradients" in roles)
    if not recipe.plain_gradient:
        each = float(OPERATIONS["relaxation"]) * (recipe.relaxation != "straight-through")
        each += OPERATIONS["scale gradient"] * (recipe.scale_gradient != "none")
        each += 2 * _rotation(recipe) * recipe.rotates(False)  # forward and inverse
        total += each * sum(operands[role] for role in FORWARD)
    return total


def overhead(
    model: nn.Module,
    recipe: AnyRecipe,
    batch: Batch,
    loss_fn: LossFn,
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
) -> float:
    """Added operations as a share of the operations of the products that the recipe takes over.

    Args:
        model: run forward once; it stays as it is.
        recipe: of `convert`.
        batch: one batch of training, by which the layers' inputs are counted.
        loss_fn: of the model and the batch.
        include: patterns of the layers' names, as for `convert`.
        exclude: patterns of layers to leave alone.

    Raises:
        MpqError: no layer to convert, or a pattern that matches none.
    """
    shapes: list[tuple[int, int, int]] = []

    def count(module: nn.Module, args: object, output: torch.Tensor) -> None:
        matrix = module.matrix() if isinstance(module, LowPrecisionLayer) else weight_matrix(module)
        rows, cols = matrix.shape
        groups = getattr(module, "groups", 1)
        shapes.extend([(output.numel() // rows, rows // groups, cols)] * groups)

    layers = chosen_layers(model, include, exclude)
    handles = [layer.register_forward_hook(count) for layer in layers.values()]
    try:
        with torch.no_grad(), evaluating(model):
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    added = sum(added_operations(recipe, *shape) for shape in shapes)
    return added / sum(6 * m * n * k for m, n, k in shapes)


def _operations(recipe: Recipe, role: str, backward: bool) -> float:
    format = recipe.format_of(role)
    total: float = 0 if format.is_float_copy else OPERATIONS["round"]
    total += OPERATIONS["tensor scale"] * format.tensor_scale
    total += OPERATIONS["stochastic"] * recipe.rounds_stochastically(role, backward)
    return total + _rotation(recipe) * recipe.rotates(backward)


def _rotation(recipe: Recipe) -> float:
    return OPERATIONS["rotation"] + math.log2(recipe.rotation_block)
