"""The picture of docs/results.md: quality against measured speed, beside published results."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.evidence.points import METRICS, SPEEDUPS
from benchmarks.evidence.runs import Run
from benchmarks.evidence.tables import measured_speedup
from pabee_jax.analysis import metrics
from pabee_jax.analysis.curves import Curve, curves, grouped, is_patience
from pabee_jax.reports.line_styles import legend_entry, line_styles

# COSEE (arXiv 2412.13236), table 2, BERT-base on GLUE's test sets: layer speed-up, and points below
# the full depth of that table.
PUBLISHED = {
    "mrpc": {
        "DeeBERT": (2.07, -4.5),
        "PABEE": (2.01, -4.5),
        "BERxiT": (2.27, -2.7),
        "GPFEE": (1.98, -1.9),
        "ConsistentEE": (1.59, 0.1),
        "COSEE": (2.70, -0.9),
    },
    "sst2": {
        "DeeBERT": (2.00, -3.3),
        "PABEE": (1.95, -4.2),
        "BERxiT": (2.86, -1.9),
        "GPFEE": (2.02, -0.7),
        "ConsistentEE": (1.85, -0.6),
        "COSEE": (2.14, -0.5),
    },
}
# Where a label is, in points from its mark, if the usual place is taken.
_USUAL_PLACE = (5, 3)
_PLACES = {
    ("mrpc", "PABEE"): (-34, -9),
    ("mrpc", "GPFEE"): (-32, -9),
    ("sst2", "PABEE"): (-34, -9),
    ("sst2", "ConsistentEE"): (-56, -11),
    ("sst2", "GPFEE"): (-8, -13),
    ("sst2", "COSEE"): (3, 8),
}
# The criteria in the picture; one curve per family of settings would be unreadable.
_CRITERIA = {
    "classes": ("patience", "max_probability", "energy", "ensemble", "vote", "fixed_layer"),
    "scores": ("patience", "fixed_layer"),
}
_FASTEST, _LOWEST = 4.5, -12.0
_LEGEND_WIDTH = 34


def draw(path: Path, runs: Mapping[Run, Mapping[str, np.ndarray]], content: dict[str, Any]) -> None:
    """Write one panel per task, for the last recipe of the table that has a run of the task."""
    shown = {run.task: run for run in runs if run.seed == min(other.seed for other in runs)}
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.2 * len(shown), 4.6), squeeze=False, layout="constrained"
    )
    for axis, (task, run) in zip(axes[0], shown.items(), strict=True):
        arrays = runs[run]
        speed, label = speed_of(run, content)
        draw_task(axis, run, arrays["logits"], arrays["labels"], speed, label)
        axis.set_title(f"{task}, {run.recipe}", fontsize=9)
    axes[0, 0].set_ylabel("points above full depth")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_task(axis, run: Run, logits, labels, speed, label: str) -> None:
    """Draw the curves of a task, and the published results."""
    metric = METRICS[run.task]

    def score(answers):
        return metrics.compute([metric], answers, labels)[metric]

    names = _CRITERIA["scores" if logits.shape[2] == 1 else "classes"]
    groups: list[list[Curve]] = grouped(curves(logits, score, names))
    styles = line_styles([is_patience(group[0]) for group in groups])
    for group, style in zip(groups, styles, strict=True):
        layers, scores = group[0].line
        entry = legend_entry([curve.name for curve in group], _LEGEND_WIDTH)
        differences = 100 * (scores - group[0].ends[1])
        style |= {"markevery": max(1, len(layers) // 8)}
        axis.plot([speed(value) for value in layers], differences, label=entry, **style)
    for name, (speedup, difference) in PUBLISHED.get(run.task, {}).items():
        axis.plot(speedup, difference, "x", color="black", markersize=6, zorder=5)
        place = _PLACES.get((run.task, name), _USUAL_PLACE)
        axis.annotate(
            name, (speedup, difference), place, textcoords="offset points", fontsize=7, zorder=6
        )
    axis.axhline(0, linestyle="--", color="#888888", zorder=0)
    axis.set(xlim=(1, _FASTEST), ylim=(_LOWEST, 3), xlabel=label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower left")


def _inverse_of(share: Callable[[float], float], layer: float) -> float:
    return 1 / share(layer)


def speed_of(run: Run, content: dict[str, Any]) -> tuple[Callable[[float], float], str]:
    """Return a function from the mean exit layer to the speed-up, and its name.

    If the run was timed, the time is interpolated between the timed settings; otherwise the
    speed-up is that of the layers.
    """
    record = next(r for r in content["records"] if Run(r["recipe"], r["task"], r["seed"]) == run)
    num_layers = len(record["exits"])
    for times in content.get("times", {}).values():
        if Run(times["recipe"], times["task"], times["seed"]) == run:
            layers = [num_layers / record["points"][f"{s:g}"]["layer speed-up"] for s in SPEEDUPS]
            shares = [1 / measured_speedup(times["pool"], s) for s in SPEEDUPS]
            share = np.polynomial.Polynomial.fit([num_layers, *layers], [1, *shares], 1)
            return functools.partial(_inverse_of, share), "measured speed-up"
    return lambda layer: num_layers / layer, "layer speed-up"
