"""Plots of the metric against the speed, one figure per file."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from pabee_jax.analysis.comparison import Group, Outcome
from pabee_jax.analysis.curves import Curve
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.reports.tables import labels

# The functions use `Figure` instead of pyplot, so that the state and the backend of pyplot in the
# caller's process do not change.


def plot_tradeoff(path: Path, points: Sequence[OperatingPoint], title: str) -> None:
    """Plot the metric against the speed-up, with a marker per setting.

    The speed-up is the measured speed-up if the points were timed, else the layer speed-up.
    """
    name = next(iter(points[0].metrics))
    settings: dict[tuple[float, float], list[str]] = {}
    for point, label in zip(points, labels(points), strict=True):
        speedup = point.wall_clock_speedup or point.layer_speedup
        coordinates = (speedup, 100 * point.metrics[name])
        settings.setdefault(coordinates, []).append(label.removeprefix("patience "))
    markers = sorted(settings)
    only_patience = all(text.isdecimal() for texts in settings.values() for text in texts)
    legend = "early exit (number: patience)" if only_patience else "early exit, by setting"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*markers, strict=True), "o-", color="#1f5fa8", label=legend)
    for coordinates in markers:
        axes.annotate(
            ", ".join(settings[coordinates]),
            coordinates,
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
        )
    full_depth = [point.metrics[name] for point in points if point.layers_saved == 0]
    if full_depth:
        score = 100 * full_depth[0]
        axes.axhline(score, linestyle="--", color="#888888", label="full depth", zorder=0)
    axes.legend(loc="lower left", frameon=False)
    if points[0].wall_clock_speedup is None:
        axes.set_xlabel("layer speed-up (layers / mean exit layer)")
    else:
        axes.set_xlabel("measured speed-up (time at full depth / time)")
    axes.set_ylabel(f"{name.replace('_', ' ')} (%)")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.margins(x=0.08, y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_curves(path: Path, curves: Sequence[Curve], metric: str, title: str) -> None:
    """Plot the metric against the mean exit layer, with a line per criterion."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        axes.plot(
            curve.line[0],
            100 * curve.line[1],
            color=colormaps["tab20"](index % 20),
            marker="o" if len(curve.settings) < 20 else "",
            markersize=4,
            linewidth=1.4,
            label=curve.name,
        )
    axes.axhline(
        100 * curves[0].ends[1], linestyle="--", color="#888888", label="full depth", zorder=0
    )
    axes.set_xlabel(f"mean exit layer (of {curves[0].num_layers})")
    axes.set_ylabel(f"{metric.replace('_', ' ')} (%)")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


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
