"""The pictures of the evidence: quality against measured speed, beside published results.

The headline shows the recommended recipe on every task; the other picture shows every criterion.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures
from benchmarks.evidence.points import SPEEDUPS, scorer
from benchmarks.evidence.runs import Run
from benchmarks.evidence.tables import lowest_seeds, measured_speedup
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
# The criteria in the headline; one curve per family of settings would be unreadable.
_CRITERIA = {
    "classes": ("patience", "consistency", "max_probability", "fixed_layer"),
    "scores": ("patience", "fixed_layer"),
}
# The curves of the other picture, with their labels; with two classes, highest probability, entropy
# and margin order the rows in the same way.
_EVERY_CRITERION = {
    "patience": "patience",
    "consistency": "consistency",
    "max_probability": "max_probability, entropy, margin",
    "energy": "energy",
    "patient_confidence, patience 2": "patient_confidence, patience 2",
    "ensemble": "ensemble",
    "divergence, patience 3": "divergence, patience 3",
    "vote": "vote",
    "fixed_layer": "fixed_layer",
}
_FASTEST, _LOWEST = 4.5, -12.0
_LEGEND_WIDTH = 34
_TITLES = {"mrpc": "MRPC, F1", "stsb": "STS-B, Pearson", "sst2": "SST-2, accuracy"}
_TITLES |= {"cola": "CoLA, Matthews"}


def draw(path: Path, runs: Mapping[Run, Mapping[str, np.ndarray]], content: dict[str, Any]) -> None:
    """Write one panel per task, for the recommended recipe and the lowest seed that has a run."""
    shown = lowest_seeds(runs)
    if not shown:
        return
    figure, axes = figures.panels(len(shown), height=3.5)
    for axis, (task, run) in zip(axes, shown.items(), strict=True):
        arrays = runs[run]
        speed, label = speed_of(run, content)
        draw_task(axis, run, arrays["logits"], arrays["labels"], speed, label)
        _draw_chosen(axis, _record_of(run, content), speed)
        axis.set_title(f"{_TITLES[task]}, {len(arrays['labels'])} dev rows", fontsize=10)
        axis.set_ylabel("points above full depth")
    figures.save(figure, path, legend_columns=4)


def draw_criteria(path: Path, runs: Mapping[Run, Mapping[str, np.ndarray]]) -> None:
    """Write one panel per classification, with the curves of every criterion."""
    shown = {
        task: run for task, run in lowest_seeds(runs).items() if runs[run]["logits"].shape[2] > 1
    }
    if not shown:
        return
    figure, axes = figures.panels(len(shown), height=4.2, columns=3)
    for axis, (task, run) in zip(axes, shown.items(), strict=True):
        arrays = runs[run]
        score = scorer(task, arrays["labels"])
        by_name = {curve.name: curve for curve in curves(arrays["logits"], score)}
        styles = line_styles([name == "patience" for name in _EVERY_CRITERION])
        for (name, label), style in zip(_EVERY_CRITERION.items(), styles, strict=True):
            layers, scores = by_name[name].line
            style |= {"markevery": max(1, len(layers) // 8)}
            axis.plot(layers, 100 * scores, label=label, **style)
        full_depth = 100 * score(arrays["logits"][-1])
        axis.axhline(full_depth, linestyle="--", color="#888888", zorder=0, label="full depth")
        exits = len(arrays["logits"])
        axis.set(xlabel=f"mean exit layer (of {exits})", xticks=range(0, exits + 1, 2))
        axis.set(title=f"{_TITLES[task]} (%)", ylim=(full_depth + _LOWEST, full_depth + 2))
    figures.save(figure, path, legend_columns=2)


def _draw_chosen(axis, record: dict[str, Any], speed: Callable[[float], float]) -> None:
    """Mark the settings that were chosen on other rows, with their 95% intervals."""
    for index, point in enumerate(record["points"].values()):
        x = speed(len(record["exits"]) / point["layer speed-up"])
        difference, (low, high) = 100 * point["difference"], 100 * np.array(point["interval"])
        axis.errorbar(
            x,
            difference,
            [[difference - low], [high - difference]],
            fmt="o",
            color="black",
            markerfacecolor="white",
            markersize=7,
            capsize=3,
            zorder=7,
            label=None if index else "chosen on other rows, 95%",
        )


def draw_task(axis, run: Run, logits, labels, speed, label: str) -> None:
    """Draw the curves of a task, and the published results."""
    score = scorer(run.task, labels)
    names = _CRITERIA["scores" if logits.shape[2] == 1 else "classes"]
    groups: list[list[Curve]] = grouped(curves(logits, score, names))
    styles = line_styles([is_patience(group[0]) for group in groups])
    for group, style in zip(groups, styles, strict=True):
        layers, scores = group[0].line
        # "patience, patience 2" has a curve of its own, over all thresholds.
        names = [curve.name.replace("patience, patience", "scores, patience") for curve in group]
        entry = legend_entry(names, _LEGEND_WIDTH)
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


def _record_of(run: Run, content: dict[str, Any]) -> dict[str, Any]:
    return next(r for r in content["records"] if Run(r["recipe"], r["task"], r["seed"]) == run)


def _inverse_of(share: Callable[[float], float], layer: float) -> float:
    return 1 / share(layer)


def speed_of(run: Run, content: dict[str, Any]) -> tuple[Callable[[float], float], str]:
    """Return a function from the mean exit layer to the speed-up, and its name.

    If the run was timed, the time is interpolated between the timed settings; otherwise the
    speed-up is that of the layers.
    """
    record = _record_of(run, content)
    num_layers = len(record["exits"])
    for times in content.get("times", {}).values():
        if "pool" in times and Run(times["recipe"], times["task"], times["seed"]) == run:
            layers = [num_layers / record["points"][f"{s:g}"]["layer speed-up"] for s in SPEEDUPS]
            shares = [1 / measured_speedup(times["pool"], s) for s in SPEEDUPS]
            share = np.polynomial.Polynomial.fit([num_layers, *layers], [1, *shares], 1)
            return functools.partial(_inverse_of, share), "measured speed-up"
    return lambda layer: num_layers / layer, "layer speed-up"
