"""What a search assumes of layers whose scores nothing supports: the median of their kind."""

from collections.abc import Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.core.errors import MpqError
from mpq.core.table import SensitivityTable

Array = NDArray[np.float64]
ASSUMED = "assumed"  # key of the provenance: layer name -> why its score is the median of its kind


def supported(table: SensitivityTable, pinned: Set[str] = frozenset()) -> tuple[Array, Array, dict[str, Any]]:
    """Scores and standard errors (layers, schemes) with every layer's gaps filled, and a note for the provenance.

    A layer with a reason for having no scores is given, in each scheme, the median score per weight of the layers of
    its kind that have one, times its own number of weights; the standard error is as large. A pinned layer that has
    nothing of its kind beside it counts as 0, for it has no choice.

    Raises:
        MpqError: a layer, not pinned, without evidence for any layer of its kind.
    """
    scores, errors = table.scores.copy(), table.errors.copy()
    known = [i for i, layer in enumerate(table.layers) if layer.name not in table.reasons]
    for i, layer in enumerate(table.layers):
        if layer.name not in table.reasons:
            continue
        peers = [j for j in known if table.layers[j].kind == layer.kind]
        if not peers and layer.name not in pinned:
            raise MpqError(
                f"nothing is known of layer {layer.name} ({table.reasons[layer.name]}), nor of another layer of kind "
                f"{layer.kind}: exclude or pin it, or profile with other data or another metric"
            )
        per_weight = np.array([table.scores[j] / table.layers[j].params for j in peers])
        scores[i] = _medians(per_weight) * layer.params if peers else 0.0
        errors[i] = np.abs(np.nan_to_num(scores[i]))
    return scores, errors, {ASSUMED: dict(table.reasons)} if table.reasons else {}


def _medians(columns: Array) -> Array:
    """The median of each column's numbers, NaN where it has none."""
    kept = [column[~np.isnan(column)] for column in columns.T]
    return np.array([np.median(column) if len(column) else np.nan for column in kept])
