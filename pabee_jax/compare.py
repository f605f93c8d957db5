"""Compares runs that evaluate.py has been through.

    python -m pabee_jax.compare runs/a-seed0 runs/a-seed1 runs/b-seed0 runs/b-seed1

Runs that differ only in their seed are pooled (median and range). Groups that differ in anything
else are compared with the first one on the same rows, with paired bootstrap intervals.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath

from pabee_jax import command_line, storage
from pabee_jax.criteria import ExitCriterion, FixedLayer, Patience, check, describe, parse
from pabee_jax.errors import InputError
from pabee_jax.evaluation import report
from pabee_jax.evaluation.comparison import Group, Outcome, Run, compared, grouped
from pabee_jax.evaluation.metrics import METRICS


def compare(
    paths: Sequence[str], settings: Sequence[ExitCriterion], metric: str, output: epath.Path
) -> None:
    """Prints the table, and writes compare.csv, compare.json and compare.png into `output`.

    Args:
        settings: none: full depth and every patience that can save something, or every layer if
            the task is a regression.
        metric: empty: the task's first one.

    Raises:
        InputError: runs that cannot be read or compared, or a metric the task does not have.
    """
    if len(set(paths)) != len(paths):
        raise InputError("the same run is given twice")
    runs = [Run.read(path) for path in paths]
    groups = grouped(runs)
    known = runs[0].about.get("metrics") or []
    metric = metric or (known[0] if known else "")
    if metric not in METRICS or metric not in known:
        raise InputError(f"--metric {metric!r} is not one of the task's: {', '.join(known)}")
    exits = min(len(run.logits) for run in runs)
    is_regression = runs[0].logits.shape[2] == 1
    if not settings:
        settings = [Patience(each) for each in range(exits - 1)]
        if is_regression:  # Patience needs a threshold that only the user knows.
            settings = [FixedLayer(layer) for layer in range(exits, 0, -1)]
    for setting in settings:
        check(setting, is_regression)
    outcomes = compared(groups, settings, metric)
    print(table(groups, settings, outcomes, metric))
    write(groups, settings, outcomes, metric, output)


def table(groups, settings, outcomes, metric: str) -> str:
    """A block per group: each setting's metric (median, range), exit layer, and difference."""
    blocks = []
    for group, here in zip(groups, outcomes, strict=True):
        seeds = len(group.runs)
        lines = [["setting", metric, "mean exit layer", "against the first"]]
        for setting, outcome in zip(settings, here, strict=True):
            lines.append(
                [
                    describe(setting),
                    _spread(outcome),
                    f"{outcome.median_exit_layer:.2f}",
                    _difference(outcome),
                ]
            )
        title = f"{group.name} ({seeds} run{'s' if seeds > 1 else ''})"
        blocks.append(f"{title}\n{report.aligned(lines)}")
    return "\n\n".join(blocks)


def write(groups, settings, outcomes, metric: str, output: epath.Path) -> None:
    """The same as files; the picture shows metric against mean exit layer, a line per group."""
    records = [
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
        for group, here in zip(groups, outcomes, strict=True)
        for setting, outcome in zip(settings, here, strict=True)
    ]
    with report.results_folder(output) as folder:
        report.write_csv(folder / "compare.csv", records)
        report.write_json(folder / "compare.json", report.results([], {"settings": records}))
        plot(groups, outcomes, metric, folder / "compare.png")
    print(f"\ncompare.csv, compare.json, compare.png are in {output}")


def plot(
    groups: Sequence[Group], outcomes: Sequence[Sequence[Outcome]], metric: str, path: Path
) -> None:
    """Medians as points, ranges over the seeds as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for group, here in zip(groups, outcomes, strict=True):
        points = sorted(here, key=lambda outcome: outcome.median_exit_layer)
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


def _spread(outcome: Outcome) -> str:
    text = f"{100 * outcome.median:.2f}"
    if len(outcome.scores) == 1:
        return text
    return f"{text} [{100 * min(outcome.scores):.2f}, {100 * max(outcome.scores):.2f}]"


def _difference(outcome: Outcome) -> str:
    if outcome.difference is None or outcome.interval is None:
        return ""
    low, high = outcome.interval
    return f"{100 * outcome.difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def main() -> None:
    """The program. Its flags are defined here, so that importing this module defines none."""
    criterion = flags.DEFINE_multi_string(
        "criterion", [], "A setting, as in patience:patience=3; may be given several times."
    )
    metric = flags.DEFINE_string("metric", "", "By default the task's first.")
    output = flags.DEFINE_string("output", "comparison", "Directory of the results.")

    def run(arguments: Sequence[str]) -> None:
        if len(arguments) < 2:
            raise InputError("give the run directories: python -m pabee_jax.compare RUN RUN ...")
        settings = [parse(text) for text in criterion.value]
        compare(arguments[1:], settings, metric.value, storage.path_of(output.value))

    command_line.run(run, positional=True)


if __name__ == "__main__":
    main()
