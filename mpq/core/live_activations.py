"""Peak memory of activations: what is live while a model runs, as a cost of an allocation. Needs no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme, parse_scheme

ACTIVATIONS = "activations"  # name of the cost


@dataclass(frozen=True)
class LayerInput:
    """A tensor that layers alone read: it can be stored in the widest of their activation formats."""

    rows: int  # tokens, or positions of an image
    cols: int
    nbytes: int  # in the model's floating point
    readers: tuple[str, ...]  # names of layers

    def stored(self, scheme: Scheme | None) -> int:
        """Bytes in a scheme's activation format; as floats where it has none."""
        if scheme is None or scheme.activation is None:
            return self.nbytes
        return min(self.nbytes, scheme.activation.nbytes(self.rows, self.cols))


@dataclass(frozen=True)
class Moment:
    """Tensors that are live at once."""

    floats: int  # bytes of tensors that others than layers read too
    inputs: tuple[LayerInput, ...]
    module: str  # the module that runs

    def nbytes(self, scheme_of: Mapping[str, Scheme]) -> int:
        """Bytes of all with these schemes by layer name."""
        return self.total(lambda one, name: one.stored(scheme_of.get(name)))

    def total(self, stored: Callable[[LayerInput, str], int]) -> int:
        """Bytes of all, of an input as much as its layer of most needs; `stored(input, layer name)` counts them."""
        return self.floats + sum(max(stored(one, name) for name in one.readers) for one in self.inputs)


@dataclass(frozen=True)
class LiveActivations:
    """Moments of one pass of `batch` samples, or texts of `context` tokens, at which most can be live."""

    moments: tuple[Moment, ...]
    batch: int
    context: int = 0  # tokens of a text; 0 for other samples

    def peak(self, scheme_of: Mapping[str, Scheme]) -> int:
        """Largest bytes that are live at once."""
        return max((moment.nbytes(scheme_of) for moment in self.moments), default=0)

    def where(self, scheme_of: Mapping[str, Scheme]) -> str:
        """The module that runs at the peak."""
        return max(self.moments, key=lambda moment: moment.nbytes(scheme_of)).module if self.moments else ""

    def check(self, limit: float, layers: Sequence[Layer], schemes: Sequence[str]) -> None:
        """MpqError when a limit is below the peak of the smallest formats."""
        parsed = [scheme for scheme in map(parse_scheme, schemes) if not scheme.cached]
        names = {layer.name for layer in layers}

        def smallest(one: LayerInput, name: str) -> int:
            return min(map(one.stored, parsed)) if name in names else one.nbytes

        least = max((moment.total(smallest) for moment in self.moments), default=0)
        if limit < least:
            raise MpqError(
                f"a budget of {limit:,.0f} bytes of activations is too small: the smallest formats take {least:,}"
                f"{self.conditions}: raise it, lower the batch or the context, or add activation formats (a:int8-token)"
            )

    @property
    def conditions(self) -> str:
        """What was counted, in words."""
        return f" for {self.batch} x {self.context:,} tokens" if self.context else f" for {self.batch} samples"

    def sentence(self, scheme_of: Mapping[str, Scheme]) -> str:
        """The peak, in words, and that of floats where formats lower it."""
        peak, floats = self.peak(scheme_of), self.peak({})
        beside = f", {floats:,} in floating point" if floats != peak else ""
        return (
            f"Activations take at most {peak:,} bytes at once{self.conditions} (in {self.where(scheme_of)}){beside}: "
            "an operation's own buffers come on top."
        )

    def constraints(
        self, layers: Sequence[Layer], schemes: Sequence[str], limit: float
    ) -> Iterator[tuple[NDArray[np.float64], float]]:
        """Linear costs (layers, schemes) and their limits that together keep the peak within `limit`.

        The largest of several readers is what one constraint for each of them bounds.
        """
        rows = {layer.name: i for i, layer in enumerate(layers)}
        parsed = [parse_scheme(name) for name in schemes]
        for moment in self.moments:
            if moment.nbytes({}) <= limit:
                continue
            for readers in product(*(one.readers for one in moment.inputs)):
                cost = np.zeros((len(layers), len(schemes)))
                left = limit - moment.floats
                for one, name in zip(moment.inputs, readers, strict=True):
                    if name in rows:
                        cost[rows[name]] += [0 if scheme.cached else one.stored(scheme) for scheme in parsed]
                    else:
                        left -= one.nbytes
                yield cost, left
