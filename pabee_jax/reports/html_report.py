"""evaluate.py --report: what the exits know, as one page that opens from disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pabee_jax.analysis import exits
from pabee_jax.analysis.curves import Curve
from pabee_jax.analysis.operating_points import OperatingPoint, metrics_of
from pabee_jax.analysis.rows import Rows
from pabee_jax.criteria import describe
from pabee_jax.data.task import Task
from pabee_jax.inference.predictions import predictions_of
from pabee_jax.reports.files import named
from pabee_jax.reports.html_page import Section, write_page
from pabee_jax.reports.tables import labels as labels_of

_EXAMPLES = 12
_LONGEST_TEXT = 300
_BLUE, _RED, _GREY = "#1f5fa8", "#c8553d", "#888888"


def write_report(
    path: Path,
    title: str,
    task: Task,
    rows: Rows,
    logits: Float[np.ndarray, "exits rows classes"],
    points: Sequence[OperatingPoint],
    curves: Sequence[Curve],
    tolerance: float | None,
) -> None:
    """Writes the page.

    Args:
        points: the settings whose exits are shown; those at full depth are left out.
        curves: of every criterion; empty without labels.
        tolerance: up to which error a score is right; None leaves out what needs that.
    """
    labels, early = rows.dataset.labels, [point for point in points if point.layers_saved > 0]
    facts = [("rows", str(logits.shape[1])), ("exits", str(len(logits)))]
    sections = []
    if labels is not None:
        quality = [metrics_of(each, task, rows) for each in logits]
        metric = next(iter(quality[-1]))
        facts += [
            (f"{name.replace('_', ' ')} at full depth", f"{100 * value:.2f}%")
            for name, value in quality[-1].items()
        ]
        sections += [trade_off(curves, metric), exit_quality(quality, metric)]
        if not task.is_regression:
            sections.append(calibration_error(logits, labels))
        if not task.is_regression or tolerance is not None:
            sections.append(overthinking(exits.right_at(logits, labels, tolerance or 0.0)))
    if early:
        sections.append(exits_taken(early))
    sections.append(agreement(logits, task.is_regression))
    if early:
        sections += examples(early, task, rows, logits[-1])
    write_page(path, title, facts, sections)


def trade_off(curves: Sequence[Curve], metric: str) -> Section:
    """Every criterion over its range."""
    figure, axes = _figure(height=4.8)
    for index, curve in enumerate(curves):
        layers, scores = curve.line
        axes.plot(layers, 100 * scores, color=colormaps["tab20"](index % 20), label=curve.name)
    axes.axhline(100 * curves[0].ends[1], linestyle="--", color=_GREY, zorder=0)
    axes.set(xlabel=f"mean exit layer (of {curves[0].num_layers})", ylabel=_percent(metric))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return Section(
        "Trade-off",
        "Every criterion over its whole range. Higher and further left is better; the dashed line "
        "is full depth.",
        ["criterion", "setting", "mean exit layer", metric],
        [
            [curve.name, describe(setting), layer, score]
            for curve in curves
            for setting, layer, score in curve.points
        ],
        figure,
    )


def exit_quality(quality: Sequence[Mapping[str, float]], metric: str) -> Section:
    """Each exit's metrics when every row leaves there."""
    figure, axes = _figure()
    layers = range(1, len(quality) + 1)
    for name, color in zip(quality[0], (_BLUE, _RED, _GREY, "#3a8f5c"), strict=False):
        values = [100 * each[name] for each in quality]
        axes.plot(layers, values, "o-", color=color, label=name.replace("_", " "))
    axes.set(xlabel="layer", ylabel=_percent(metric) if len(quality[0]) == 1 else "metric (%)")
    if len(quality[0]) > 1:
        axes.legend(frameon=False, fontsize=9)
    return Section(
        "Quality of each exit",
        "What the model gives if every row leaves at this layer.",
        ["layer", *quality[0]],
        [[layer, *each.values()] for layer, each in zip(layers, quality, strict=True)],
        figure,
    )


def calibration_error(logits: np.ndarray, labels: np.ndarray) -> Section:
    """How far each exit's confidence is from its accuracy."""
    errors = [exits.expected_calibration_error(each, labels) for each in logits]
    layers = range(1, len(errors) + 1)
    figure, axes = _figure()
    axes.bar(layers, [100 * each for each in errors], color=_BLUE)
    axes.set(xlabel="layer", ylabel="calibration error (percentage points)")
    return Section(
        "Calibration error of each exit",
        "How far confidence is from accuracy (ECE, ten bins). A threshold on confidence means what "
        "it says only where this is small.",
        ["layer", "expected calibration error"],
        list(zip(layers, errors, strict=True)),
        figure,
    )


