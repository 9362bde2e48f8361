"""Models of hardware for searches: the area of a multiply-accumulate unit, and the roofline of a machine.

They rank formats; what a chip or a machine really takes is measured (`mpq bench`, `mpq.core.latency`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mpq.core.costs import FLOAT_ACTIVATION_BITS, weight_bytes
from mpq.core.formats import Format, parse_format
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme

ACCUMULATOR = 32  # bits


def mac_area(scheme: Scheme) -> float:
    """Area of a unit that multiplies in a scheme's two formats and accumulates in 32 bits, in one-bit full adders.

    A significand product takes an adder for each pair of bits, the accumulator one a bit; floats add their exponents
    and shift the product into place, half an adder for each multiplexer of a logarithmic shifter. For int8 that is 96:
    Horowitz (ISSCC 2014, 45 nm) gives 282 + 137 square micrometres, 98 of the adders that a 32-bit adder is made of.
    Formats that are looked up (nf4) count as floats of their bits; mixes count as their widest format.
    """
    weight = max(scheme.weight.members, key=lambda format: format.grid.bits)
    activation = parse_format("bf16") if scheme.activation is None else scheme.activation
    operands = [_parts(weight), _parts(activation)]
    (one, _), (other, _) = operands
    area = float(one * other + ACCUMULATOR)
    exponents = [exponent for _, exponent in operands if exponent]
    if exponents:
        area += max(exponents) + 1 + 0.5 * ACCUMULATOR * math.log2(ACCUMULATOR)
    return area


def _parts(format: Format) -> tuple[int, int]:
    """Bits of the significand, its sign or leading one included, and of the exponent."""
    grid = format.grid
    if format.is_float_copy:
        return {"fp32": (24, 8), "fp16": (11, 5), "bf16": (8, 8)}[grid.name]
    if grid.family == "float":
        return grid.mantissa + 1, grid.exponent
    return (grid.bits, 0) if grid.family == "int" else (grid.bits, 1)


def area(layer: Layer, scheme: Scheme) -> float:
    """Area of the units that finish a layer's products in a given number of cycles: their number times `mac_area`."""
    return layer.macs * mac_area(scheme)


@dataclass(frozen=True)
class Machine:
    """A machine by its roofline: it moves weights and multiplies at the same time, and waits for the slower.

    The defaults are a machine of 100 16-bit multiply-accumulates for each byte it reads, twice as many for each halving
    of the wider operand, as GPUs and matrix units have them.
    """

    bytes_per_second: float = 1e12
    macs_per_second: Mapping[int, float] = field(  # by bits of the wider operand: the next larger key counts
        default_factory=lambda: {4: 4e14, 8: 2e14, 16: 1e14, 32: 0.5e14}
    )

    def seconds(self, layer: Layer, scheme: Scheme) -> float:
        """Of a layer for one sample: a cost function."""
        activation = FLOAT_ACTIVATION_BITS if scheme.activation is None else scheme.activation.grid.bits
        widest = max(activation, *(format.grid.bits for format in scheme.weight.members))
        known = [bits for bits in sorted(self.macs_per_second) if bits >= widest] or [max(self.macs_per_second)]
        return max(
            weight_bytes(scheme, layer.rows, layer.cols) / self.bytes_per_second,
            layer.macs / self.macs_per_second[known[0]],
        )
