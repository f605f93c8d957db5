"""Plots of the metric against the speed, one figure per file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pabee_jax.analysis.comparison import Group, Outcome
from pabee_jax.analysis.curves import Curve
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.reports.label_placement import Label, place_labels
from pabee_jax.reports.line_styles import GRAY, draw_curves, line_styles
from pabee_jax.reports.series import series_of

# The functions use `Figure` instead of pyplot, so that the state and the backend of pyplot in the
# caller's process do not change.
_DPI = 150


def plot_tradeoff(path: Path, points: Sequence[OperatingPoint], title: str) -> None:
    """Plot the metric against the speed-up: a line per criterion and a marker per setting.

    The speed-up is the measured speed-up if the points were timed, else the layer speed-up.
    """
    tradeoff_figure(points, title).savefig(path)


def plot_curves(path: Path, curves: Sequence[Curve], metric: str, title: str) -> None:
    """Plot the metric against the mean exit layer, with a line per criterion.

    Curves that coincide share a line. The line of patience is the thickest and lies on top.
    """
    curves_figure(curves, metric, title).savefig(path)


def tradeoff_figure(points: Sequence[OperatingPoint], title: str) -> Figure:
    """Return the figure of `plot_tradeoff`."""
    name = next(iter(points[0].metrics))
    figure, axes = _figure(6.4, 4.6, title)
    all_series = series_of(points)
    styles = line_styles([series.is_patience for series in all_series])
    labels = []
    for series, style in zip(all_series, styles, strict=True):
        # The metric is NaN if it is a correlation of equal scores.
        markers = [
            (_speedup(point), 100 * point.metrics[name], label)
            for point, label in zip(series.points, series.labels, strict=True)
            if not math.isnan(point.metrics[name])
        ]
        markers.sort(key=lambda marker: marker[:2])  # Settings of one point stay in their order.
        if markers:
            x, y, _ = zip(*markers, strict=True)
            # The thin lines lie on the thick line of patience, so that no marker is hidden.
            zorder = 4 if series.is_patience else 5
            axes.plot(x, y, label=series.title, **style | {"zorder": zorder})
            labels += [Label(*marker, style["color"]) for marker in markers]
    full_depth = [point.metrics[name] for point in points if point.layers_saved == 0]
    if full_depth and not math.isnan(full_depth[0]):
        axes.axhline(100 * full_depth[0], linestyle="--", color=GRAY, label="full depth", zorder=0)
    if points[0].wall_clock_speedup is None:
        axes.set_xlabel("layer speed-up (layers / mean exit layer)")
    else:
        axes.set_xlabel("measured speed-up (time at full depth / time)")
    axes.set_ylabel(f"{name.replace('_', ' ')} (%)")
    axes.margins(x=0.08, y=0.18)
    if labels:
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        place_labels(axes, labels)
    else:
        note = f"{name.replace('_', ' ')} is undefined on these rows"
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
    return figure


def curves_figure(curves: Sequence[Curve], metric: str, title: str) -> Figure:
    """Return the figure of `plot_curves`."""
    figure, axes = _figure(8, 5, title)
    legend_lines = draw_curves(axes, curves, legend_width=30)
    axes.set_xlabel(f"mean exit layer (of {curves[0].num_layers})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{metric.replace('_', ' ')} (%)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8, handlelength=3)
    # The legend must not be higher than the plot.
    figure.set_figheight(max(5.0, 1.0 + 0.17 * legend_lines))
    return figure


def plot_comparison(
    groups: Sequence[Group], outcomes: Sequence[Sequence[Outcome]], metric: str, path: Path
) -> None:
    """Plot the median over the seeds as a point and the range over the seeds as an error bar."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for group, group_outcomes in zip(groups, outcomes, strict=True):
        points = sorted(group_outcomes, key=lambda outcome: outcome.median_exit_layer)
        medians = [100 * outcome.median for outcome in points]
        ranges = [
            [100 * (outcome.median - min(outcome.scores)) for outcome in points],
            [100 * (max(outcome.scores) - outcome.median) for outcome in points],
        ]
        layers = [outcome.median_exit_layer for outcome in points]
        axes.errorbar(layers, medians, ranges, marker="o", capsize=3, label=group.name)
    axes.set(xlabel="mean exit layer", ylabel=f"{metric.replace('_', ' ')} (%)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    # Half of a surrogate pair in the name of a directory has no glyph.
    printable = title.encode("utf-8", "backslashreplace").decode()
    axes.set_title(printable, fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _speedup(point: OperatingPoint) -> float:
    return point.wall_clock_speedup or point.layer_speedup
