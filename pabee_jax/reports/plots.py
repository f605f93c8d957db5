"""Pictures: metric against speed, one figure per file."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from pabee_jax.analysis.comparison import Group, Outcome
from pabee_jax.analysis.curves import Curve
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.reports.tables import labels

# Figures are made through `Figure`, not pyplot, whose state and backend belong to the user.


def plot_tradeoff(path: Path, points: Sequence[OperatingPoint], title: str) -> None:
    """Metric against layer speed-up, one marker per setting, and the full-depth line."""
    name = next(iter(points[0].metrics))
    settings: dict[tuple[float, float], list[str]] = {}
    for point, label in zip(points, labels(points), strict=True):
        place = (point.layer_speedup, 100 * point.metrics[name])
        settings.setdefault(place, []).append(label.removeprefix("patience "))
    places = sorted(settings)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*places, strict=True), "o-", color="#1f5fa8", label="early exit, by setting")
    for place in places:
        axes.annotate(
            ", ".join(settings[place]),
            place,
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize=9,
        )
    full_depth = [score for speedup, score in places if speedup == 1]
    if full_depth:
        axes.axhline(full_depth[0], linestyle="--", color="#888888", label="full depth", zorder=0)
    axes.legend(loc="lower left", frameon=False)
    axes.set_xlabel("layer speed-up (layers / mean exit layer)")
    axes.set_ylabel(f"{name.replace('_', ' ')} (%)")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.08, y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_curves(path: Path, curves: Sequence[Curve], metric: str, title: str) -> None:
    """Metric against mean exit layer, one line per criterion."""
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
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_comparison(
    groups: Sequence[Group], outcomes: Sequence[Sequence[Outcome]], metric: str, path: Path
) -> None:
    """Medians as points, ranges over the seeds as bars."""
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