def overthinking(right: np.ndarray) -> Section:
    """What the layers after the first right exit do."""
    found = exits.overthinking(right)
    layers = range(1, len(right) + 1)
    figure, axes = _figure()
    axes.bar(layers, 100 * found.lost, color=_RED, label="right here, wrong at the end")
    axes.bar(layers, -100 * found.won, color=_BLUE, label="wrong here, right at the end")
    axes.axhline(0, color=_GREY, linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set(xlabel="layer", ylabel="share of the rows (%)")
    figure.legend(loc="outside lower center", fontsize=9, frameon=False)
    return Section(
        "Overthinking",
        f"{100 * found.ever_lost:.1f}% of the rows are right at some exit and wrong at the last "
        f"one. Rows go on for {found.layers_after:.1f} layers on average after the first exit that "
        "is right.",
        ["layer", "right here, wrong at the end", "wrong here, right at the end"],
        [
            [layer, *map(float, both)]
            for layer, *both in zip(layers, found.lost, found.won, strict=True)
        ],
        figure,
    )


def exits_taken(points: Sequence[OperatingPoint]) -> Section:
    """Where rows leave, for each setting."""
    count, names = points[0].num_layers, labels_of(points)
    shares = exits.exit_shares([point.exit_layers for point in points], count)
    figure, axes = _figure(height=1.4 + 0.32 * len(points))
    _cells(axes, 100 * shares)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.set(xlabel="exit layer", title="share of the rows (%)")
    return Section(
        "Where rows leave",
        "The share of the rows that leave at each layer, one line per setting.",
        ["setting", *(f"layer {layer}" for layer in range(1, count + 1))],
        [[name, *map(float, line)] for name, line in zip(names, shares, strict=True)],
        figure,
    )


def agreement(logits: np.ndarray, is_regression: bool) -> Section:
    """How alike the exits answer."""
    shares, count = exits.agreement_of_exits(logits), len(logits)
    figure, axes = _figure(height=3.6)
    _cells(axes, 100 * shares)
    axes.set_yticks(np.arange(count) + 0.5, range(1, count + 1))
    what = "correlation of scores (%)" if is_regression else "same answer (% of the rows)"
    axes.set(xlabel="exit at layer", ylabel="exit at layer", title=what)
    return Section(
        "Agreement of the exits",
        "Patience waits for neighbours to agree: the values beside the diagonal.",
        ["layer", *(f"layer {layer}" for layer in range(1, count + 1))],
        [[layer, *map(float, line)] for layer, line in enumerate(shares, start=1)],
        figure,
    )


def examples(
    points: Sequence[OperatingPoint], task: Task, rows: Rows, last: np.ndarray
) -> list[Section]:
    """The rows that leave first and last, with what they say."""
    order, mean = exits.by_difficulty([point.exit_layers for point in points])
    answers = named(predictions_of(last), task)
    labels = None if rows.dataset.labels is None else named(rows.dataset.labels, task)
    header = ["mean exit layer", *(["label"] if labels else []), "full depth says", "text"]

    def line(row: int) -> list:
        text = rows.texts[row]
        text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
        return [float(mean[row]), *([labels[row]] if labels else []), answers[row], text]

    return [
        Section(title, f"Mean over {', '.join(labels_of(points))}.", header, list(map(line, some)))
        for title, some in (
            ("Easiest rows", order[:_EXAMPLES]),
            ("Hardest rows", order[::-1][:_EXAMPLES]),
        )
    ]


def _figure(height: float = 3.4) -> tuple[Figure, Any]:
    # Drawn small, so that words are legible where a phone shows it 360 pixels wide.
    figure = Figure(figsize=(4.8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _cells(axes, values: np.ndarray) -> None:
    """A coloured cell per value in percent, the first line on top; columns are layers."""
    columns = values.shape[1]
    # Drawn as shapes: the page lets nothing in that would be an image of its own.
    axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    places = np.arange(columns) + 0.5
    axes.set_xticks(places, range(1, columns + 1))
    axes.invert_yaxis()
    if columns > 12:  # There would be no room for the figures.
        return
    for (line, column), value in np.ndenumerate(values):
        text = "" if np.isnan(value) else f"{value:.0f}"
        color = "white" if value > 60 else "black"
        place = (column + 0.5, line + 0.5)
        axes.text(*place, text, ha="center", va="center", color=color, fontsize=8)


def _percent(metric: str) -> str:
    return f"{metric.replace('_', ' ')} (%)"
