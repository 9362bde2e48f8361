"""Plots: each draws a small data structure, which tests compare."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from mpq.core.allocation import Allocation
from mpq.core.frontier import MEASURED_COLUMN, Frontier, SavedFrontier
from mpq.core.prediction import prediction_name, predicts_loss
from mpq.core.scheme import parse_scheme
from mpq.core.table import SensitivityTable

POINTS = 1000  # per curve; more are not visible
COLORS = ("#1f5fa8", "#c2572b", "#3d8a5b", "#7a4fa0", "#8c7a2e", "#a83a5b")
ERRORS = " +- 2 standard errors"
MEASURED = "#7a4fa0"
CHOSEN, UNIFORM, INK = "#d1341f", "#6b7480", "#22262b"


class Mark(NamedTuple):
    """One allocation as a point."""

    name: str
    bits: float
    loss: float


class Curve(NamedTuple):
    """One frontier; `band` is two standard errors of its losses, 0 if exact or unknown."""

    name: str
    bits: NDArray[np.float64]
    losses: NDArray[np.float64]
    band: NDArray[np.float64]
    predicted: NDArray[np.float64] | None = None  # predicted losses of the same allocations if `losses` were measured


class Point(NamedTuple):
    """One allocation with its measured divergence from the original and its standard error."""

    name: str
    bits: float
    value: float
    error: float


class FrontierFacts(NamedTuple):
    """Data of a frontier plot."""

    curves: tuple[Curve, ...]
    uniform: tuple[Mark, ...]
    chosen: tuple[Mark, ...]
    metric: str
    points: tuple[Point, ...] = ()  # measured ones beside the predicted line


def frontier_facts(
    frontiers: Mapping[str, Frontier | SavedFrontier],
    chosen: Mapping[str, Allocation] | None = None,
    points: Iterable[Point] = (),
) -> FrontierFacts:
    """Curves of frontiers in size, uniform formats of the first that knows them, and chosen allocations, by name."""
    first = next((one for one in frontiers.values() if isinstance(one, Frontier)), None)
    return FrontierFacts(
        tuple(_curve(name, frontier) for name, frontier in frontiers.items()),
        tuple(Mark(name, one.bits, one.loss) for name, one in first.uniform()) if first else (),
        tuple(
            Mark(name, one.bits, one.provenance.get("measured_loss", one.loss)) for name, one in (chosen or {}).items()
        ),
        first.problem.metric if first else "",
        tuple(points)
        if not first or predicts_loss(first.problem.metric)
        else (),  # a proxy's scores are on another scale
    )


def _curve(name: str, frontier: Frontier | SavedFrontier) -> Curve:
    if isinstance(frontier, SavedFrontier):
        band = 2 * np.nan_to_num(frontier.errors)
        if frontier.measured is None:
            return Curve(name, frontier.bits, frontier.losses, band)
        return Curve(name, frontier.bits, frontier.measured, band, frontier.losses)
    shown = np.unique(np.linspace(0, len(frontier) - 1, min(POINTS, len(frontier))).round().astype(int))
    columns = [frontier.extra_columns(index) for index in shown.tolist()]
    band = 2 * np.nan_to_num([fact["error"] for fact in columns])
    predicted = np.array([fact["loss"] for fact in columns]) if MEASURED_COLUMN in columns[0] else None
    losses = frontier.losses[shown] if predicted is not None else np.array([fact["loss"] for fact in columns])
    return Curve(name, frontier.bits[shown], losses, band, predicted)


def draw_frontier(facts: FrontierFacts, title: str = "") -> Figure:
    """Bits per weight against loss, predicted or measured, on a logarithmic scale where losses are positive."""
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    shown = [curve.losses for curve in facts.curves]
    shown += [curve.predicted for curve in facts.curves if curve.predicted is not None]
    losses = np.concatenate([*shown, [mark.loss for mark in facts.uniform], [point.value for point in facts.points]])
    _loss_scale(axes, losses)
    measured = [curve.predicted is not None for curve in facts.curves]
    for color, curve in zip(_cycle(COLORS), facts.curves, strict=False):
        low = np.maximum(curve.losses - curve.band, _floor(losses))
        axes.fill_between(curve.bits, low, curve.losses + curve.band, color=color, alpha=0.15, linewidth=0, step="post")
        if curve.predicted is None:
            label = _plain(f"{curve.name}, predicted" if any(measured) else curve.name)
            axes.step(curve.bits, curve.losses, where="post", color=color, linewidth=1.8, label=label)
            continue
        _draw_measured(axes, curve, low, color)
    if facts.uniform:
        bits, uniform = [mark.bits for mark in facts.uniform], [mark.loss for mark in facts.uniform]
        label = "one format for all layers" + ", predicted" * any(measured)
        axes.plot(bits, uniform, "o", color=UNIFORM, markersize=5, label=label)
        _label_marks(axes, facts.uniform)
    for mark in facts.chosen:
        axes.plot(
            mark.bits,
            mark.loss,
            "*",
            color=CHOSEN,
            markersize=15,
            zorder=5,
            label=_plain(f"{mark.name}: {mark.bits:.2f} bits"),
        )
    if facts.points:
        axes.errorbar(
            [point.bits for point in facts.points], [point.value for point in facts.points],
            [2 * np.nan_to_num(point.error) for point in facts.points], fmt="D", color=MEASURED, markersize=5,
            markerfacecolor="white", elinewidth=1, label="measured divergence" + ERRORS,
        )  # fmt: skip
    axes.set_xlabel("bits per weight, scales and zero points counted")
    axes.set_ylabel(_loss_label(facts.metric, any(measured)))
    axes.legend(frameon=False, fontsize=9)
    if title:
        axes.set_title(_plain(title), loc="left", fontsize=11, color=INK)
    return figure


def _draw_measured(axes: Axes, curve: Curve, low: NDArray[np.float64], color: str) -> None:
    assert curve.predicted is not None
    axes.step(curve.bits, curve.losses, where="post", color=color, linewidth=1.8)
    known = bool(curve.band.any())
    axes.errorbar(
        curve.bits, curve.losses, [curve.losses - low, curve.band] if known else None, fmt="o", color=color,
        markersize=4, elinewidth=1, label=_plain(f"{curve.name}, measured") + ERRORS * known,
    )  # fmt: skip
    axes.plot(curve.bits, curve.predicted, "x", color=color, markersize=5, label=_plain(f"{curve.name}, predicted"))


def _loss_label(metric: str, measured: bool) -> str:
    by = f" ({metric})" if metric else ""
    return f"loss increase, measured or predicted{by}" if measured else f"{prediction_name(metric)}{by}"


class LayerFacts(NamedTuple):
    """Data of the strip: each layer's format."""

    layers: tuple[str, ...]
    schemes: tuple[str, ...]
    bits: tuple[float, ...]
    params: tuple[int, ...]


