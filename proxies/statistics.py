"""Per-layer statistics of one pretrained model, the inputs of programs; a .npz file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.core.layer import Layer
from mpq.core.reading import reading
from mpq.proxies.benchmark import layer_of, record_of
from mpq.proxies.programs import INPUTS, LAYER

Numbers = NDArray[Any]  # float32 elements, float64 numbers of layers


@dataclass(frozen=True, eq=False)
class Space:
    """A matrix per layer, of which some rows and columns are kept; elements lie one layer after the other.

    Sums over a layer are scaled up to the whole matrix.
    """

    rows: NDArray[np.int64]  # (layers,), kept
    cols: NDArray[np.int64]
    all_rows: NDArray[np.int64]  # (layers,), of the whole matrix
    all_cols: NDArray[np.int64]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Kept elements of each layer, (layers,)."""
        return self.rows * self.cols

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First element of each layer, (layers,)."""
        return np.concatenate([[0], np.cumsum(self.counts)[:-1]])

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """Layer of each element, (elements,)."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def totals(self) -> NDArray[np.float64]:
        """Elements of the whole matrices, (layers,)."""
        return self.all_rows.astype(np.float64) * self.all_cols

    @cached_property
    def product(self) -> "Space":
        """The space of products of rows with rows: X Y^T of two of its matrices."""
        return Space(self.rows, self.rows, self.all_rows, self.all_rows)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Numbers of every layer, by the names that formulas use."""

    layers: tuple[Layer, ...]
    schemes: tuple[str, ...]  # canonical names
    spaces: Mapping[str, Space]  # "weight" and "activation"
    numbers: Mapping[str, Numbers]  # (1 or schemes, elements or layers), by name of INPUTS
    seconds: Mapping[str, float] = field(default_factory=dict)  # what collecting each took
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def space(self, name: str) -> Space:
        """The space of this name, those of products included."""
        return self.spaces[name[:-1]].product if name.endswith("'") else self.spaces[name]

    def get(self, name: str) -> Numbers:
        """The numbers of an input.

        Raises:
            MpqError: it was not collected.
        """
        if name not in self.numbers:
            raise MpqError(f"these statistics hold no {name!r}, only {', '.join(self.numbers)}: collect them with it")
        return self.numbers[name]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .npz file, whole or not at all."""
        header = {
            "layers": [record_of(layer) for layer in self.layers],
            "schemes": self.schemes, "seconds": dict(self.seconds), "provenance": dict(self.provenance),
        }  # fmt: skip
        arrays: dict[str, Any] = {f"numbers/{name}": value for name, value in self.numbers.items()}
        for name, space in self.spaces.items():
            arrays[f"space/{name}"] = np.stack([space.rows, space.cols, space.all_rows, space.all_cols])
        with write_atomically(path) as draft, draft.open("wb") as stream:
            np.savez_compressed(stream, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            MpqError: no such file, or one that is damaged or no statistics.
        """
        with reading(path, "statistics", "collect them again"):
            with np.load(Path(path), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(arrays.pop("header").tobytes())
            layers = tuple(layer_of(record) for record in header["layers"])
            spaces = {name[6:]: Space(*value) for name, value in arrays.items() if name.startswith("space/")}
            numbers = {name[8:]: value for name, value in arrays.items() if name.startswith("numbers/")}
            return cls(layers, tuple(header["schemes"]), spaces, numbers, header["seconds"], header["provenance"])

    def check(self, provenance: Mapping[str, Any]) -> None:
        """Refuse statistics of another model, data or settings.

        Raises:
            MpqError: a fact of `provenance` differs (named).
        """
        for name, value in provenance.items():
            if self.provenance.get(name) != value:
                what = {"weights": "another model", "data": "other data"}.get(name, f"another {name}")
                raise MpqError(f"these statistics are of {what}: delete the file to collect them again")


def expected_length(name: str, spaces: Mapping[str, Space], layers: int) -> int:
    """Number of an input's values for a scheme."""
    space = INPUTS[name][0].space
    return layers if space == LAYER else int(spaces[space].counts.sum())
