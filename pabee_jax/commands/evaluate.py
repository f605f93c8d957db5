"""`evaluate`: quality, exit layers and speed of every setting of a checkpoint, from one pass."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from pabee_jax.analysis import measured, operating_points
from pabee_jax.analysis.curves import curves
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.analysis.rows import Rows
from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained
from pabee_jax.commands import choose_setting, command_line, perturbed
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.commands.options import read_flags
from pabee_jax.criteria import Oracle, check, check_task, criterion_class, warn
from pabee_jax.data.load import load_task
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError
from pabee_jax.inference import compilation_cache
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.io import storage
from pabee_jax.models.parameters import merge, split, stacked, unstacked
from pabee_jax.reports import files, plots, tables
from pabee_jax.reports.html_report import write_report
from pabee_jax.training import run_directory
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.config import check as check_config


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax evaluate`."""
    command_line.define(EvaluateOptions, argv)

    def run(_: Sequence[str]) -> None:
        evaluate(read_flags(EvaluateOptions), flags.FLAGS.config)

    command_line.run(run, argv, config_fields=EvaluateOptions.config_fields)


def evaluate(options: EvaluateOptions, config: TrainConfig | None) -> None:
    """Print the table and write the results.

    Raises:
        InputError: a checkpoint or data that cannot be used, or that do not fit each other.
    """
    pretrained, task = _load(options, config)
    if options.calibrate:
        choose_setting.choose_setting(options, pretrained, task)
        return
    if options.perturbed:
        perturbed.compare_texts(options, pretrained, task)
        return
    rows: Rows | None = None
    evaluated: list[tuple[str, list[OperatingPoint], np.ndarray]] = []
    for name, checkpoint in _checkpoints(options, pretrained):
        classifier = EarlyExitClassifier(checkpoint, driver=options.driver)
        rows = rows or Rows.of(task.read(options.split), classifier.tokenize)
        points, logits = _evaluate_one(options, classifier, task, rows)
        _show(name, points, rows)
        evaluated.append((name, points, logits))
    if rows is None:
        raise InputError(f"--all_checkpoints: no checkpoint is kept in {options.checkpoint}")
    with files.results_folder(options.output_directory) as folder:
        _write(options, folder, task, rows, evaluated)
    with files.results_folder(options.output_directory) as folder:
        _study(options, folder, task, rows, *evaluated[-1])


def _load(options: EvaluateOptions, config: TrainConfig | None) -> tuple[Pretrained, Task]:
    checkpoint = options.checkpoint_directory
    if (checkpoint / run_directory.CONFIG_FILE).is_file() and not (
        checkpoint / run_directory.WEIGHTS_FILE
    ).is_file():
        raise InputError(
            f"the run in {checkpoint} is not finished: resume it with the train command that "
            "started it"
        )
    if config is None and not checkpoint.is_dir():
        raise InputError(
            f"there is no run directory {options.checkpoint}; for a checkpoint of the hub, also "
            "name the data to use, with --config glue:TASK"
        )
    config = config or run_directory.read_config(checkpoint)
    check_config(config)
    if options.compilation_cache:
        compilation_cache.enable(options.compilation_cache)
    pretrained = load_pretrained(options.checkpoint).with_max_length(config.max_seq_length)
    task = _task(config, pretrained, options)
    for setting in options.settings:
        check(setting, task.is_regression)
        warn(setting, pretrained.model.config.num_hidden_layers, task.is_regression)
    for name in options.criterion_names:
        check_task(criterion_class(name), task.is_regression)
    return pretrained, task


def _task(config: TrainConfig, pretrained: Pretrained, options: EvaluateOptions) -> Task:
    task = load_task(config, pretrained.label_names)
    labels = pretrained.model.config.num_labels
    if task.num_labels != labels:
        kinds = {True: "a score (1 output)", False: f"{task.num_labels} classes"}
        raise InputError(
            f"task {task.name} asks for {kinds[task.is_regression]}, but {options.checkpoint} has "
            f"{labels} outputs"
        )
    if options.regression_threshold is not None and not task.is_regression:
        raise InputError(
            f"--regression_threshold is for regression; task {task.name} is a classification"
        )
    if options.tolerance is not None and not task.is_regression:
        raise InputError(f"--tolerance is for regression; task {task.name} is a classification")
    names = pretrained.label_names
    if task.label_names != names and set(task.label_names) == set(names):
        raise InputError(
            f"{options.checkpoint} has the classes {', '.join(names)} in this order; task "
            f"{task.name} has the order {', '.join(task.label_names)}"
        )
    return task


