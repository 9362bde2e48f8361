"""Schemes: the formats of a layer's weight and optionally its input activations, or of cached keys or values."""

from dataclasses import dataclass, replace
from functools import lru_cache

from mpq.core.cache import cache_name, parse_cache_format
from mpq.core.errors import MpqError
from mpq.core.formats import Format, parse_format
from mpq.core.mix import Mix, is_mix, parse_mix

CACHED = "kv:"  # begins the names of schemes of keys and values


@dataclass(frozen=True)
class Scheme:
    """Formats of one layer; the weight's may be a mix (`mpq.core.mix`).

    `activation` quantizes the layer's input while it runs, with scales found on the fly; its granularity "channel" is
    spelt "token", since the rows of an activation are tokens. None leaves activations in floating point. A `cached`
    scheme is one of keys and values, not of a layer: `weight` is the format of a vector (`mpq.core.cache`).

    >>> parse_scheme("int4-g128+a:int8-token").activation.name
    'int8-channel'
    """

    weight: Format
    activation: Format | None = None
    cached: bool = False

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """The scheme called `name`: WEIGHT, WEIGHT+a:ACTIVATION or kv:FORMAT, as `parse_scheme`."""
        return parse_scheme(name)

    @property
    def name(self) -> str:
        """Canonical name: `parse_scheme(scheme.name) == scheme`."""
        if self.cached:
            return CACHED + cache_name(self.weight)
        if self.activation is None:
            return self.weight.name
        return f"{self.weight.name}+a:{self.activation.name.replace('-channel', '-token')}"

    def __str__(self) -> str:
        return self.name

    @property
    def mix(self) -> Mix | None:
        """The weight's format where it is a mix, else None."""
        return self.weight if isinstance(self.weight, Mix) else None

    def with_assignment(self, assignment: str) -> "Scheme":
        """The scheme with its mix's assignment; without one, itself."""
        return self if self.mix is None else replace(self, weight=self.mix.with_assignment(assignment))


@lru_cache(maxsize=1024)
def parse_scheme(name: str) -> Scheme:
    """The scheme called WEIGHT or WEIGHT+a:ACTIVATION, both formats' names; WEIGHT may be a mix. kv:FORMAT is one of
    keys and values.

    Raises:
        MpqError: an unknown format, or an activation format with a zero point, a minimum or a second level of scales.
    """
    if name.startswith(CACHED):
        return Scheme(parse_cache_format(name.removeprefix(CACHED)), cached=True)
    weight, plus, activation = name.partition("+a:")
    stored = parse_mix(weight) if is_mix(weight) else parse_format(weight)
    if not plus:
        return Scheme(stored)
    format = parse_format(activation.replace("-token", "-channel"))
    if format.tensor_scale or format.zero_point or not format.is_plain:
        raise MpqError(
            f"scheme {name!r}: activations take symmetric formats with one level of scales, not {format.name}"
        )
    return Scheme(stored, format)
