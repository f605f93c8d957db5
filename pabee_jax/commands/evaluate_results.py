"""The files that `evaluate` writes: which, where, and which of earlier results they replace."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from pabee_jax.analysis.curves import Curve
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.analysis.rows import Rows
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.data.task import Task
from pabee_jax.io import storage
from pabee_jax.reports import files, plots
from pabee_jax.reports.html_report import write_report
from pabee_jax.reports.report_facts import facts_of
from pabee_jax.reports.results_folder import ResultsFolder
from pabee_jax.training import run_directory
from pabee_jax.training.config import TrainConfig

_DATA_FILES = ("results.json", "results.csv", "predictions.csv", "all_exit_logits.npz")
_SWEEP_DATA_FILES = ("sweep.json", "sweep.csv")
_TRADEOFF, _SWEEP_FIGURE, _REPORT = "tradeoff.png", "sweep.png", "report.html"
_ALL_FILES = (*_DATA_FILES, *_SWEEP_DATA_FILES, _TRADEOFF, _SWEEP_FIGURE, _REPORT)


class Evaluated(NamedTuple):
    """What the evaluation of one checkpoint gave.

    Attributes:
        name: the checkpoint.
        points: the operating point of every setting.
        logits: (exits, rows, classes) the logits of every exit.
    """

    name: str
    points: list[OperatingPoint]
    logits: np.ndarray

    @property
    def metric(self) -> str:
        """The name of the task's first metric; empty if the rows have no labels."""
        return next(iter(self.points[0].metrics), "")


def results_folder(
    options: EvaluateOptions, config: TrainConfig | None, task: Task
) -> ResultsFolder:
    """Return the folder of the results, checked; the default depends on the data.

    The checkpoint's own folder is for the results on the dev rows of the run. Results on other data
    go into a folder beside them.
    """
    folder = options.output_directory
    if not options.output:
        is_other_data = config is not None and (folder / run_directory.CONFIG_FILE).is_file()
        parts = [task.name] * is_other_data + [options.split] * (options.split != "dev")
        if parts:
            folder /= "-".join([run_directory.OTHER_RESULTS, *parts])
    output = ResultsFolder(folder, "results.json", options.overwrite)
    names = [*_DATA_FILES, _TRADEOFF]
    names += [*_SWEEP_DATA_FILES, _SWEEP_FIGURE] if options.sweep else []
    names += [_REPORT] if options.report else []
    output.check(names, {"task": task.name, "split": options.split})
    return output


def write_data(
    options: EvaluateOptions,
    output: ResultsFolder,
    task: Task,
    rows: Rows,
    evaluated: list[Evaluated],
    last_curves: list[Curve],
) -> None:
    """Write the tables, the predictions and the logits, all or none.

    The figures and sweeps of earlier results remain if they describe the same logits.
    """
    last = evaluated[-1]
    figures = _figures(options, last)
    written = [*_DATA_FILES, *(_SWEEP_DATA_FILES if options.sweep else ())]
    about = {
        "task": task.name,
        "split": options.split,
        "logits_sha256": hashlib.sha256(np.ascontiguousarray(last.logits).tobytes()).hexdigest(),
    }
    earlier = {*output.earlier.get("files", _ALL_FILES if output.earlier else ())} & {*_ALL_FILES}
    is_same = all(output.earlier.get(name) == value for name, value in about.items())
    kept = [name for name in earlier if is_same and name not in (*written, *figures)]
    records = [
        {"checkpoint": name, **record}
        for name, points, _ in evaluated
        for record in files.records(points)
    ]
    index = {
        **about,
        "examples": len(rows.dataset),
        "driver": options.driver,
        "metrics": list(task.metrics),
        **_classes(task, rows),
        **files.environment(),
        "files": sorted([*written, *figures, *kept]),
        "rows": records,
    }
    arrays: dict[str, Any] = {"logits": last.logits, "ids": np.asarray(rows.ids)}
    if rows.dataset.labels is not None:
        arrays["labels"] = rows.dataset.labels
    with output.replace(stale=earlier - {*written, *kept}) as folder:
        files.write_json(folder / "results.json", index)
        files.write_csv(folder / "results.csv", records)
        files.write_predictions(folder / "predictions.csv", last.points, task, rows)
        np.savez(folder / "all_exit_logits.npz", **arrays)
        if options.sweep:
            files.write_curves(folder, last_curves, last.metric)
    print(f"\n{', '.join(written)} are in {output.path}")
    if options.predictions:
        path = storage.local_path_of(options.predictions)
        for submission in files.write_submission(path, last.points[0], task, rows):
            print(f"wrote {submission}")


def _classes(task: Task, rows: Rows) -> dict[str, Any]:
    """Return the classes by class id, the number of rows of each, and the class of F1."""
    if task.is_regression:
        return {}
    labels = rows.dataset.labels
    counts = None if labels is None else list(task.counts(labels).values())
    f1 = {"positive_class": task.positive_class} if "f1" in task.metrics else {}
    return {"classes": list(task.label_names), "class_counts": counts, **f1}


def draw_figures(
    options: EvaluateOptions,
    output: ResultsFolder,
    pretrained: Pretrained,
    task: Task,
    rows: Rows,
    evaluated: Evaluated,
    last_curves: list[Curve],
) -> None:
    """Draw the figures, all or none. They come last: the data are written without them."""
    name, points, logits = evaluated
    title, metric, names = f"{task.name}, {name}", evaluated.metric, _figures(options, evaluated)
    with output.replace() as folder:
        if _TRADEOFF in names:
            plots.plot_tradeoff(folder / _TRADEOFF, points, title)
        if _SWEEP_FIGURE in names:
            plots.plot_curves(folder / _SWEEP_FIGURE, last_curves, metric, title)
        if _REPORT in names:
            facts = facts_of(pretrained, name, task, options.split, rows)
            path, tolerance = folder / _REPORT, options.tolerance
            write_report(path, title, facts, task, rows, logits, points, last_curves, tolerance)
    if names:
        print(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} in {output.path}")


def _figures(options: EvaluateOptions, evaluated: Evaluated) -> list[str]:
    """Return the names of the figures that are going to be drawn."""
    drawn = [
        (_TRADEOFF, bool(evaluated.metric)),
        (_SWEEP_FIGURE, options.sweep),
        (_REPORT, options.report),
    ]
    return [name for name, is_drawn in drawn if is_drawn]
