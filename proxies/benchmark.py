"""A ranking benchmark: random configurations of one model, each measured after post-training quantization.

Proxies are judged by how they rank its rows, as on EMQ's MQ-Bench-101 (arXiv 2307.10554, section 4).
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mpq.core.costs import bitops, weight_bytes
from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.core.layer import Layer
from mpq.core.reading import reading
from mpq.core.scheme import parse_scheme
from mpq.network.fingerprint import model_fingerprint

COLUMNS = ("configuration", "loss", "accuracy")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # a configuration is spelt one digit per layer, an index of schemes


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Measured configurations of one model."""

    layers: tuple[Layer, ...]
    schemes: tuple[str, ...]  # canonical names
    choices: NDArray[np.int64]  # (rows, layers), indices of schemes
    losses: NDArray[np.float64]  # (rows,), mean loss per sample
    accuracies: NDArray[np.float64]  # (rows,), share of right answers; NaN where the data has no class labels
    provenance: Mapping[str, Any] = field(default_factory=dict)  # settings of the run, and the model's fingerprint

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def quality(self) -> NDArray[np.float64]:
        """Target of the ranking, (rows,), more is better: accuracy where it was measured, else minus the loss."""
        return -self.losses if np.isnan(self.accuracies).any() else self.accuracies

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Stored bytes of each configuration's weights, (rows,)."""
        table = [[weight_bytes(parse_scheme(name), x.rows, x.cols) for name in self.schemes] for x in self.layers]
        return self.totals(np.array(table, dtype=np.float64)).astype(np.int64)

    @property
    def bitops(self) -> NDArray[np.float64]:
        """Bit operations of each configuration, (rows,)."""
        return self.totals(
            np.array([[bitops(parse_scheme(name), x.macs) for name in self.schemes] for x in self.layers])
        )

    def totals(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over layers of table (layers, schemes) at each configuration's schemes, (rows,)."""
        sums: NDArray[np.float64] = table[np.arange(len(self.layers)), self.choices].sum(1)
        return sums

    def take(self, rows: Sequence[int] | NDArray[Any]) -> "Benchmark":
        """Some of the rows."""
        rows = np.asarray(rows)
        return Benchmark(
            self.layers, self.schemes, self.choices[rows], self.losses[rows], self.accuracies[rows], self.provenance
        )

    def halves(self, seed: int = 0) -> tuple["Benchmark", "Benchmark"]:
        """A half for evolution and a held-out half; a random split that depends only on the seed."""
        order = np.random.default_rng([seed, len(self)]).permutation(len(self))
        middle = (len(self) + 1) // 2
        return self.take(np.sort(order[:middle])), self.take(np.sort(order[middle:]))

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that is not the measured one.

        Raises:
            MpqError: its weights differ.
        """
        if model_fingerprint(model) != self.provenance.get("weights"):
            named = self.provenance.get("model", "another model")
            raise MpqError(
                f"this benchmark was measured on {named} with other weights than this {type(model).__name__}'s: "
                "load that model, or measure this one with 'mpq proxy bench'"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file, whole or not at all. Its first line is `# ` and the provenance and layers as JSON."""
        with write_atomically(path) as draft:
            draft.write_text(self.to_csv(), encoding="utf-8")

    def to_csv(self) -> str:
        """The text of the file."""
        header = {
            **self.provenance,
            "layers": [record_of(layer) for layer in self.layers],
            "schemes": list(self.schemes),
            "rows": len(self),
        }
        stream = io.StringIO()
        stream.write(f"# {json.dumps(header)}\n")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for choice, loss, accuracy in zip(self.choices, self.losses, self.accuracies, strict=True):
            writer.writerow((spell(choice), repr(float(loss)), "" if np.isnan(accuracy) else repr(float(accuracy))))
        return stream.getvalue()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Benchmark":
        """Read what `save` wrote.

        Raises:
            MpqError: no such file, or one that is truncated or no benchmark.
        """
        with reading(path, "benchmark", "measure it again"):
            return _parse(Path(path).read_text(encoding="utf-8"))


def _parse(text: str) -> Benchmark:
    first, _, rest = text.partition("\n")
    if not first.startswith("# ") or not text.endswith("\n"):
        raise ValueError("the first line is no JSON, or the last line is cut")
    header = json.loads(first[2:])
    layers = tuple(layer_of(layer_record) for layer_record in header.pop("layers"))
    schemes = tuple(parse_scheme(name).name for name in header.pop("schemes"))
    records = list(csv.DictReader(io.StringIO(rest), strict=True))
    if len(records) != header.pop("rows"):
        raise ValueError("rows are missing")
    choices = np.array([[DIGITS.index(digit) for digit in record["configuration"]] for record in records])
    if choices.shape != (len(records), len(layers)) or choices.max(initial=0) >= len(schemes):
        raise ValueError("configurations do not fit the layers and schemes")
    losses = np.array([float(record["loss"]) for record in records])
    accuracies = np.array([float(record["accuracy"] or "nan") for record in records])
    return Benchmark(layers, schemes, choices, losses, accuracies, header)


def spell(choice: Iterable[int]) -> str:
    """A configuration as one digit per layer."""
    return "".join(DIGITS[index] for index in choice)


def layer_of(record: Sequence[Any]) -> Layer:
    """The inverse of `record_of`."""
    name, kind, rows, cols, macs, tie, aliases = record
    return Layer(name, kind, rows, cols, macs, tie, tuple(aliases))


def record_of(layer: Layer) -> list[Any]:
    """A layer as JSON values."""
    return [layer.name, layer.kind, layer.rows, layer.cols, layer.macs, layer.tie, list(layer.aliases)]
