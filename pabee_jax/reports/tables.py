"""Text tables of operating points, curves and comparisons."""

import math
from collections.abc import Sequence

from pabee_jax.analysis.comparison import Group, Outcome
from pabee_jax.analysis.curves import SAVINGS, Curve
from pabee_jax.analysis.operating_points import OperatingPoint, mean_exit_by_kind
from pabee_jax.criteria import ExitCriterion, Patience, describe

# The value of a correlation of equal scores; null in JSON, and an empty cell in CSV.
UNDEFINED = "undefined"


def percent(value: float) -> str:
    """Return a metric in percent for a table."""
    return UNDEFINED if math.isnan(value) else f"{100 * value:.2f}"


def table(points: Sequence[OperatingPoint]) -> str:
    """Return a table with one line per setting; metrics and correlations are in percent."""
    return aligned(table_lines(points))


def table_lines(points: Sequence[OperatingPoint]) -> list[list[str]]:
    """Return the header and the lines of `table` as texts, one text per cell."""
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
            *(percent(point.metrics[name]) for name in names),
            f"{point.mean_exit_layer:.2f}",
            f"{100 * point.layers_saved:.1f}%",
            f"{point.layer_speedup:.2f}x",
        ]
        if is_timed:
            line += [f"{point.milliseconds:.2f}", f"{point.wall_clock_speedup:.2f}x"]
        lines.append(line)
    return lines


def labels(points: Sequence[OperatingPoint]) -> list[str]:
    """Return a distinct label for each operating point.

    The label is "patience 3" if all settings are `Patience` with the same regression threshold, and
    the full description of the setting otherwise.
    """
    settings = [point.criterion for point in points]
    patience_settings = [setting for setting in settings if isinstance(setting, Patience)]
    thresholds = {setting.regression_threshold for setting in patience_settings}
    if len(patience_settings) == len(settings) and len(thresholds) == 1:
        return [f"patience {setting.patience}" for setting in patience_settings]
    return [describe(setting) for setting in settings]


def kinds_table(points: Sequence[OperatingPoint], kinds: Sequence[str]) -> str:
    """Return a table of the mean exit layer by kind of example, with one column per setting.

    The kinds are sorted from the lowest mean exit layer to the highest.
    """
    by_kind = [mean_exit_by_kind(point, kinds) for point in points]
    header = ["mean exit layer of", *labels(points)]
    order = sorted(by_kind[0], key=lambda kind: sum(values[kind] for values in by_kind))
    rows = [[kind, *(f"{values[kind]:.2f}" for values in by_kind)] for kind in order]
    return aligned([header, *rows])


def curves_table(curves: Sequence[Curve], metric: str) -> str:
    """Return a table with one line per curve in percent, sorted by descending area."""
    header = ["criterion", *(f"{share:.0%} saved" for share in SAVINGS), "area"]
    order = sorted(curves, key=lambda curve: (math.isnan(curve.area), -curve.area))
    lines = [[curve.name, *map(percent, (*map(curve.at, SAVINGS), curve.area))] for curve in order]
    full_depth = f"{metric} at full depth: {percent(curves[0].ends[1])}; with layers saved:"
    return f"{full_depth}\n{aligned([header, *lines])}"


def comparison_table(
    groups: Sequence[Group],
    settings: Sequence[ExitCriterion],
    outcomes: Sequence[Sequence[Outcome]],
    metric: str,
) -> str:
    """Return a table per group, with one line per setting; metrics are in percent.

    The columns are the median and the range of the metric over the runs, the median of the mean
    exit layer, and the difference from the first group with its 95% bootstrap interval.
    """
    blocks = []
    for group, group_outcomes in zip(groups, outcomes, strict=True):
        num_runs = len(group.runs)
        lines = [["setting", metric, "mean exit layer", "difference from first group"]]
        for setting, outcome in zip(settings, group_outcomes, strict=True):
            lines.append(
                [
                    describe(setting),
                    _spread(outcome),
                    f"{outcome.median_exit_layer:.2f}",
                    _difference(outcome),
                ]
            )
        title = f"{group.name} ({num_runs} run{'s' if num_runs > 1 else ''})"
        blocks.append(f"{title}\n{aligned(lines)}")
    return "\n\n".join(blocks)


def _spread(outcome: Outcome) -> str:
    text = percent(outcome.median)
    if len(outcome.scores) == 1 or math.isnan(outcome.median):
        return text
    return f"{text} [{percent(min(outcome.scores))}, {percent(max(outcome.scores))}]"


def _difference(outcome: Outcome) -> str:
    if outcome.difference is None or outcome.interval is None:
        return ""
    if math.isnan(outcome.difference):
        return UNDEFINED
    low, high = outcome.interval
    return f"{100 * outcome.difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return the lines with the first column left-aligned and the other columns right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
