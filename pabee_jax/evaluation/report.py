"""Operating points as a table, JSON, CSV, a picture, and per-row files."""

import contextlib
import csv
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from pabee_jax import storage
from pabee_jax.criteria import Patience, describe, to_config
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError
from pabee_jax.evaluation.curves import SAVINGS, Curve
from pabee_jax.evaluation.metrics import nan_to_null
from pabee_jax.evaluation.operating_points import OperatingPoint, Rows, mean_exit_by_kind
from pabee_jax.predictions import predictions_of


@contextlib.contextmanager
def results_folder(output: epath.Path) -> Iterator[Path]:
    """Where to write what shall be in `output`.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with storage.local_folder(output) as folder:
            yield folder
    except OSError as error:
        place, reason = error.filename or output, storage.reason_of(error)
        raise InputError(f"the results cannot be written: {place}: {reason}") from None


def table(points: Sequence[OperatingPoint]) -> str:
    """One line per setting; metrics in percent, correlations too."""
    names = list(points[0].metrics)
    settings = labels(points)
    numbers = [label.removeprefix("patience ") for label in settings]
    only_patience = all(map(str.isdecimal, numbers))
    header = [
        "patience" if only_patience else "setting",
        *names,
        "mean exit layer",
        "layers saved",
        "layer speed-up",
    ]
    is_timed = points[0].milliseconds is not None
    header += ["ms/example", "measured speed-up"] if is_timed else []
    lines = [header]
    for point, label in zip(points, numbers if only_patience else settings, strict=True):
        line = [
            label,
            *(f"{100 * point.metrics[name]:.2f}" for name in names),
            f"{point.mean_exit_layer:.2f}",
            f"{100 * point.layers_saved:.1f}%",
            f"{point.layer_speedup:.2f}x",
        ]
        if is_timed:
            line += [f"{point.milliseconds:.2f}", f"{point.wall_clock_speedup:.2f}x"]
        lines.append(line)
    return aligned(lines)


def labels(points: Sequence[OperatingPoint]) -> list[str]:
    """What tells the points apart: "patience 3", or the whole setting where that is not enough."""
    settings = [point.criterion for point in points]
    patience = [each for each in settings if isinstance(each, Patience)]
    thresholds = {each.regression_threshold for each in patience}
    if len(patience) == len(settings) and len(thresholds) == 1:
        return [f"patience {each.patience}" for each in patience]
    return [describe(each) for each in settings]


def kinds_table(points: Sequence[OperatingPoint], kinds: Sequence[str]) -> str:
    """Mean exit layer by kind of example, the earliest kind first; one column per setting."""
    by_kind = [mean_exit_by_kind(point, kinds) for point in points]
    header = ["mean exit layer of", *labels(points)]
    order = sorted(by_kind[0], key=lambda kind: sum(values[kind] for values in by_kind))
    rows = [[kind, *(f"{values[kind]:.2f}" for values in by_kind)] for kind in order]
    return aligned([header, *rows])


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
        # Settings of several criteria have several sorts of fields.
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_predictions(path: Path, points: Sequence[OperatingPoint], task: Task, rows: Rows) -> None:
    """A CSV with one line per example: its label, and each setting's prediction and exit layer."""
    columns: dict[str, Iterable] = {"id": rows.ids}
    if len(rows.parts) > 1:
        columns["part"] = [
            name for name, where in rows.parts.items() for _ in range(where.stop - where.start)
        ]
    if rows.kinds is not None:
        columns["kind"] = rows.kinds
    if rows.dataset.labels is not None:
        columns["label"] = named(rows.dataset.labels, task)
    for point, label in zip(points, labels(points), strict=True):
        name = re.sub(r"[^\w.]+", "_", label)
        columns[f"prediction_{name}"] = named(predictions_of(point.logits), task)
        columns[f"exit_layer_{name}"] = point.exit_layers.tolist()
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
    """Metric against layer speed-up, one marker per setting, and the full-depth line."""
    # The object interface leaves the user's own pyplot state and backend alone.
    from matplotlib.figure import Figure

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


def curves_table(curves: Sequence[Curve], metric: str) -> str:
    """One line per curve, the best area first; in percent."""
    header = ["criterion", *(f"{share:.0%} saved" for share in SAVINGS), "area"]
    order = sorted(curves, key=lambda curve: -curve.area)
    lines = [
        [curve.name, *(f"{100 * value:.2f}" for value in (*map(curve.at, SAVINGS), curve.area))]
        for curve in order
    ]
    full_depth = f"{metric} at full depth: {100 * curves[0].ends[1]:.2f}; with layers saved:"
    return f"{full_depth}\n{aligned([header, *lines])}"


def write_curves(folder: Path, curves: Sequence[Curve], metric: str, title: str) -> None:
    """sweep.csv with every setting, sweep.json with the table's figures as well, sweep.png."""
    settings = [
        {
            "curve": curve.name,
            "setting": describe(setting),
            "mean_exit_layer": layer,
            metric: score,
        }
        for curve in curves
        for setting, layer, score in curve.points
    ]
    summary = [
        {
            "curve": curve.name,
            "area": curve.area,
            **{f"{metric} at {share:.0%} saved": curve.at(share) for share in SAVINGS},
        }
        for curve in curves
    ]
    write_csv(folder / "sweep.csv", settings)
    content = {metric: {"full depth": curves[0].ends[1]}, "curves": summary, "settings": settings}
    write_json(folder / "sweep.json", results([], content))
    plot_curves(folder / "sweep.png", curves, metric, title)


def plot_curves(path: Path, curves: Sequence[Curve], metric: str, title: str) -> None:
    """Metric against mean exit layer, one line per criterion."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

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


def _values(point: OperatingPoint) -> dict[str, Any]:
    values = {
        **to_config(point.criterion),
        **point.metrics,
        "mean_exit_layer": point.mean_exit_layer,
        "layers_saved": point.layers_saved,
        "layer_speedup": point.layer_speedup,
    }
    if point.milliseconds is not None:
        values["milliseconds_per_example"] = point.milliseconds
        values["measured_speedup"] = point.wall_clock_speedup
    return values


def named(labels: np.ndarray, task: Task) -> list:
    """Class ids by their names; scores as they are."""
    return labels.tolist() if task.is_regression else [task.label_names[label] for label in labels]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns: words to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
