"""Writers of result files: JSON and CSV tables, predictions per row, and GLUE submissions."""

import csv
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pabee_jax import __version__
from pabee_jax.analysis.comparison import Group, Outcome
from pabee_jax.analysis.curves import SAVINGS, Curve
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.analysis.rows import Rows
from pabee_jax.criteria import ExitCriterion, describe, to_config
from pabee_jax.data.glue import submission_paths
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError
from pabee_jax.inference.predictions import predictions_of
from pabee_jax.io import storage, strict_json
from pabee_jax.io.atomic import write_atomically
from pabee_jax.reports.tables import labels

# JSON can hold half of a surrogate pair, which UTF-8 cannot: it is written as "\\ud800".
UNENCODABLE = "backslashreplace"


def environment() -> dict[str, Any]:
    """Return the software versions and the hardware of this process."""
    return {
        "pabee_jax": __version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cpus": os.cpu_count(),
    }


def records(points: Sequence[OperatingPoint]) -> list[dict[str, Any]]:
    """Return the rows of the operating-point table as dictionaries at full precision."""
    return [_record(point) for point in points]


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON, with NaN as null."""
    path.write_text(strict_json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write `rows` as CSV, with one column for every name in any row, and NaN as an empty cell."""
    with path.open("w", newline="", encoding="utf-8", errors=UNENCODABLE) as file:
        # The rows of different criteria have different columns.
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: without_nan(row[name]) for name in row} for row in rows)


def without_nan(value: Any) -> Any:
    """Return a value for a cell of a CSV: None, which is an empty cell, for NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def write_predictions(path: Path, points: Sequence[OperatingPoint], task: Task, rows: Rows) -> None:
    """Write a CSV of the label, the predictions and the exit layers of each example."""
    columns: dict[str, Iterable] = {"id": rows.ids}
    if len(rows.parts) > 1:
        columns["part"] = [
            name for name, where in rows.parts.items() for _ in range(where.stop - where.start)
        ]
    if rows.kinds is not None:
        columns["kind"] = rows.kinds
    if rows.dataset.labels is not None:
        columns["label"] = named(rows.dataset.labels, task)
    for point, setting_label in zip(points, labels(points), strict=True):
        name = re.sub(r"[^\w.]+", "_", setting_label)
        columns[f"prediction_{name}"] = named(predictions_of(point.logits), task)
        columns[f"exit_layer_{name}"] = point.exit_layers.tolist()
    names = list(columns)
    lines = zip(*columns.values(), strict=True)
    write_csv(path, [dict(zip(names, line, strict=True)) for line in lines])


def write_submission(path: Path, point: OperatingPoint, task: Task, rows: Rows) -> list[Path]:
    """Write GLUE's submission format, a TSV of index and prediction.

    Returns:
        The paths of the files: `path`, or for MNLI the two other paths of `submission_paths`.

    Raises:
        InputError: a file cannot be written.
    """
    plain, matched, mismatched = submission_paths(path)
    written_paths = []
    for part, where in rows.parts.items():
        target = plain
        if len(rows.parts) > 1:
            target = matched if part.endswith("_matched") else mismatched
        predictions = predictions_of(point.logits[where])
        if task.is_regression:
            # GLUE rejects STS-B scores outside the range from 0 to 5.
            scale = (0.0, 5.0) if task.name == "stsb" else (-np.inf, np.inf)
            values = [f"{value:.3f}" for value in np.clip(predictions, *scale)]
        else:
            names = task.submission_labels or task.label_names
            values = [names[label] for label in predictions]
        lines = zip(rows.ids[where], values, strict=True)
        text = "index\tprediction\n" + "".join(f"{row_id}\t{value}\n" for row_id, value in lines)
        try:
            content = text.encode("utf-8", UNENCODABLE)
            write_atomically(target, lambda path, content=content: path.write_bytes(content))
        except OSError as error:
            reason = storage.reason_of(error)
            raise InputError(f"{target} cannot be written: {reason}") from None
        written_paths.append(target)
    return written_paths


def write_curves(folder: Path, curves: Sequence[Curve], metric: str) -> None:
    """Write sweep.csv with every setting, and sweep.json with every setting and the table."""
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
    write_json(folder / "sweep.json", content | environment())


def comparison_records(
    groups: Sequence[Group],
    settings: Sequence[ExitCriterion],
    outcomes: Sequence[Sequence[Outcome]],
    metric: str,
) -> list[dict[str, Any]]:
    """Return the rows of the comparison table as dictionaries at full precision."""
    return [
        {
            "group": group.name,
            "runs": len(group.runs),
            "setting": describe(setting),
            metric: outcome.median,
            "lowest": min(outcome.scores),
            "highest": max(outcome.scores),
            "mean_exit_layer": outcome.median_exit_layer,
            "difference": outcome.difference,
            "interval_low": None if outcome.interval is None else outcome.interval[0],
            "interval_high": None if outcome.interval is None else outcome.interval[1],
        }
        for group, group_outcomes in zip(groups, outcomes, strict=True)
        for setting, outcome in zip(settings, group_outcomes, strict=True)
    ]


def named(labels: np.ndarray, task: Task) -> list:
    """Return the names of class ids as a list; scores are returned unchanged."""
    return labels.tolist() if task.is_regression else [task.label_names[label] for label in labels]


def _record(point: OperatingPoint) -> dict[str, Any]:
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