def layer_facts(allocation: Allocation) -> LayerFacts:
    """Layers in the model's order with their schemes and stored bits per weight."""
    pairs = list(zip(allocation.layers, allocation.schemes, strict=True))
    bits = tuple(parse_scheme(name).weight.effective_bits(layer.rows, layer.cols) for layer, name in pairs)
    names = tuple(layer.name for layer in allocation.layers)
    return LayerFacts(names, allocation.schemes, bits, tuple(layer.params for layer in allocation.layers))


def draw_layers(facts: LayerFacts) -> Figure:
    """A strip of the model's layers, coloured by format, as high as the bits that a weight takes."""
    count = len(facts.layers)
    figure = Figure(figsize=(min(max(6.0, 0.24 * count + 2.5), 16.0), 3.4), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    colors = scheme_colors(facts.schemes)
    axes.bar(range(count), facts.bits, width=0.9, color=[colors[name] for name in facts.schemes])
    step = max(1, count // 60)
    axes.set_xticks(range(0, count, step), list(map(_plain, facts.layers[::step])), rotation=90, fontsize=7)
    axes.set_xlim(-0.6, count - 0.4)
    axes.set_ylabel("bits per weight")
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def scheme_colors(schemes: Iterable[str]) -> dict[str, Any]:
    """A colour for each scheme, from light for few bits to dark for many."""
    import matplotlib

    ordered = sorted(set(schemes), key=lambda name: (parse_scheme(name).weight.effective_bits(), name))
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.08, 0.95, max(len(ordered), 1)))
    return dict(zip(ordered, shades, strict=True))


