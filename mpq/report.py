"""One self-contained HTML report of a run: frontier, formats, sensitivities, predicted and measured loss."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from mpq.core.allocation import Allocation
from mpq.core.cache import head_bytes
from mpq.core.files import write_atomically
from mpq.core.frontier import Frontier
from mpq.core.layer import Layer
from mpq.core.scheme import Scheme
from mpq.core.table import SensitivityTable
from mpq.core.taxonomy import classify
from mpq.network.coverage import Coverage
from mpq.plots import (
    Point,
    Prediction,
    draw_frontier,
    draw_layers,
    draw_predictions,
    draw_table,
    frontier_facts,
    layer_facts,
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.lead { color: #555d66; margin-top: 0; } figure { margin: 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: .6rem 0; } th, td { padding: .3rem .9rem .3rem 0; text-align: right; }
th { font-weight: 600; border-bottom: 1px solid #cfd4d9; } th:first-child, td:first-child { text-align: left; }
tr.chosen td { font-weight: 600; } td { border-bottom: 1px solid #eceef0; font-variant-numeric: tabular-nums; }
details { margin-top: .6rem; } summary { cursor: pointer; color: #1f5fa8; }
"""


class Row(NamedTuple):
    """One line of the before/after table, as text."""

    name: str
    bits: str
    size: str
    quality: str
    divergence: str
    agreement: str
    flips: str
    predicted: str
    measured: str
    chosen: bool = False


HEADINGS = (
    "",
    "bits",
    "size",
    "quality",
    "KL from original",
    "same top choice",
    "flips",
    "predicted",
    "measured loss +",
)


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    table: SensitivityTable,
    frontier: Frontier,
    allocation: Allocation,
    rows: Sequence[Row],
    predictions: Sequence[Prediction],
    words: Sequence[str] = (),
    points: Sequence[Point] = (),
    settings: Mapping[str, object] | None = None,
    tokens: Sequence[Sequence[str]] = (),
) -> None:
    """Write the report, atomically."""
    shown = frontier_facts({"searched frontier": frontier}, {"chosen": allocation}, points)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=lead>{escape(_lead(table, frontier, allocation))}</p>",
        "<h2>Before and after</h2>", _html_table(rows), f"<p>{escape(' '.join(words))}</p>",
        "<h2>Frontier</h2>", _svg(draw_frontier(shown)),
        *(("<h2>Tokens that fit the memory</h2>", _plain_table(tokens)) if tokens else ()),
        "<h2>Format of each layer</h2>", _svg(draw_layers(layer_facts(allocation))), _layer_table(allocation),
        _cache_table(allocation),
        "<h2>Predicted and measured</h2>", _svg(draw_predictions(predictions, table.metric)),
        "<h2>Sensitivity of each layer in each format</h2>", _svg(draw_table(table)),
        "<h2>Coverage</h2>", _coverage(table),
        "<h2>Settings</h2>", _settings({**table.provenance, **(settings or {})}),
    ]  # fmt: skip
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    with write_atomically(path) as draft:
        draft.write_text(page + "<body>" + "\n".join(parts) + "</body></html>\n", "utf-8", "backslashreplace")


def _lead(table: SensitivityTable, frontier: Frontier, allocation: Allocation) -> str:
    proof = "proven exact" if frontier.gap == 0 else f"certified within {100 * frontier.gap:.2g} %"
    return (
        f"{len(table.layers)} layers, {len(table.schemes)} formats, metric {table.metric}; a frontier of "
        f"{len(frontier):,} allocations, {proof}. Chosen: {allocation.bits:.3f} bits per weight "
        f"({classify(allocation)})."
    )


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mpq", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _html_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    lines = (
        f"<tr{' class=chosen' if row.chosen else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[:-1])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    """A heading and rows of cells."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{_cells(row)}</tr>' for row in rows[1:])}</table>"


def _cache_table(allocation: Allocation) -> str:
    """Keys and values with their formats; "" if they are not quantized."""
    cache = allocation.cache
    if cache is None:
        return ""
    rows = []
    for entry, name in zip(cache.entries, cache.names, strict=True):
        bits = 8 * head_bytes(cache.format_of[entry.name], entry.cols) / entry.cols
        rows.append((entry.name, f"{entry.rows} x {entry.cols}", name, f"{bits:.3f}", str(entry.window or "")))
    table = _plain_table([("cache", "heads", "format", "bits", "window"), *rows])
    return f"<details><summary>Keys and values: {cache.bits:.3f} bits</summary>{table}</details>"


def _cells(values: Iterable[object]) -> str:
    return "".join(f"<td>{escape(str(value))}</td>" for value in values)


def _layer_table(allocation: Allocation) -> str:
    strip = layer_facts(allocation)
    lines = (
        "<tr>"
        + _cells((layer.name, layer.kind, f"{layer.rows} x {layer.cols}", format_words(layer, scheme)))
        + _cells((f"{bits:.3f}", layer.tie))
        + "</tr>"
        for layer, scheme, bits in zip(allocation.layers, allocation.scheme_of.values(), strip.bits, strict=True)
    )
    head = "<tr><th>layer</th><th>kind</th><th>weights</th><th>format</th><th>bits</th><th>tie</th></tr>"
    return f"<details><summary>All layers</summary><table>{head}{''.join(lines)}</table></details>"


def format_words(layer: Layer, scheme: Scheme) -> str:
    """A scheme's name, and for a mix the share of rows in each format."""
    if scheme.mix is None or not scheme.mix.assignment:
        return scheme.name
    counts = zip(scheme.mix.counts(layer.rows, layer.cols), scheme.mix.formats, strict=True)
    shares = (f"{100 * count / layer.rows:.2g} % {format.name}" for count, format in counts if count)
    return f"{scheme.name}: {', '.join(shares)} of the rows"


def _coverage(table: SensitivityTable) -> str:
    if "coverage" not in table.provenance:
        return "<p>Not recorded in this table.</p>"
    coverage = Coverage.from_json(table.provenance["coverage"])
    lines = "".join(f"<tr>{_cells(row)}</tr>" for row in coverage.rows())
    head = "<tr><th>what</th><th>share of the parameters</th><th>such as</th></tr>"
    return f"<p>{escape(str(coverage))}</p><table>{head}{lines}</table>"


def _settings(settings: Mapping[str, object]) -> str:
    lines = (
        f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>"
        for key, value in settings.items()
        if key != "coverage"
    )
    return f"<table>{''.join(lines)}</table>"
