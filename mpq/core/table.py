"""Sensitivity tables: predicted loss increase and standard error of every layer and scheme; a CSV file."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from mpq.core.costs import weight_bytes
from mpq.core.edits import CHECKSUM, check_edits, checksum
from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.core.layer import Layer
from mpq.core.reading import reading
from mpq.core.scheme import parse_scheme

if TYPE_CHECKING:
    import pandas

COLUMNS = (
    "layer", "kind", "rows", "cols", "macs", "tie", "aliases", "window", "metric", "format", "bytes", "score", "error",
)  # fmt: skip
ROW_COUNT = "rows"  # header key: number of rows, so that a truncated file is detected
ASSIGNMENTS = "assignments"  # header key: which row of a layer has which format, for mixes
REASONS = "reasons"  # header key: reasons for missing scores


@dataclass(frozen=True, eq=False)
class SensitivityTable:
    """Scores of layers x schemes.

    Raises:
        MpqError: wrong shapes, a repeated name, an infinite score or error, a reason for a layer with scores, or an
            assignment that does not fit its mix.
    """

    layers: tuple[Layer, ...]
    schemes: tuple[str, ...]  # canonical scheme names
    scores: NDArray[np.float64]  # (layers, schemes), predicted loss increase; NaN: the layer cannot take the scheme
    errors: NDArray[np.float64]  # (layers, schemes), standard errors; 0 where the score is exact
    metric: str
    provenance: Mapping[str, Any] = field(default_factory=dict)  # JSON values: model, data, seed, method, ...
    reasons: Mapping[str, str] = field(default_factory=dict)  # why a layer has no scores (all NaN), by layer name
    assignments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by layer and mix (`mpq.core.mix.Mix`)

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.schemes))
        for what, names in (("layer", [layer.name for layer in self.layers]), ("scheme", list(self.schemes))):
            if len(set(names)) < len(names):
                raise MpqError(f"{what} {_first_repeated(names)!r} occurs twice in a table: expected each {what} once")
        for field_name in ("scores", "errors"):
            values = np.asarray(getattr(self, field_name), dtype=np.float64)
            if values.shape != shape:
                raise MpqError(f"invalid {field_name} of shape {values.shape}: expected {shape}, (layers, schemes)")
            for row, column in np.argwhere(np.isinf(values)):
                layer, scheme = self.layers[row].name, self.schemes[column]
                raise MpqError(
                    f"infinite {self.metric} {field_name} of layer {layer} in {scheme}: use NaN to forbid a scheme"
                )
            object.__setattr__(self, field_name, values)
        without = {layer.name for layer, row in zip(self.layers, self.scores, strict=True) if np.isnan(row).all()}
        for name in self.reasons:
            if name not in without:
                raise MpqError(f"a reason for missing scores names {name}: expected a layer whose scores are all NaN")
        known = {layer.name: layer for layer in self.layers}
        for name, mixes in self.assignments.items():
            for scheme, assignment in mixes.items():
                mix = parse_scheme(scheme).mix
                if name not in known or scheme not in self.schemes or mix is None:
                    raise MpqError(
                        f"unexpected assignment of rows for {name} in {scheme}: expected a layer and a mix of the table"
                    )
                mix.with_assignment(assignment).assigned(known[name].rows, known[name].cols)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SensitivityTable):
            return NotImplemented
        return (
            (self.layers, self.schemes, self.metric) == (other.layers, other.schemes, other.metric)
            and np.array_equal(self.scores, other.scores, equal_nan=True)
            and np.array_equal(self.errors, other.errors, equal_nan=True)
            and dict(self.provenance) == dict(other.provenance)
            and dict(self.reasons) == dict(other.reasons)
            and dict(self.assignments) == dict(other.assignments)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def entries(self) -> tuple[Layer, ...]:
        """Keys and values among the layers."""
        return tuple(layer for layer in self.layers if layer.is_cached)

    def weights(self) -> "SensitivityTable":
        """The table without keys and values, and without their schemes."""
        rows = [i for i, layer in enumerate(self.layers) if not layer.is_cached]
        columns = [j for j, scheme in enumerate(self.schemes) if not parse_scheme(scheme).cached]
        if len(rows) == len(self.layers):
            return self
        return replace(
            self, layers=tuple(self.layers[i] for i in rows), schemes=tuple(self.schemes[j] for j in columns),
            scores=self.scores[np.ix_(rows, columns)], errors=self.errors[np.ix_(rows, columns)],
        )  # fmt: skip

    def with_entries(
        self, entries: Sequence[Layer], schemes: Sequence[str], scores: NDArray[np.float64], errors: NDArray[np.float64]
    ) -> "SensitivityTable":
        """The table with keys and values in schemes of their own; scores and errors (entries, schemes)."""

        def beside(own: NDArray[np.float64], added: NDArray[np.float64]) -> NDArray[np.float64]:
            whole = np.full((len(self.layers) + len(entries), len(self.schemes) + len(schemes)), np.nan)
            whole[: len(self.layers), : len(self.schemes)] = own
            whole[len(self.layers) :, len(self.schemes) :] = added
            return whole

        return replace(
            self, layers=(*self.layers, *entries), schemes=(*self.schemes, *schemes),
            scores=beside(self.scores, scores), errors=beside(self.errors, errors),
        )  # fmt: skip

    def rows(self) -> Iterable[tuple[Any, ...]]:
        """One tuple per layer and scheme, in the order of COLUMNS."""
        for i, layer in enumerate(self.layers):
            leading = (
                layer.name,
                layer.kind,
                layer.rows,
                layer.cols,
                layer.macs,
                layer.tie,
                " ".join(map(quote, layer.aliases)),
                layer.window,
            )
            for j, scheme in enumerate(self.schemes):
                stored = weight_bytes(parse_scheme(scheme), layer.rows, layer.cols)
                yield (*leading, self.metric, scheme, stored, float(self.scores[i, j]), float(self.errors[i, j]))

    def to_pandas(self) -> "pandas.DataFrame":
        """A data frame in long form: a row per layer and scheme, columns COLUMNS."""
        import pandas

        return pandas.DataFrame.from_records(list(self.rows()), columns=list(COLUMNS))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file, atomically; `pandas.read_csv(path, comment="#")` reads it.

        Its first line is `# ` and the provenance as JSON, with a checksum. Numbers are written exactly, so `load`
        returns an equal table.
        """
        reasons = {REASONS: dict(self.reasons)} if self.reasons else {}
        mixes_of = {name: dict(mixes) for name, mixes in self.assignments.items()}
        assigned = {ASSIGNMENTS: mixes_of} if mixes_of else {}
        header = {**self.provenance, **reasons, **assigned, ROW_COUNT: len(self.layers) * len(self.schemes)}
        body = io.StringIO()
        writer = csv.writer(body, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((*row[:-2], repr(row[-2]), repr(row[-1])) for row in self.rows())
        header[CHECKSUM] = checksum(header, body.getvalue())
        with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
            stream.write(f"# {json.dumps(header)}\n{body.getvalue()}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SensitivityTable":
        """Read a file written by `save`; one edited since loads with a warning and sets `provenance["edited"]`.

        Raises:
            MpqError: a missing, truncated or invalid file.
        """
        with reading(path, "sensitivity table", "profile again"), open(path, newline="", encoding="utf-8") as stream:
            return _parse(path, stream.read())


def _parse(path: str | os.PathLike[str], text: str) -> SensitivityTable:
    if not text.endswith("\n"):
        raise ValueError("the last line is cut")
    provenance: dict[str, Any] = {}
    if text.startswith("#"):
        first, text = text.split("\n", 1)
        provenance = dict(json.loads(first[1:]))
    recorded, header = provenance.pop(CHECKSUM, None), dict(provenance)
    records = list(csv.DictReader(io.StringIO(text), strict=True))
    if not records:
        raise ValueError("no rows")
    if len(records) != provenance.pop(ROW_COUNT, len(records)):
        raise ValueError("rows are missing")
    reasons, assignments = provenance.pop(REASONS, {}), provenance.pop(ASSIGNMENTS, {})
    layers = tuple(dict.fromkeys(_layer(record) for record in records))
    schemes = tuple(dict.fromkeys(parse_scheme(record["format"]).name for record in records))
    metrics = {record["metric"] for record in records}
    if len(metrics) > 1:
        raise ValueError(f"several metrics in one table: {', '.join(sorted(metrics))}")
    if [(_layer(record), parse_scheme(record["format"]).name) for record in records] != [
        (layer, scheme) for layer in layers for scheme in schemes
    ]:
        raise ValueError("not every layer has every format, in the same order")
    numbers = np.array([[float(record["score"]), float(record["error"])] for record in records])
    scores, errors = numbers.T.reshape(2, len(layers), len(schemes))
    provenance |= check_edits(path, recorded, header, text)
    return SensitivityTable(
        layers, schemes, scores.copy(), errors.copy(), metrics.pop(), provenance, reasons, assignments
    )


def _layer(record: Mapping[str, str]) -> Layer:
    sizes = (int(record["rows"]), int(record["cols"]), int(record["macs"]))
    if min(sizes) < 0 or math.prod(sizes[:2]) == 0:
        raise ValueError(f"layer {record['layer']} of {sizes[0]} x {sizes[1]} weights")
    aliases = tuple(map(unquote, (record.get("aliases") or "").split()))
    window = int(record.get("window") or 0)
    return Layer(record["layer"], record["kind"], *sizes, tie=record["tie"], aliases=aliases, window=window)


def _first_repeated(names: list[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])
