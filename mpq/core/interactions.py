"""Losses of single layers and of pairs of layers, for a quadratic program; one .npz file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.core.reading import reading


@dataclass(frozen=True, eq=False)
class Interactions:
    """Second-order model of an allocation's loss: sum_i losses[i, c_i] + sum_(i < j) pairs[i, c_i, j, c_j].

    c_i is the index of layer i's scheme.

    Raises:
        MpqError: shapes that do not fit, numbers that are not finite, pairs that are not symmetric, or that couple a
            layer with itself.
    """

    layers: tuple[str, ...]  # names
    schemes: tuple[str, ...]  # canonical names
    losses: NDArray[np.float64]  # (layers, schemes), loss increase of one layer alone in the scheme
    pairs: NDArray[np.float64]  # (layers, schemes, layers, schemes), loss of two layers beyond their own losses
    provenance: Mapping[str, Any] = field(default_factory=dict)  # JSON values: model, data, seed, method, ...

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.schemes))
        for name, expected in (("losses", shape), ("pairs", shape + shape)):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.shape != expected:
                raise MpqError(
                    f"invalid {name} of shape {values.shape}: expected {expected} for {shape[0]} layers and "
                    f"{shape[1]} schemes"
                )
            if not np.isfinite(values).all():
                raise MpqError(f"invalid {name}: {int((~np.isfinite(values)).sum())} numbers are NaN or infinite")
            object.__setattr__(self, name, values)
        if not np.array_equal(self.pairs, self.pairs.transpose(2, 3, 0, 1)):
            raise MpqError("invalid pairs: expected a symmetric array, pairs[i, a, j, b] == pairs[j, b, i, a]")
        if any(self.pairs[i, :, i].any() for i in range(shape[0])):
            raise MpqError(
                "invalid pairs: expected zeros on the diagonal blocks; a layer's own loss belongs in `losses`"
            )

    def total(self, choices: Sequence[int]) -> float:
        """The loss increase of an allocation: a scheme's index for each layer.

        >>> pairs = np.zeros((2, 1, 2, 1))
        >>> pairs[0, 0, 1, 0] = pairs[1, 0, 0, 0] = 0.5
        >>> Interactions(("a", "b"), ("int4-channel",), np.array([[1.0], [2.0]]), pairs).total([0, 0])
        3.5
        """
        every = np.arange(len(self.layers))
        coupled = self.pairs[every[:, None], np.array(choices)[:, None], every, np.array(choices)]
        return float(self.losses[every, choices].sum() + coupled.sum() / 2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .npz file, whole or not at all."""
        header = {"layers": self.layers, "schemes": self.schemes, "provenance": dict(self.provenance)}
        with write_atomically(path) as draft, draft.open("wb") as stream:
            np.savez_compressed(stream, losses=self.losses, pairs=self.pairs, facts=np.array(json.dumps(header)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Interactions":
        """Read what `save` wrote; MpqError when there is no such file or it is damaged."""
        with reading(path, "interactions", "measure them again"):
            with np.load(Path(path), allow_pickle=False) as file:
                header = json.loads(str(file["facts"]))
                losses, pairs = file["losses"], file["pairs"]
            return cls(tuple(header["layers"]), tuple(header["schemes"]), losses, pairs, dict(header["provenance"]))
