"""The tables of docs/results.md, from the content of evidence.json."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import command_line
from benchmarks.evidence.points import METRICS, SPEEDUPS
from benchmarks.recipes import RECIPES

_DRIVERS = ("pool", "loop")


def headline(content: dict[str, Any]) -> str:
    """Return one line per recipe and task: medians over the seeds, in percent."""
    header = ["task", "recipe", "seeds", "full depth"]
    for speedup in SPEEDUPS:
        header += [f"{speedup:g}x: difference [95%]", "layers", "pool", "loop"]
    lines = []
    for task, metric in METRICS.items():
        for recipe in RECIPES:
            records = [
                record
                for record in content["records"]
                if (record["recipe"], record["task"]) == (recipe, task)
            ]
            if not records:
                continue
            full = 100 * statistics.median(record["exits"][-1][metric] for record in records)
            line = [f"{task} ({metric})", recipe, str(len(records)), f"{full:.1f}"]
            for speedup in SPEEDUPS:
                points = [record["points"][f"{speedup:g}"] for record in records]
                line += _point_cells(points)
                line += [_measured(content, records, speedup, driver) for driver in _DRIVERS]
            lines.append(line)
    return command_line.table(header, lines)


def _point_cells(points: Sequence[dict[str, Any]]) -> list[str]:
    ordered = sorted(points, key=lambda point: point["difference"])
    middle = ordered[(len(ordered) - 1) // 2]
    low, high = middle["interval"]
    difference = f"{100 * middle['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return [difference, f"{statistics.median(p['layer speed-up'] for p in points):.2f}x"]


def _measured(content, records, speedup: float, driver: str) -> str:
    """Return the measured speed-up over our full depth, of the first timed run of the records."""
    names = {(record["recipe"], record["task"], record["seed"]) for record in records}
    for times in content.get("times", {}).values():
        if (times["recipe"], times["task"], times["seed"]) in names:
            return f"{measured_speedup(times[driver], speedup):.2f}x"
    return ""


def measured_speedup(seconds: dict[str, float], speedup: float) -> float:
    """Return the time of full depth over the mean time of the two settings of a speed-up."""
    mine = statistics.mean(seconds[f"{speedup:g}, half {half}"] for half in (1, 2))
    return seconds["full depth"] / mine


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
