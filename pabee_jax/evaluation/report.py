"""Operating points as a table, JSON, CSV, a picture, and per-row files."""

import csv
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pabee_jax.data.task import Task
from pabee_jax.evaluation.metrics import nan_to_null
from pabee_jax.evaluation.sweep import OperatingPoint, Rows, mean_exit_by_kind
from pabee_jax.predictions import predictions_of


def table(points: Sequence[OperatingPoint]) -> str:
    """One line per patience; metrics in percent, correlations too."""
    names = list(points[0].metrics)
    header = ["patience", *names, "mean exit layer", "layers saved", "layer speed-up"]
    is_timed = points[0].milliseconds is not None
    header += ["ms/example", "measured speed-up"] if is_timed else []
    lines = [header]
    for point in points:
        line = [
            str(point.criterion.patience),
            *(f"{100 * point.metrics[name]:.2f}" for name in names),
            f"{point.mean_exit_layer:.2f}",
            f"{100 * point.layers_saved:.1f}%",
            f"{point.layer_speedup:.2f}x",
        ]
        if is_timed:
            line += [f"{point.milliseconds:.2f}", f"{point.wall_clock_speedup:.2f}x"]
        lines.append(line)
    return _aligned(lines)


def kinds_table(points: Sequence[OperatingPoint], kinds: Sequence[str]) -> str:
    """Mean exit layer by kind of example, the earliest kind first; one column per patience."""
    by_kind = [mean_exit_by_kind(point, kinds) for point in points]
    header = ["mean exit layer of", *(f"patience {point.criterion.patience}" for point in points)]
    order = sorted(by_kind[0], key=lambda kind: sum(values[kind] for values in by_kind))
    rows = [[kind, *(f"{values[kind]:.2f}" for values in by_kind)] for kind in order]
    return _aligned([header, *rows])


def results(points: Sequence[OperatingPoint], about: dict[str, Any]) -> dict[str, Any]:
    """Everything in the table at full precision, with what it was measured on."""
    return {
        **about,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
        "rows": [_values(point) for point in points],
    }


def write_json(path: Path, values: Any) -> None:
    """JSON with NaN as null."""
    path.write_text(json.dumps(nan_to_null(values), indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_predictions(path: Path, points: Sequence[OperatingPoint], task: Task, rows: Rows) -> None:
    """A CSV with one line per example: its label, and each patience's prediction and exit layer."""
    columns: dict[str, Iterable] = {"id": rows.ids}
    if len(rows.parts) > 1:
        columns["part"] = [
            name for name, where in rows.parts.items() for _ in range(where.stop - where.start)
        ]
    if rows.kinds is not None:
        columns["kind"] = rows.kinds
    if rows.dataset.labels is not None:
        columns["label"] = _named(rows.dataset.labels, task)
    for point in points:
        patience = point.criterion.patience
        columns[f"prediction_patience_{patience}"] = _named(predictions_of(point.logits), task)
        columns[f"exit_layer_patience_{patience}"] = point.exit_layers.tolist()
    names = list(columns)
    lines = zip(*columns.values(), strict=True)
    write_csv(path, [dict(zip(names, line, strict=True)) for line in lines])


def write_submission(path: Path, point: OperatingPoint, task: Task, rows: Rows) -> list[Path]:
    """GLUE's submission format: a TSV of index and prediction; MNLI gets two files.

    Returns:
        The files written: `path`, or `path` with `-m` and `-mm` before its extension for MNLI.
    """
    written = []
    for part, where in rows.parts.items():
        target = path
        if len(rows.parts) > 1:
            mark = "-m" if part.endswith("_matched") else "-mm"
            target = path.with_name(f"{path.stem}{mark}{path.suffix}")
        predictions = predictions_of(point.logits[where])
        if task.is_regression:
            # GLUE refuses STS-B scores outside its scale.
            scale = (0.0, 5.0) if task.name == "stsb" else (-np.inf, np.inf)
            values = [f"{value:.3f}" for value in np.clip(predictions, *scale)]
        else:
            names = task.submission_labels or task.label_names
            values = [names[label] for label in predictions]
        lines = zip(rows.ids[where], values, strict=True)
        text = "index\tprediction\n" + "".join(f"{id_}\t{value}\n" for id_, value in lines)
        target.write_text(text, encoding="utf-8")
        written.append(target)
    return written


def plot_tradeoff(path: Path, points: Sequence[OperatingPoint], title: str) -> None:
    """Metric against layer speed-up, one marker per patience, and the full-depth line."""
    # The object interface leaves the user's own pyplot state and backend alone.
    from matplotlib.figure import Figure

    name = next(iter(points[0].metrics))
    settings: dict[tuple[float, float], list[str]] = {}
    for point in points:
        place = (point.layer_speedup, 100 * point.metrics[name])
        settings.setdefault(place, []).append(str(point.criterion.patience))
    places = sorted(settings)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*places, strict=True), "o-", color="#1f5fa8", label="early exit, by patience")
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


def _values(point: OperatingPoint) -> dict[str, Any]:
    values = {
        "patience": point.criterion.patience,
        "regression_threshold": point.criterion.regression_threshold,
        **point.metrics,
        "mean_exit_layer": point.mean_exit_layer,
        "layers_saved": point.layers_saved,
        "layer_speedup": point.layer_speedup,
    }
    if point.milliseconds is not None:
        values["milliseconds_per_example"] = point.milliseconds
        values["measured_speedup"] = point.wall_clock_speedup
    return values


def _named(labels: np.ndarray, task: Task) -> list:
    return labels.tolist() if task.is_regression else [task.label_names[label] for label in labels]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
