"""Measured seconds of layers on one machine, as a cost for searches. Needs no torch."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpq.core.errors import MpqError, nearest_names
from mpq.core.files import write_atomically
from mpq.core.layer import Layer
from mpq.core.mix import is_mix
from mpq.core.reading import reading
from mpq.core.scheme import Scheme, parse_scheme


@dataclass(frozen=True)
class Latency:
    """One measurement: the median seconds of a (rows, cols) layer in a scheme for `batch` tokens.

    Or the share of keys or values, `rows` heads of `cols`, in one token's attention to `context` tokens of each of
    `batch` texts.
    """

    scheme: str  # canonical name
    rows: int
    cols: int
    batch: int
    seconds: float
    kind: str = ""  # "keys" or "values"; "" for a layer
    context: int = 0  # tokens of keys or values


@dataclass(frozen=True)
class LatencyTable:
    """Measurements on one machine. `provenance` describes it: bandwidth in bytes per second, threads, instructions."""

    entries: tuple[Latency, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, scheme: Scheme | str, rows: int, cols: int, batch: int = 1) -> float:
        """Seconds of a layer: as measured, or interpolated by its number of weights.

        Outside the range of measured shapes, seconds are proportional to the number of weights. A mix that was not
        measured is interpolated between its formats by bits, times the median overhead of the measured mixes over such
        interpolations.

        Raises:
            MpqError: nothing was measured for the scheme and the batch; of a mix, for one of its formats or any mix.
        """
        parsed = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        name = str(parsed)
        entries = [entry for entry in self.entries if entry.scheme == name and entry.batch == batch]
        if not entries and parsed.mix is not None:
            overheads = [
                entry.seconds / self._interpolated(parse_scheme(entry.scheme), entry.rows, entry.cols, batch)
                for entry in self.entries
                if entry.batch == batch and is_mix(entry.scheme)
            ]
            if overheads:
                return statistics.median(overheads) * self._interpolated(parsed, rows, cols, batch)
        if not entries:
            known = sorted({f"{entry.scheme} at batch {entry.batch}" for entry in self.entries})
            raise MpqError(
                f"no measured latency for {name} at batch {batch}: "
                f"{nearest_names(f'{name} at batch {batch}', known)}; 'mpq bench' measures it"
            )
        for entry in entries:
            if (entry.rows, entry.cols) == (rows, cols):
                return entry.seconds
        return _between(((entry.rows * entry.cols, entry.seconds) for entry in entries), rows * cols)

    def attention_seconds(self, scheme: Scheme, entry: Layer, context: int, batch: int = 1) -> float:
        """Seconds of reading keys or values in a format in one token's attention to `context` tokens of each text.

        Interpolated by the number of cached elements, as layers are by weights.

        Raises:
            MpqError: nothing was measured for the format and the batch.
        """
        factors = [
            (one.rows * one.cols * one.context, one.seconds)
            for one in self.entries
            if (one.scheme, one.kind, one.batch) == (scheme.name, entry.kind, batch)
        ]
        if not factors:
            known = sorted({f"{one.scheme} at batch {one.batch}" for one in self.entries if one.kind == entry.kind})
            raise MpqError(
                f"no measured latency for {entry.kind} in {scheme.name} at batch {batch}: "
                f"{nearest_names(f'{scheme.name} at batch {batch}', known)}; 'mpq bench --attention' measures it"
            )
        return _between(factors, entry.params * entry.tokens(context))

    def _interpolated(self, scheme: Scheme, rows: int, cols: int, batch: int) -> float:
        """Seconds of a mix, interpolated between its formats by stored bits."""
        assert scheme.mix is not None
        parts = [replace(scheme, weight=format) for format in scheme.mix.formats]
        points = sorted((p.weight.effective_bits(rows, cols), self.seconds(p, rows, cols, batch)) for p in parts)
        bits, times = np.array(points).T
        return float(np.interp(scheme.mix.bits, bits, times))

    @property
    def has_attention(self) -> bool:
        """Whether attention was measured: otherwise keys and values count nothing."""
        return any(entry.kind for entry in self.entries)

    @property
    def has_mixes(self) -> bool:
        """Whether some mix of formats was measured."""
        return any(is_mix(entry.scheme) for entry in self.entries)

    def cost(self, batch: int = 1, context: int = 0) -> Callable[[Layer, Scheme], float]:
        """Seconds of a layer in a scheme: a cost function.

        Keys and values count where attention was measured and there is a context.
        """
        counted = self.has_attention and context > 0

        def seconds(layer: Layer, scheme: Scheme) -> float:
            if layer.is_cached:
                return self.attention_seconds(scheme, layer, context, batch) if counted else 0.0
            return self.seconds(scheme, layer.rows, layer.cols, batch)

        return seconds

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically."""
        content = {"provenance": dict(self.provenance), "entries": [asdict(entry) for entry in self.entries]}
        with write_atomically(path) as draft:
            draft.write_text(json.dumps(content, indent=1))


def _between(measured: Iterable[tuple[int, float]], size: int) -> float:
    """Seconds of a size, from (size, seconds): proportional to it outside of what was measured."""
    sizes, times = np.array(sorted(measured), dtype=float).T
    if size <= sizes[0]:
        return float(times[0] * size / sizes[0])
    if size >= sizes[-1]:
        return float(times[-1] * size / sizes[-1])
    return float(np.interp(size, sizes, times))


def load_latencies(path: str | Path) -> LatencyTable:
    """Read a table written by `LatencyTable.save`.

    Raises:
        MpqError: a missing or invalid file.
    """
    with reading(path, "latency table", "write one with 'mpq bench'"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return LatencyTable(tuple(Latency(**entry) for entry in content["entries"]), dict(content["provenance"]))
