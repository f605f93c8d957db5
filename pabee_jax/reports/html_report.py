"""The HTML report of `evaluate --report`: settings, trade-offs and statistics of the exits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pabee_jax.analysis import exits
from pabee_jax.analysis.curves import Curve
from pabee_jax.analysis.operating_points import OperatingPoint, metrics_of
from pabee_jax.analysis.rows import Rows
from pabee_jax.criteria import describe
from pabee_jax.data.task import Task
from pabee_jax.inference.predictions import predictions_of
from pabee_jax.reports.files import named, records
from pabee_jax.reports.html_page import Section, write_page
from pabee_jax.reports.line_styles import BLUE, GRAY, RED, draw_curves
from pabee_jax.reports.tables import labels as labels_of
from pabee_jax.reports.tables import percent, table_lines

_EXAMPLES = 12
_LONGEST_TEXT = 300
_LOST = "correct at this layer, wrong at full depth"
_GAINED = "wrong at this layer, correct at full depth"


def write_report(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    task: Task,
    rows: Rows,
    logits: Float[np.ndarray, "exits rows classes"],
    points: Sequence[OperatingPoint],
    curves: Sequence[Curve],
    tolerance: float | None,
) -> None:
    """Write the HTML report.

    Args:
        path: the HTML file.
        title: the heading of the page.
        facts: names and values for the top of the page, see `report_facts.facts_of`. The metrics at
            full depth are added.
        task: the task of the rows.
        rows: the evaluated rows.
        logits: the logits of every exit.
        points: the operating points of the table; the sections on exit layers omit operating
            points at full depth.
        curves: the trade-off curve of every criterion; empty if the rows have no labels.
        tolerance: the largest error of a correct regression score; None to omit the overthinking
            section for regression.
    """
    labels = rows.dataset.labels
    early_points = [point for point in points if point.layers_saved > 0]
    facts, sections = list(facts), [settings_table(points)]
    if labels is not None:
        quality = [metrics_of(exit_logits, task, rows) for exit_logits in logits]
        metric = next(iter(quality[-1]))
        facts += [
            (f"{name.replace('_', ' ')} at full depth", percent(value) + "%" * (value == value))
            for name, value in quality[-1].items()
        ]
        sections += [trade_off(curves, metric), exit_quality(quality, metric)]
        if not task.is_regression:
            sections.append(confidence_calibration_error(logits, labels))
        if not task.is_regression or tolerance is not None:
            sections.append(overthinking(exits.right_at(logits, labels, tolerance or 0.0)))
    if early_points:
        sections.append(exits_taken(early_points))
    sections.append(agreement(logits, task.is_regression))
    if early_points:
        sections += examples(early_points, task, rows, logits[-1])
    write_page(path, title, facts, sections)


def settings_table(points: Sequence[OperatingPoint]) -> Section:
    """Return the section with the table that `evaluate` prints; its CSV has full precision."""
    note = (
        "Each line is one setting of the exit criterion; metrics are in percent. Mean exit layer: "
        "the layer at which a row exits, on average. Layers saved: 1 - mean exit layer / "
        f"{points[0].num_layers}. Layer speed-up: {points[0].num_layers} / mean exit layer."
    )
    if points[0].milliseconds is not None:
        note += (
            " ms/example: wall-clock time per row. Measured speed-up: wall-clock time at full "
            "depth / wall-clock time of the setting."
        )
    values = records(points)
    header = list(dict.fromkeys(name for record in values for name in record))
    rows = [[record.get(name, "") for name in header] for record in values]
    return Section("Settings", note, header, rows, shown=table_lines(points))


def trade_off(curves: Sequence[Curve], metric: str) -> Section:
    """Return the section with the trade-off curve of every criterion."""
    figure, axes = _figure()
    legend_lines = draw_curves(axes, curves, legend_width=30)
    axes.set(xlabel=f"mean exit layer (of {curves[0].num_layers})", ylabel=_percent(metric))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    # The legend takes the additional height, so that the plot keeps its own.
    figure.set_figheight(figure.get_figheight() + 0.17 * (legend_lines // 2 + 1))
    return Section(
        "Trade-off",
        "Metric against mean exit layer, one curve per criterion from its slowest to its fastest "
        "setting. Curves closer to the upper left are better; the dashed line is full depth. "
        "Criteria whose curves coincide share a line.",
        ["criterion", "setting", "mean exit layer", metric],
        [
            [curve.name, describe(setting), layer, score]
            for curve in curves
            for setting, layer, score in curve.points
        ],
        figure,
    )


def exit_quality(quality: Sequence[Mapping[str, float]], metric: str) -> Section:
    """Return the section with the metrics of each exit when every row exits there."""
    figure, axes = _figure()
    layers = range(1, len(quality) + 1)
    for name, color in zip(quality[0], (BLUE, RED, GRAY, "#3a8f5c"), strict=False):
        values = [100 * exit_metrics[name] for exit_metrics in quality]
        axes.plot(layers, values, "o-", color=color, label=name.replace("_", " "))
    axes.set(xlabel="layer", ylabel=_percent(metric) if len(quality[0]) == 1 else "metric (%)")
    if len(quality[0]) > 1:
        axes.legend(frameon=False, fontsize=9)
    return Section(
        "Quality of each exit",
        "The metrics of the model if every row exits at this layer.",
        ["layer", *quality[0]],
        [[layer, *values.values()] for layer, values in zip(layers, quality, strict=True)],
        figure,
    )


def confidence_calibration_error(logits: np.ndarray, labels: np.ndarray) -> Section:
    """Return the section with the expected calibration error of each exit's confidence."""
    errors = [exits.expected_calibration_error(exit_logits, labels) for exit_logits in logits]
    layers = range(1, len(errors) + 1)
    figure, axes = _figure()
    axes.bar(layers, [100 * error for error in errors], color=BLUE)
    axes.set(xlabel="layer", ylabel="calibration error (percentage points)")
    return Section(
        "Calibration error of each exit",
        "Expected calibration error (ECE): the mean difference between confidence and accuracy "
        "over ten bins of confidence. A confidence threshold is an estimate of the accuracy only "
        "at exits with a small error.",
        ["layer", "expected calibration error"],
        list(zip(layers, errors, strict=True)),
        figure,
    )


