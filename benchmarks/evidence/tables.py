"""The tables of docs/results.md and docs/results-criteria.md."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import command_line
from benchmarks.evidence.points import METRICS, SPEEDUPS, scorer
from benchmarks.evidence.runs import Run
from benchmarks.recipes import RECIPES, RECOMMENDED
from pabee_jax.analysis.curves import SAVINGS, curves

DRIVERS = ("pool", "loop")


def headline(content: dict[str, Any]) -> str:
    """Return one line per task for the recommended recipe, beside ordinary fine-tuning.

    In percent; the number of seeds is in parentheses, and figures are medians over the seeds.
    """
    header = ["task", "rows", "ordinary fine-tuning", "full depth with exits"]
    header += [f"{speedup:g}x" for speedup in SPEEDUPS]
    lines = []
    for task, metric in METRICS.items():
        if records := _records(content, RECOMMENDED, task):
            ordinary = _full_depth(_records(content, "ordinary", task), metric)
            line = [f"{task} ({metric})", records[0]["rows"], ordinary]
            lines.append([*line, _full_depth(records, metric), *_cells(content, records)])
    return command_line.table(header, lines)


def of_recipes(content: dict[str, Any]) -> str:
    """Return one line per recipe and task."""
    header = ["task", "recipe", "full depth", *(f"{speedup:g}x" for speedup in SPEEDUPS)]
    lines = []
    for task, metric in METRICS.items():
        for recipe in RECIPES:
            if records := _records(content, recipe, task):
                line = [f"{task} ({metric})", recipe, _full_depth(records, metric)]
                lines.append([*line, *_cells(content, records)])
    return command_line.table(header, lines)


def _records(content: dict[str, Any], recipe: str, task: str) -> list[dict[str, Any]]:
    wanted = recipe, task
    return [record for record in content["records"] if (record["recipe"], record["task"]) == wanted]


def _full_depth(records: Sequence[dict[str, Any]], metric: str) -> str:
    if not records:
        return ""
    median = statistics.median(record["exits"][-1][metric] for record in records)
    return f"{100 * median:.1f} ({len(records)})"


def _cells(content: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
    """Return, for every speed-up, the difference from full depth and the reached speed-ups."""
    cells = []
    for speedup in SPEEDUPS:
        points = [record["points"][f"{speedup:g}"] for record in records]
        ordered = sorted(points, key=lambda point: point["difference"])
        middle = ordered[(len(ordered) - 1) // 2]
        low, high = middle["interval"]
        layers = statistics.median(point["layer speed-up"] for point in points)
        measured = [
            f", {measured_speedup(seconds, speedup):.2f}x {driver}"
            for driver, seconds in _times(content, records).items()
        ]
        cells.append(
            f"{100 * middle['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]; "
            f"{layers:.2f}x layers{''.join(measured)}"
        )
    return cells


def _times(content: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the times, by driver, of the first timed run of the records."""
    names = {(record["recipe"], record["task"], record["seed"]) for record in records}
    for times in content.get("times", {}).values():
        if (times["recipe"], times["task"], times["seed"]) in names:
            return {driver: times[driver] for driver in DRIVERS if driver in times}
    return {}


def measured_speedup(seconds: dict[str, float], speedup: float) -> float:
    """Return the time of full depth over the time at a speed-up of the layers."""
    return seconds["full depth"] / seconds[f"{speedup:g}"]


def of_exits(content: dict[str, Any]) -> str:
    """Return one line per run: the metric of every exit, and of the oracle."""
    lines = []
    for record in content["records"]:
        metric = METRICS[record["task"]]
        exits = " ".join(f"{100 * values[metric]:.1f}" for values in record["exits"])
        oracle = record["oracle"]
        oracle_text = f"{100 * oracle[metric]:.1f} at {oracle['mean exit layer']:.2f}"
        name = f"{record['recipe']}, {record['task']}, seed {record['seed']}"
        lines.append([name, exits, oracle_text])
    return command_line.table(["run", "exits 1 to L", "oracle"], lines)


def lowest_seeds(runs: Mapping[Run, Any]) -> dict[str, Run]:
    """Return the run of the recommended recipe with the lowest seed, by task."""
    ordered = sorted((run for run in runs if run.recipe == RECOMMENDED), key=lambda run: -run.seed)
    lowest = {run.task: run for run in ordered}
    return {task: lowest[task] for task in METRICS if task in lowest}


def of_criteria(runs: Mapping[Run, Mapping[str, np.ndarray]]) -> str:
    """Return one line per criterion: the metric with shares of the layers saved, and the area."""
    shown = [run for run in lowest_seeds(runs).values() if runs[run]["logits"].shape[2] > 1]
    columns: dict[str, list[str]] = {}
    for run in shown:
        arrays = runs[run]
        for curve in curves(arrays["logits"], scorer(run.task, arrays["labels"])):
            values = [*(curve.at(share) for share in SAVINGS), curve.area]
            columns.setdefault(curve.name, []).extend(f"{100 * value:.1f}" for value in values)
    header = ["criterion"]
    for run in shown:
        header += [f"{run.task} {share:.0%}" for share in SAVINGS] + ["area"]
    lines = sorted(([name, *cells] for name, cells in columns.items()), key=_area, reverse=True)
    return command_line.table(header, lines)


def _area(line: Sequence[str]) -> float:
    return sum(float(value) for value in line[4::4])
