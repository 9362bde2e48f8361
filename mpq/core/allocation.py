"""An allocation: one scheme for each layer, with its cost and predicted loss; a JSON file."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mpq.core.cache_formats import CacheFormats
from mpq.core.costs import bitops, weight_bytes
from mpq.core.edits import CHECKSUM, check_edits, checksum
from mpq.core.errors import MpqError
from mpq.core.files import write_atomically
from mpq.core.layer import Layer
from mpq.core.prediction import predicts_loss
from mpq.core.reading import reading
from mpq.core.scheme import Scheme, parse_scheme

KIND = "mpq-allocation"  # value of a file's "kind"


@dataclass(frozen=True, repr=False)
class Allocation:
    """Layers with a scheme for each.

    Raises:
        MpqError: not one scheme for each layer, a scheme of unknown name, or an assignment that fits no mix.

    >>> allocation = Allocation((Layer("a", "linear", 64, 64), Layer("b", "linear", 64, 64)), ("int4-channel", "bf16"))
    >>> allocation.bits, allocation.scheme_of["b"].name
    (10.125, 'bf16')
    """

    layers: tuple[Layer, ...]
    schemes: tuple[str, ...]  # canonical names, one for each layer
    loss: float = math.nan  # predicted loss increase; NaN where unknown
    error: float = math.nan  # its standard error
    metric: str = ""  # metric that predicted the loss
    overhead: int = 0  # bytes of tensors that no scheme changes: norms, biases, layers left out
    provenance: Mapping[str, Any] = field(default_factory=dict)  # JSON values
    assignments: Mapping[str, str] = field(default_factory=dict)  # rows' formats, by layer (`mpq.core.mix.Mix`)
    cache: CacheFormats | None = None  # formats of keys and values; None leaves them in the model's floating point

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.schemes):
            raise MpqError(
                f"invalid allocation of {len(self.schemes)} schemes: expected one scheme for each of "
                f"{len(self.layers)} layers"
            )
        object.__setattr__(self, "schemes", tuple(parse_scheme(name).name for name in self.schemes))
        _check_assignments(self)

    def __repr__(self) -> str:
        loss = f", predicted loss +{self.loss:.4g}" if predicts_loss(self.metric) else f", score {self.loss:.4g}"
        loss = "" if math.isnan(self.loss) else loss
        counts = Counter(self.schemes).most_common()
        more = f", and {len(counts) - 4} more" if len(counts) > 4 else ""
        summary = ", ".join(f"{count} x {scheme}" for scheme, count in counts[:4]) + more
        if self.cache is not None:
            summary += f"; cache at {self.cache.bits:.3f} bits"
        return f"Allocation({len(self.layers)} layers at {self.bits:.3f} bits{loss}: {summary})"

    @property
    def scheme_of(self) -> dict[str, Scheme]:
        """Scheme by layer name; a mix knows its assignment, where there is one."""
        pairs = zip(self.layers, self.schemes, strict=True)
        assignments = self.assignments
        return {
            layer.name: parse_scheme(name).with_assignment(assignments.get(layer.name, "")) for layer, name in pairs
        }

    @property
    def size(self) -> int:
        """Stored bytes of the layers' weights, including scales and padding, without `overhead`."""
        pairs = zip(self.layers, self.schemes, strict=True)
        return sum(weight_bytes(parse_scheme(name), layer.rows, layer.cols) for layer, name in pairs)

    @property
    def total(self) -> int:
        """Stored bytes of the whole model."""
        return self.size + self.overhead

    def memory(self, context: int, batch: int = 1) -> int:
        """Bytes of the whole model, and of keys and values after `context` tokens of each of `batch` texts."""
        return self.total + (self.cache.nbytes(context, batch) if self.cache is not None else 0)

    @property
    def bits(self) -> float:
        """Stored bits for each weight, averaged over all weights of the layers."""
        return 8 * self.size / sum(layer.params for layer in self.layers)

    @property
    def bitops(self) -> float:
        """Bit operations of one sample (`mpq.core.costs.bitops`)."""
        return sum(bitops(self.scheme_of[layer.name], layer.macs) for layer in self.layers)

    def with_schemes(self, schemes: Mapping[str, str | Scheme]) -> "Allocation":
        """A copy with other schemes for some layers, by name; the predicted loss becomes NaN.

        A mix given as a Scheme keeps its assignment.

        Raises:
            MpqError: an unknown layer.
        """
        unknown = schemes.keys() - {layer.name for layer in self.layers}
        if unknown:
            raise MpqError(f"unknown layer {sorted(unknown)[0]!r}: expected names of this allocation's layers")
        changed = (str(schemes.get(layer.name, old)) for layer, old in zip(self.layers, self.schemes, strict=True))
        given = {name: one.mix for name, one in schemes.items() if isinstance(one, Scheme) and one.mix is not None}
        kept = {name: text for name, text in self.assignments.items() if name not in schemes}
        kept |= {name: mix.assignment for name, mix in given.items() if mix.assignment}
        return replace(self, schemes=tuple(changed), loss=math.nan, error=math.nan, assignments=kept)

    def with_cache(self, cache: CacheFormats | None) -> "Allocation":
        """A copy with other formats of keys and values; the predicted loss becomes NaN."""
        return replace(self, cache=cache, loss=math.nan, error=math.nan)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON with a checksum, atomically; `load` returns an equal allocation."""
        values = self.to_json()
        values[CHECKSUM] = checksum(values)
        with write_atomically(path) as draft:
            draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """The allocation as JSON values; `bits` and `size` are for readers and recomputed on loading."""
        pairs = zip(self.layers, self.schemes, strict=True)
        return {
            "kind": KIND,
            "version": 1,
            "bits": self.bits,
            "size": self.size,
            "overhead": self.overhead,
            "metric": self.metric,
            "loss": _json_number(self.loss),
            "error": _json_number(self.error),
            "provenance": dict(self.provenance),
            "layers": {layer.name: {"scheme": name, **_record(layer)} for layer, name in pairs},
            **({"assignments": dict(self.assignments)} if self.assignments else {}),
            **({"cache": self.cache.to_json()} if self.cache is not None else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Allocation":
        """The inverse of `to_json`; KeyError, TypeError or ValueError for invalid values."""
        if values["kind"] != KIND or values["version"] != 1:
            raise ValueError(f"kind {values['kind']!r} version {values['version']}, not {KIND!r} version 1")
        layers = tuple(_layer(name, record) for name, record in values["layers"].items())
        schemes = tuple(record["scheme"] for record in values["layers"].values())
        allocation = cls(
            layers, schemes, _number(values["loss"]), _number(values["error"]),
            str(values["metric"]), int(values["overhead"]), dict(values["provenance"]),
            dict(values.get("assignments", {})),
            CacheFormats.from_json(values["cache"]) if "cache" in values else None,
        )  # fmt: skip
        if not layers:
            raise ValueError("it has no layers")
        if allocation.size != values["size"]:
            raise ValueError(f"the schemes take {allocation.size} bytes, the file says {values['size']}")
        return allocation

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Allocation":
        """Read a file written by `save`; one edited since loads with a warning and sets `provenance["edited"]`.

        Raises:
            MpqError: a missing or invalid file.
        """
        with reading(path, "allocation", "allocate again"):
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            read = cls.from_json(values)
            recorded = values.pop(CHECKSUM, None)
            return replace(read, provenance={**read.provenance, **check_edits(path, recorded, values)})


def check_allocation(value: object) -> Allocation:
    """Return the value if it is an Allocation; MpqError otherwise."""
    if not isinstance(value, Allocation):
        raise MpqError(
            f"expected an Allocation, not {value!r:.80}: use frontier.at(bits=4), or one of frontier.uniform() for a "
            "single format"
        )
    return value


def _check_assignments(allocation: Allocation) -> None:
    known = dict(zip((layer.name for layer in allocation.layers), allocation.layers, strict=True))
    schemes = allocation.scheme_of if allocation.assignments else {}
    for name in allocation.assignments:
        mix = schemes[name].mix if name in known else None
        if mix is None:
            raise MpqError(f"unexpected assignment of rows for {name}: expected a layer with a mix")
        mix.assigned(known[name].rows, known[name].cols)


def _record(layer: Layer) -> dict[str, Any]:
    return {item.name: getattr(layer, item.name) for item in fields(layer) if item.name not in ("name", "window")}


def _layer(name: str, record: Mapping[str, Any]) -> Layer:
    sizes = {field_name: int(record[field_name]) for field_name in ("rows", "cols", "macs")}
    if sizes["rows"] < 1 or sizes["cols"] < 1 or sizes["macs"] < 0:
        raise ValueError(f"layer {name} of {sizes['rows']} x {sizes['cols']} weights")
    return Layer(name, str(record["kind"]), **sizes, tie=str(record["tie"]), aliases=tuple(record["aliases"]))


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    number = math.nan if value is None else float(value)
    if math.isinf(number):
        raise ValueError("an infinite loss")
    return number