def draw_table(table: SensitivityTable) -> Figure:
    """Heat map of predicted losses, layers down and formats across; missing and zero losses are white."""
    count = len(table.layers)
    figure = Figure(
        figsize=(0.55 * len(table.schemes) + 4.2, min(max(3.2, 0.2 * count + 1.6), 18.0)), layout="constrained"
    )
    axes = figure.add_subplot()
    scores = np.where(table.scores > 0, table.scores, np.nan)
    norm = None
    if np.isfinite(scores).any():
        low, high = np.nanmin(scores), np.nanmax(scores)
        norm = LogNorm(low, high if high > low else low * 10)
    image = axes.imshow(scores, aspect="auto", cmap="magma_r", norm=norm, interpolation="nearest")
    step = max(1, count // 70)
    axes.set_yticks(range(0, count, step), [_plain(layer.name) for layer in table.layers][::step], fontsize=7)
    axes.set_xticks(range(len(table.schemes)), table.schemes, rotation=60, ha="right", fontsize=8)
    figure.colorbar(image, ax=axes, label=f"{prediction_name(table.metric)} ({table.metric})", shrink=0.8)
    return figure


class Prediction(NamedTuple):
    """Predicted and measured loss increase of an allocation."""

    name: str
    predicted: float
    measured: float
    error: float  # standard error of the measured one


def draw_predictions(predictions: Sequence[Prediction], metric: str = "") -> Figure:
    """Measured against predicted loss increase, with the line where both are equal; or against a proxy's score."""
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    predicted = np.array([point.predicted for point in predictions])
    measured = np.array([point.measured for point in predictions])
    errors = [point.error if math.isfinite(point.error) else 0.0 for point in predictions]
    both = np.concatenate([predicted, measured])
    comparable = predicts_loss(metric)
    _loss_scale(axes, both if comparable else measured)
    if (both > 0).all():
        axes.set_xscale("log")
    axes.errorbar(predicted, measured, yerr=errors, fmt="o", color=COLORS[0], markersize=5, elinewidth=1)
    ends = [float(both.min()), float(both.max())]
    if comparable:
        axes.plot(ends, ends, color=UNIFORM, linewidth=1, linestyle="--")
    _label_marks(axes, [Mark(point.name, point.predicted, point.measured) for point in predictions])
    axes.set_xlabel(prediction_name(metric))
    axes.set_ylabel("measured: KL from the original, or loss increase")
    return figure


def _plain(text: str) -> str:
    """Text with dollar signs escaped, between which matplotlib would typeset formulas."""
    return text.replace("$", r"\$")


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)


def _loss_scale(axes: Axes, losses: NDArray[np.float64]) -> None:
    if (losses > 0).all():
        axes.set_yscale("log")
    elif (losses > 0).any():
        axes.set_yscale("symlog", linthresh=float(np.percentile(losses[losses > 0], 10)))


def _floor(losses: NDArray[np.float64]) -> float:
    """Bands are not drawn below this: on a logarithmic scale they would reach to zero."""
    return float(losses.min()) / 3 if (losses > 0).all() else -math.inf


def _cycle(colors: Sequence[str]) -> Iterable[str]:
    while True:
        yield from colors


def _label_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Labels beside the marks; a mark close to a labelled one gets none."""
    placed: list[tuple[float, float]] = []
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    for mark in sorted(marks, key=lambda mark: mark.loss):  # among close marks, label the best
        x, y = axes.transData.transform((mark.bits, mark.loss))
        if all(abs(x - other_x) > 70 or abs(y - other_y) > 11 for other_x, other_y in placed):
            axes.annotate(
                _plain(mark.name), (mark.bits, mark.loss), (6, 3), textcoords="offset points", fontsize=7, color=UNIFORM
            )
            placed.append((x, y))