def _checkpoints(
    options: EvaluateOptions, pretrained: Pretrained
) -> Iterator[tuple[str, Pretrained]]:
    """The finished checkpoint, or with --all_checkpoints every training checkpoint that is kept."""
    if not options.all_checkpoints:
        yield options.checkpoint, pretrained
        return
    folder = options.checkpoint_directory / run_directory.CHECKPOINTS
    if not folder.is_dir():
        raise InputError(f"--all_checkpoints: {options.checkpoint} has no training checkpoints")
    checkpoints = Checkpoints(folder, read_only=True)
    structure, like = split(stacked(pretrained.model))
    for step in checkpoints.steps:
        model = unstacked(merge(structure, checkpoints.parameters(step, like)))
        yield f"step {step}", dataclasses.replace(pretrained, model=model)
    checkpoints.close()


def _evaluate_one(
    options: EvaluateOptions, classifier: EarlyExitClassifier, task: Task, rows: Rows
) -> tuple[list[OperatingPoint], np.ndarray]:
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    points = operating_points.replayed(logits, options.settings, task, rows)
    if options.driver != "full":
        expected = points
        if classifier.driver == "pool":
            print(classifier.pool_plan(options.batch_size))
        points = measured.run(classifier, options.settings, task, rows, options.batch_size)
        print(operating_points.agreement(points, expected, logits))
    if options.time:
        # The full driver cannot save time: what is timed is the driver that people deploy.
        if options.driver == "full":
            classifier = EarlyExitClassifier(classifier.pretrained, driver="auto")
        points = measured.timed(points, classifier, rows, options.batch_size)
    return points, logits


def _study(
    options: EvaluateOptions,
    folder: Path,
    task: Task,
    rows: Rows,
    name: str,
    points: list[OperatingPoint],
    logits: np.ndarray,
) -> None:
    """Add what --sweep and --report ask for, from the logits of the last checkpoint."""
    labels, metrics = rows.dataset.labels, operating_points.metrics_of(logits[-1], task, rows)
    if options.sweep and labels is None:
        raise InputError(f"--sweep needs labels; the {options.split} rows have none")
    all_curves, title = [], f"{task.name}, {name}"
    metric = next(iter(metrics), "")
    if metrics and (options.sweep or options.report):
        all_curves = curves(
            logits,
            lambda answers: operating_points.metrics_of(answers, task, rows)[metric],
            options.criterion_names,
        )
    if options.sweep and labels is not None:
        print(f"\n{tables.curves_table(all_curves, metric)}")
        if not task.is_regression or options.tolerance is not None:
            oracle = Oracle(labels, options.tolerance or 0.0)
            (best,) = operating_points.replayed(logits, [oracle], task, rows)
            print(
                f"oracle (each row exits at the first exit that is correct): "
                f"{100 * best.metrics[metric]:.2f} at mean exit layer {best.mean_exit_layer:.2f}"
            )
        files.write_curves(folder, all_curves, metric)
        plots.plot_curves(folder / "sweep.png", all_curves, metric, title)
        print(f"sweep.csv, sweep.json, sweep.png are in {options.output_directory}")
    if options.report:
        path = folder / "report.html"
        write_report(path, title, task, rows, logits, points, all_curves, options.tolerance)
        print(f"the report is {options.output_directory / path.name}")


def _show(name: str, points: list[OperatingPoint], rows: Rows) -> None:
    print(f"\n{name}: {len(rows.dataset)} rows")
    print(tables.table(points))
    if rows.kinds is not None:
        print(f"\n{tables.kinds_table(points, rows.kinds)}")


def _write(
    options: EvaluateOptions,
    folder: Path,
    task: Task,
    rows: Rows,
    evaluated: list[tuple[str, list[OperatingPoint], np.ndarray]],
) -> None:
    output = options.output_directory
    about = {"task": task.name, "split": options.split, "examples": len(rows.dataset)}
    about |= {"driver": options.driver, "metrics": list(task.metrics)}
    records = [
        {"checkpoint": name, **record}
        for name, points, _ in evaluated
        for record in files.records(points)
    ]
    files.write_json(folder / "results.json", about | files.environment() | {"rows": records})
    files.write_csv(folder / "results.csv", records)
    name, points, logits = evaluated[-1]
    if points[0].metrics:
        plots.plot_tradeoff(folder / "tradeoff.png", points, f"{task.name}, {name}")
        print(f"\nthe picture is {output / 'tradeoff.png'}")
    files.write_predictions(folder / "predictions.csv", points, task, rows)
    arrays: dict[str, Any] = {"logits": logits, "ids": np.asarray(rows.ids)}
    if rows.dataset.labels is not None:
        arrays["labels"] = rows.dataset.labels
    np.savez(folder / "all_exit_logits.npz", **arrays)
    print(f"results.json, results.csv, predictions.csv, all_exit_logits.npz are in {output}")
    if options.predictions:
        path = storage.local_path_of(options.predictions)
        for written in files.write_submission(path, points[0], task, rows):
            print(f"wrote {written}")