def overthinking(right: np.ndarray) -> Section:
    """Return the section on rows whose correctness changes between an exit and full depth."""
    statistics = exits.overthinking(right)
    layers = range(1, len(right) + 1)
    figure, axes = _figure()
    lost, won = 100 * statistics.lost, 100 * statistics.won
    axes.bar(layers, lost, color=RED)
    axes.bar(layers, -won, color=BLUE)
    axes.axhline(0, color=GRAY, linewidth=0.8)
    # Both sides have the same scale, and space for their labels above and below the bars.
    limit = 1.3 * max(*lost, *won, 0.1)
    axes.set_ylim(-limit, limit)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set(xlabel="layer", ylabel="rows (%): \u2191 lost, \u2193 gained after the layer")
    for text, height, color in ((_LOST, 0.99, RED), (_GAINED, 0.01, BLUE)):
        side = {"va": "top" if height > 0.5 else "bottom", "ha": "center"}
        axes.text(0.5, height, text, transform=axes.transAxes, color=color, fontsize=9, **side)
    return Section(
        "Overthinking",
        "A model overthinks a row if an early exit has the correct answer and the later layers "
        "change it to a wrong answer (Kaya et al., 2019, \u201cShallow-Deep Networks\u201d). Red "
        "bars: of all rows, the share that is correct if the row exits at this layer, and wrong at "
        "full depth. Blue bars: the opposite, the share that needs the later layers to become "
        "correct. Where a red bar is longer than the blue bar, exiting all rows at this layer is "
        f"more accurate than full depth. Here {100 * statistics.ever_lost:.1f}% of the rows are "
        "correct at some exit before the last and wrong at full depth. Of the rows that any exit "
        "answers correctly, the first correct exit is followed by "
        f"{statistics.layers_after:.1f} more layers on average.",
        ["layer", _LOST, _GAINED],
        [
            [layer, *map(float, shares)]
            for layer, *shares in zip(layers, statistics.lost, statistics.won, strict=True)
        ],
        figure,
    )


