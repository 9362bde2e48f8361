"""Recipes of training in few bits: the format and the rounding of every operand of a layer's three products."""

from dataclasses import dataclass

from mpq.core.errors import MpqError
from mpq.core.formats import Format, parse_format
from mpq.lowprecision.relaxation import RELAXATIONS

WHERE = ("none", "forward", "backward", "all")
CONVENTIONS = ("divide", "reciprocal")
DYNAMIC = "dynamic"
SCALE_ROUNDINGS = ("nearest", "up")
SCALE_GRADIENTS = ("none", "absmax", "softmax")
FORWARD, BY_INPUTS, BY_WEIGHT = ("activations", "weights"), ("gradients", "weights"), ("gradients", "activations")


@dataclass(frozen=True)
class Recipe:
    """The options of training in few bits (arXiv 2509.17791, section 3).

    Groups of every format run along the summed dimension of the product.

    format: of weights, and of the other operands unless they have their own ("mxfp4", "fp4-e2m1-g16-sue5m3-ts"; "bf16"
        and "fp32" leave an operand nearly or wholly unrounded).
    activations, gradients: formats of these operands: Recipe("fp8-e4m3", gradients="fp8-e5m2") is the usual FP8 hybrid.
    stochastic: products whose gradient (backward) or both operands (forward) are rounded stochastically.
    hadamard: products whose operands are rotated first.
    square_weights: scales of square tiles of a weight, so that both its products see the same values.
    convention: "divide" stores absmax / largest element and divides by it, as NVFP4 and MX do; "reciprocal" stores
        largest element / absmax and multiplies, as the paper's code does.
    scale_rounding: "nearest" (for powers of two the MX specification's floor), or "up": a divisor never below the exact
        one, so that no element is clipped.
    relaxation: derivative of the forward rounding in the backward pass, one of `mpq.lowprecision.relaxation`.
    steepness: k of the relaxations "power" and "sigmoid".
    scale_gradient: "none" treats scales as constants; "absmax" lets the gradient of a scale pass to the element of
        largest magnitude, "softmax" to all elements in proportion to exp(|element| / scale).
    loss_scale: gradients are multiplied by it before they are rounded, and the products divided by it; "dynamic" lets
        each layer find its own (`mpq.lowprecision.loss_scale`).
    """

    format: str
    activations: str = ""
    gradients: str = ""
    stochastic: str = "none"
    hadamard: str = "none"
    square_weights: bool = False
    convention: str = "divide"
    scale_rounding: str = "nearest"
    relaxation: str = "straight-through"
    steepness: float = 5.0
    scale_gradient: str = "none"
    loss_scale: float | str = 1.0
    rotation_block: int = 16

    def __post_init__(self) -> None:
        choices = {
            "stochastic": WHERE, "hadamard": WHERE, "convention": CONVENTIONS, "scale_rounding": SCALE_ROUNDINGS,
            "relaxation": RELAXATIONS, "scale_gradient": SCALE_GRADIENTS,
        }  # fmt: skip
        for field, values in choices.items():
            if getattr(self, field) not in values:
                raise MpqError(f"{field} is one of {', '.join(values)}, not {getattr(self, field)!r}")
        for name in filter(None, (self.format, self.activations, self.gradients)):
            format = parse_format(name)
            if not format.is_float_copy and (format.zero_point or not format.is_plain or format.grid.bits > 8):
                raise MpqError(f"invalid training format: expected a symmetric one of up to 8 bits, not {name}")
        if self.square_weights and self.format_of("weights").granularity != "group":
            raise MpqError(f"square tiles need a format with groups, not {self.format}")
        fixed = self.loss_scale
        if fixed != DYNAMIC and (isinstance(fixed, str) or not 0 < fixed < float("inf")):
            raise MpqError(f"loss_scale is a positive number or {DYNAMIC!r}, not {fixed!r}")
        if not 0 < self.steepness < float("inf"):
            raise MpqError(f"steepness is a positive number, not {self.steepness!r}")

    @property
    def fixed_loss_scale(self) -> float:
        """The loss scale of products that are given no dynamic one."""
        return 1.0 if isinstance(self.loss_scale, str) else self.loss_scale

    def format_of(self, role: str) -> Format:
        """The format of "weights", "activations" or "gradients"."""
        own = {"weights": "", "activations": self.activations, "gradients": self.gradients}[role]
        return parse_format(own or self.format)

    def rounds_stochastically(self, role: str, backward: bool) -> bool:
        """Whether an operand of this direction's products is rounded stochastically."""
        if backward and role != "gradients":
            return False
        return self.stochastic in ("all", "backward" if backward else "forward")

    def rotates(self, backward: bool) -> bool:
        """Whether operands of this direction's products are rotated."""
        return self.hadamard in ("all", "backward" if backward else "forward")

    @property
    def plain_gradient(self) -> bool:
        """Whether gradients pass the forward rounding as if it were the identity."""
        return self.relaxation == "straight-through" and self.scale_gradient == "none"
