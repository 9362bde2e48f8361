"""Mixes with assignments drawn at random, for tests."""

from mpq.core.allocation import Allocation
from mpq.core.assignment import random_assignment
from mpq.core.formats import parse_format
from mpq.core.mix import Mix, mix_of
from mpq.network.layers import find_layers

INTEGERS = ("int2-g4", "int3-g4", "int4-g4")


def random_mix(formats, rows, cols, seed=0) -> Mix:
    """A mix half-way between the smallest and the largest of its formats, with a random assignment."""
    parsed = [parse_format(name) for name in formats]
    bits = sum(8 * parsed[place].nbytes(rows, cols) / (rows * cols) for place in (0, -1)) / 2
    mix = mix_of(parsed, bits + 1 / cols)
    return random_assignment(mix, rows, cols, seed)


def mixed_allocation(model, formats=INTEGERS) -> Allocation:
    """Every layer of a model in a mix of its own."""
    layers = find_layers(model)
    mixes = {layer.name: random_mix(formats, layer.rows, layer.cols) for layer in layers}
    assignments = {name: mix.assignment for name, mix in mixes.items()}
    return Allocation(layers, tuple(mix.name for mix in mixes.values()), assignments=assignments)