def exits_taken(points: Sequence[OperatingPoint]) -> Section:
    """Return the section with the share of rows that exit at each layer, for each setting."""
    count, names = points[0].num_layers, labels_of(points)
    shares = exits.exit_shares([point.exit_layers for point in points], count)
    figure, axes = _figure(height=1.4 + 0.32 * len(points))
    _cells(axes, 100 * shares)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.set(xlabel="exit layer", title="share of the rows (%)")
    return Section(
        "Where rows exit",
        "The share of the rows that exit at each layer, one line per setting.",
        ["setting", *(f"layer {layer}" for layer in range(1, count + 1))],
        [[name, *map(float, row)] for name, row in zip(names, shares, strict=True)],
        figure,
    )


def agreement(logits: np.ndarray, is_regression: bool) -> Section:
    """Return the section with the agreement between each pair of exits."""
    shares, count = exits.agreement_of_exits(logits), len(logits)
    figure, axes = _figure(height=3.6)
    _cells(axes, 100 * shares)
    axes.set_yticks(np.arange(count) + 0.5, range(1, count + 1))
    measure = "correlation of scores (%)" if is_regression else "same prediction (% of the rows)"
    axes.set(xlabel="exit at layer", ylabel="exit at layer", title=measure)
    return Section(
        "Agreement between exits",
        "Patience depends on the agreement of neighboring exits: the values next to the diagonal.",
        ["layer", *(f"layer {layer}" for layer in range(1, count + 1))],
        [[layer, *map(float, row)] for layer, row in enumerate(shares, start=1)],
        figure,
    )


def examples(
    points: Sequence[OperatingPoint], task: Task, rows: Rows, last: np.ndarray
) -> list[Section]:
    """Return the sections with the texts of the rows that exit earliest and latest."""
    order, mean_exit_layers = exits.by_difficulty([point.exit_layers for point in points])
    predictions = named(predictions_of(last), task)
    labels = None if rows.dataset.labels is None else named(rows.dataset.labels, task)
    header = ["mean exit layer", *(["label"] if labels else []), "full depth says", "text"]

    def cells(row: int) -> list:
        text = rows.texts[row]
        text = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
        label = [labels[row]] if labels else []
        return [float(mean_exit_layers[row]), *label, predictions[row], text]

    return [
        Section(
            title,
            f"The exit layer is the mean over the settings {', '.join(labels_of(points))}.",
            header,
            [cells(row) for row in selected_rows],
            is_list=True,
        )
        for title, selected_rows in (
            ("Easiest rows", order[:_EXAMPLES]),
            ("Hardest rows", order[::-1][:_EXAMPLES]),
        )
    ]


def _figure(height: float = 3.4) -> tuple[Figure, Any]:
    # The figure is small, so that its text is legible on a phone that is 360 pixels wide.
    figure = Figure(figsize=(4.8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _cells(axes, values: np.ndarray) -> None:
    """Draw a colored cell per value in percent, with layers as columns and the first row on top."""
    columns = values.shape[1]
    # `pcolormesh` draws vector shapes. `imshow` would embed an image, which the page's content
    # security policy blocks.
    axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    axes.set_xticks(np.arange(columns) + 0.5, range(1, columns + 1))
    axes.invert_yaxis()
    if columns > 12:  # The cells are too narrow for numbers.
        return
    for (row, column), value in np.ndenumerate(values):
        text = "" if np.isnan(value) else f"{value:.0f}"
        color = "white" if value > 60 else "black"
        center = (column + 0.5, row + 0.5)
        axes.text(*center, text, ha="center", va="center", color=color, fontsize=8)


def _percent(metric: str) -> str:
    return f"{metric.replace('_', ' ')} (%)"
