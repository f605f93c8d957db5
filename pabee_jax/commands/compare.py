"""`compare`: compares runs that `evaluate` has evaluated."""

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from flax import traverse_util

from pabee_jax.analysis import metrics
from pabee_jax.analysis.comparison import Run, compared, grouped
from pabee_jax.commands import command_line
from pabee_jax.commands.compare_options import CompareOptions
from pabee_jax.commands.options import read_flags
from pabee_jax.criteria import ExitCriterion, FixedLayer, Patience, check, parse
from pabee_jax.errors import InputError
from pabee_jax.io import storage
from pabee_jax.reports import files, plots, tables
from pabee_jax.reports.results_folder import ResultsFolder
from pabee_jax.training import run_directory

_FILES = ("compare.csv", "compare.json", "compare.png")


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax compare`."""
    command_line.define(CompareOptions, argv)

    def run(arguments: Sequence[str]) -> None:
        if len(arguments) < 2:
            raise InputError("the run directories are missing: pabee-jax compare RUN RUN ...")
        options = read_flags(CompareOptions)
        settings = [parse(text) for text in options.criterion]
        output = storage.path_of(options.output)
        compare(arguments[1:], settings, options.metric, output, overwrite=options.overwrite)

    command_line.run(run, argv, positional=True)


def compare(
    paths: Sequence[str],
    settings: Sequence[ExitCriterion],
    metric: str,
    output: epath.Path,
    *,
    overwrite: bool = False,
) -> None:
    """Print the table, and write compare.csv, compare.json and compare.png into `output`.

    Args:
        paths: run directories.
        settings: if empty, full depth and every patience that can save a layer, or every layer if
            the task is a regression.
        metric: if empty, the task's first.
        output: directory of the results.
        overwrite: replace files that this command did not write.

    Raises:
        InputError: runs that cannot be read or compared, or a metric that the task does not have.
    """
    if len({storage.absolute(storage.path_of(path)) for path in paths}) != len(paths):
        raise InputError("the same run is given twice")
    folder = ResultsFolder(output, "compare.json", overwrite)
    folder.check(_FILES)
    runs = [read_run(path) for path in paths]
    groups = grouped(runs)
    task_metrics = runs[0].about.get("metrics") or []
    metric = metric or (task_metrics[0] if task_metrics else "")
    if metric not in metrics.METRICS or metric not in task_metrics:
        raise InputError(f"--metric {metric!r} is not one of the task's: {', '.join(task_metrics)}")
    num_layers = min(len(run.logits) for run in runs)
    is_regression = runs[0].logits.shape[2] == 1
    if not settings:
        settings = [Patience(patience) for patience in range(num_layers - 1)]
        if is_regression:  # Patience needs a threshold that only the user knows.
            settings = [FixedLayer(layer) for layer in range(num_layers, 0, -1)]
    for setting in settings:
        for run in runs:
            check(setting, len(run.logits), run.logits.shape[2])
    outcomes = compared(groups, settings, metric)
    values = [
        {metric: score}
        for group_outcomes in outcomes
        for outcome in group_outcomes
        for score in outcome.scores
    ]
    if undefined := metrics.undefined(values, groups[0].runs[0].labels):
        logging.warning("%s", undefined)
    print(tables.comparison_table(groups, settings, outcomes, metric))
    records = files.comparison_records(groups, settings, outcomes, metric)
    with folder.replace() as staging:
        files.write_csv(staging / "compare.csv", records)
        content = files.environment() | {"files": list(_FILES), "settings": records}
        files.write_json(staging / "compare.json", content)
        plots.plot_comparison(groups, outcomes, metric, staging / "compare.png")
    print(f"\n{', '.join(_FILES)} are in {output}")


def read_run(path: str) -> Run:
    """Read a run directory that `evaluate` has been through.

    Raises:
        InputError: not such a directory, or it was evaluated without labels.
    """
    folder = storage.path_of(path)
    config = run_directory.read_config(folder)
    try:
        about = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        with np.load(io.BytesIO((folder / "all_exit_logits.npz").read_bytes())) as saved:
            logits, ids = saved["logits"], saved["ids"]
            labels = saved.get("labels")
    except FileNotFoundError:
        raise InputError(
            f"{path} has not been evaluated: run pabee-jax evaluate --checkpoint {path} first"
        ) from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: its results cannot be read: {error}") from None
    if labels is None:
        raise InputError(f"{path} was evaluated on rows without labels: there is no metric")
    _check_results(path, about, logits, labels, ids)
    fields = traverse_util.flatten_dict(dataclasses.asdict(config), sep=".")
    return Run(path, fields, about, logits, labels, ids)


def _check_results(
    path: str, about: Any, logits: np.ndarray, labels: np.ndarray, ids: np.ndarray
) -> None:
    """Raise InputError for result files that `evaluate` would not write."""
    problem = ""
    if not isinstance(about, dict) or not isinstance(about.get("metrics"), list):
        problem = "results.json does not list the metrics"
    elif logits.ndim != 3 or 0 in logits.shape or logits.dtype.kind != "f":
        problem = f"the logits are {logits.dtype} of shape {logits.shape}"
    elif labels.shape != logits.shape[1:2] or ids.shape != labels.shape:
        problem = f"{logits.shape[1]} rows have labels of shape {labels.shape}, ids of {ids.shape}"
    elif not np.isfinite(logits).all():
        problem = "some logits are not finite"
    elif labels.dtype.kind not in ("f" if logits.shape[2] == 1 else "iu"):
        problem = f"the labels are {labels.dtype}"
    elif logits.shape[2] > 1 and not 0 <= labels.min() <= labels.max() < logits.shape[2]:
        problem = f"the labels are not from 0 to {logits.shape[2] - 1}"
    if problem:
        raise InputError(f"{path}: its results cannot be read: {problem}")
