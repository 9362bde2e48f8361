"""Scores assumed for layers without evidence: the median of their kind."""

from collections.abc import Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.mix import is_mix
from mpq.core.table import SensitivityTable

Array = NDArray[np.float64]
ASSUMED = "assumed"  # key of the provenance: layer name -> why its score is the median of its kind


def supported(table: SensitivityTable, pinned: Set[str] = frozenset()) -> tuple[Array, Array, dict[str, Any]]:
    """Scores and standard errors (layers, schemes) with missing layers filled in, and what to add to the provenance.

    A layer without scores (listed in `table.reasons`) gets, in each scheme, the median score per weight of the layers
    of its kind, times its number of weights; the standard error equals the score. Mixes stay forbidden for it, since no
    score assigns formats to rows. A pinned layer that is the only one of its kind gets 0, since it has no choice.

    Raises:
        MpqError: a layer that is not pinned, when no layer of its kind has scores.
    """
    scores, errors = table.scores.copy(), table.errors.copy()
    known = [i for i, layer in enumerate(table.layers) if layer.name not in table.reasons]
    for i, layer in enumerate(table.layers):
        if layer.name not in table.reasons:
            continue
        peers = [j for j in known if table.layers[j].kind == layer.kind]
        if not peers and layer.name not in pinned:
            raise MpqError(
                f"layer {layer.name} has no score ({table.reasons[layer.name]}), nor has any other layer of kind "
                f"{layer.kind}: exclude it, pin it, or profile with other data or another metric"
            )
        per_weight = np.array([table.scores[j] / table.layers[j].params for j in peers])
        scores[i] = _medians(per_weight) * layer.params if peers else 0.0
        scores[i, [is_mix(name) for name in table.schemes]] = np.nan
        errors[i] = np.abs(np.nan_to_num(scores[i]))
    return scores, errors, {ASSUMED: dict(table.reasons)} if table.reasons else {}


def _medians(columns: Array) -> Array:
    """The median of each column without its NaNs; NaN for an empty column."""
    kept = [column[~np.isnan(column)] for column in columns.T]
    return np.array([np.median(column) if len(column) else np.nan for column in kept])
