"""Printing of results."""

import argparse
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mpq.core.prediction import prediction_name, predicts_loss
from mpq.core.taxonomy import classify

if TYPE_CHECKING:
    from mpq.core.allocation import Allocation
    from mpq.core.cache_formats import CacheFormats
    from mpq.core.frontier import Frontier
    from mpq.core.table import SensitivityTable


def summary(frontier: "Frontier", allocation: "Allocation") -> str:
    """One sentence on the chosen allocation."""
    proof = "proven optimal" if frontier.gap == 0 else f"within {100 * frontier.gap:.2g} % of the optimum"
    if "measured_loss" in allocation.provenance:
        proof = f"measured loss increase {allocation.provenance['measured_loss']:.4g}"
    predicted = f"{prediction_name(allocation.metric)} {allocation.loss:.4g} +- {allocation.error:.1g}"
    cache = "" if allocation.cache is None else f"cache at {allocation.cache.bits:.4f} bits, "
    return (
        f"{allocation.bits:.4f} bits per weight, {allocation.total:,} bytes in all, {cache}"
        f"{predicted} ({allocation.metric}), {proof}"
    )


def say(options: argparse.Namespace, text: object) -> None:
    """Print for readers, unless --quiet or --json."""
    if not (options.quiet or options.json):
        print(text)


def say_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object; NaN and infinities become null."""
    print(json.dumps(_plain(values)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def allocation_facts(frontier: "Frontier", allocation: "Allocation") -> dict[str, Any]:
    """JSON values of a chosen allocation."""
    return {
        "bits": allocation.bits, "bytes": allocation.total,
        ("loss" if predicts_loss(allocation.metric) else "score"): allocation.loss, "error": allocation.error,
        "metric": allocation.metric, "gap": frontier.gap, "measured_loss": allocation.provenance.get("measured_loss"),
        "precision": classify(allocation).label,
        **({"cache": cache_facts(allocation.cache)} if allocation.cache is not None else {}),
        "schemes": {layer.name: scheme for layer, scheme in zip(allocation.layers, allocation.schemes, strict=True)},
    }  # fmt: skip


def cache_facts(cache: "CacheFormats") -> dict[str, Any]:
    """JSON values of the cache's formats."""
    formats = dict(zip((entry.name for entry in cache.entries), cache.names, strict=True))
    return {"bits": cache.bits, "bytes_per_token": cache.token_bytes, "formats": formats}


def coverage_line(table: "SensitivityTable") -> str:
    """One line on the quantized share and what stays in floating point."""
    from mpq.network.coverage import Coverage

    recorded = table.provenance.get("coverage")
    return "coverage is not recorded in this table" if recorded is None else str(Coverage.from_json(recorded))
