"""Interactions of layer pairs: totals, files, invalid arrays."""

import numpy as np
import pytest

from mpq.core.errors import MpqError
from mpq.core.interactions import Interactions

LAYERS, SCHEMES = ("a", "b", "c"), ("int2-channel", "int4-channel")


def some(seed=0):
    generator = np.random.default_rng(seed)
    pairs = generator.normal(size=(3, 2, 3, 2))
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    for i in range(3):
        pairs[i, :, i] = 0
    return Interactions(LAYERS, SCHEMES, generator.normal(size=(3, 2)), pairs, {"model": "small", "seed": seed})


def test_an_allocation_totals_its_layers_and_its_pairs():
    found = some()
    for choices in np.ndindex(2, 2, 2):
        total = sum(found.losses[i, choices[i]] for i in range(3))
        total += sum(found.pairs[i, choices[i], j, choices[j]] for i in range(3) for j in range(i))
        assert found.total(choices) == pytest.approx(total)


def test_interactions_survive_saving_and_loading(tmp_path):
    found = some()
    found.save(tmp_path / "pairs.npz")
    again = Interactions.load(tmp_path / "pairs.npz")
    assert (again.layers, again.schemes, dict(again.provenance)) == (LAYERS, SCHEMES, {"model": "small", "seed": 0})
    assert np.array_equal(again.losses, found.losses)
    assert np.array_equal(again.pairs, found.pairs)


def test_damaged_and_missing_files_are_reported(tmp_path):
    path = tmp_path / "pairs.npz"
    with pytest.raises(MpqError, match="cannot read"):
        Interactions.load(path)
    some().save(path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(MpqError, match="not a valid interactions"):
            Interactions.load(path)


def own_block(layer, pairs):
    """1 for one scheme of a layer with itself, 0 elsewhere."""
    block = np.zeros_like(pairs)
    block[layer, 0, layer, 0] = 1
    return block


def one_infinite(pairs):
    changed = pairs.copy()
    changed[0, 0, 1, 0] = np.inf
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses, pairs: (losses[:2], pairs), "losses of shape"),
        (lambda losses, pairs: (losses * np.nan, pairs), "losses: 6 numbers are NaN"),
        (lambda losses, pairs: (losses, pairs * np.arange(3)[:, None, None, None]), "symmetric"),
        (lambda losses, pairs: (losses, pairs + 1), "zeros on the diagonal blocks"),
        (lambda losses, pairs: (losses, pairs + own_block(0, pairs)), "zeros on the diagonal blocks"),
        (lambda losses, pairs: (losses, pairs + own_block(2, pairs)), "zeros on the diagonal blocks"),
        (lambda losses, pairs: (losses, one_infinite(pairs)), "pairs: 1 numbers are NaN"),
    ],
)
def test_arrays_that_are_no_interactions_are_refused(change, message):
    found = some()
    with pytest.raises(MpqError, match=message):
        Interactions(LAYERS, SCHEMES, *change(found.losses, found.pairs))
