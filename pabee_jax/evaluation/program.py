"""What evaluate.py does: one pass over the data, and everything that follows from its logits."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pabee_jax import compilation_cache, storage
from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.criteria import Oracle, check, check_task, known, warn
from pabee_jax.data.load import load_task
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError
from pabee_jax.evaluation import operating_points, report, robustness, selection
from pabee_jax.evaluation.curves import curves
from pabee_jax.evaluation.html_report import write_report
from pabee_jax.evaluation.operating_points import OperatingPoint, Rows
from pabee_jax.evaluation.options import Options
from pabee_jax.parameters import merge, split, stacked, unstacked
from pabee_jax.pretrained import Pretrained, load_pretrained
from pabee_jax.training import run_directory
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.config import check as check_config


def evaluate(options: Options, config: TrainConfig | None) -> None:
    """Prints the table and writes the results.

    Raises:
        InputError: a checkpoint or data that cannot be used, or that do not fit each other.
    """
    pretrained, task = _load(options, config)
    if options.calibrate:
        classifier = EarlyExitClassifier(pretrained, driver="full")
        selection.select(options, classifier, task, Rows.of(task.read(options.split), classifier))
        return
    if options.perturbed:
        classifier = EarlyExitClassifier(pretrained, driver="full")
        robustness.compare_pairs(options, classifier, task)
        return
    rows = None
    found = []
    for name, one in _checkpoints(options, pretrained):
        classifier = EarlyExitClassifier(one, driver=options.driver)
        rows = rows or Rows.of(task.read(options.split), classifier)
        points, logits = _evaluate_one(options, classifier, task, rows)
        _show(name, points, rows)
        found.append((name, points, logits))
    with report.results_folder(options.output) as folder:
        _write(options, folder, task, rows, found)
    with report.results_folder(options.output) as folder:
        _study(options, folder, task, rows, *found[-1])


def _load(options: Options, config: TrainConfig | None) -> tuple[Pretrained, Task]:
    checkpoint = storage.path_of(options.checkpoint)
    if (checkpoint / run_directory.CONFIG_FILE).is_file() and not (
        checkpoint / run_directory.WEIGHTS_FILE
    ).is_file():
        raise InputError(
            f"the run in {checkpoint} is not finished: go on with the train.py command that "
            "started it"
        )
    if config is None and not checkpoint.is_dir():
        raise InputError(
            f"there is no run directory {options.checkpoint} here; for one of the hub also say "
            "which data to use, with --config configs/glue.py:TASK"
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
    for name in options.names:
        check_task(known(name), task.is_regression)
    return pretrained, task


def _task(config: TrainConfig, pretrained: Pretrained, options: Options) -> Task:
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
    theirs = pretrained.label_names
    if task.label_names != theirs and set(task.label_names) == set(theirs):
        raise InputError(
            f"{options.checkpoint} numbers its classes {', '.join(theirs)}; task {task.name} "
            f"numbers them {', '.join(task.label_names)}"
        )
    return task


def _checkpoints(options: Options, pretrained: Pretrained) -> Iterator[tuple[str, Pretrained]]:
    """The finished checkpoint, or with --all_checkpoints every training checkpoint that is kept."""
    if not options.all_checkpoints:
        yield options.checkpoint, pretrained
        return
    folder = storage.path_of(options.checkpoint) / run_directory.CHECKPOINTS
    if not folder.is_dir():
        raise InputError(f"--all_checkpoints: {options.checkpoint} has no training checkpoints")
    checkpoints = Checkpoints(folder, read_only=True)
    graph, like = split(stacked(pretrained.model))
    for step in checkpoints.steps:
        model = unstacked(merge(graph, checkpoints.parameters(step, like)))
        yield f"step {step}", dataclasses.replace(pretrained, model=model)
    checkpoints.close()


def _evaluate_one(
    options: Options, classifier: EarlyExitClassifier, task: Task, rows: Rows
) -> tuple[list[OperatingPoint], np.ndarray]:
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    points = operating_points.replayed(logits, options.settings, task, rows)
    if options.driver != "full":
        expected = points
        if classifier.driver == "pool":
            print(classifier.pool_plan(options.batch_size))
        points = operating_points.run(classifier, options.settings, task, rows, options.batch_size)
        print(operating_points.agreement(points, expected, logits))
    if options.time:
        # The full driver cannot save time: what is timed is the driver that people deploy.
        if options.driver == "full":
            classifier = EarlyExitClassifier(classifier.pretrained, driver="auto")
        points = operating_points.timed(points, classifier, rows, options.batch_size)
    return points, logits


def _study(
    options: Options,
    folder: Path,
    task: Task,
    rows: Rows,
    name: str,
    points: list[OperatingPoint],
    logits: np.ndarray,
) -> None:
    """What --sweep and --report add, from the logits of the last checkpoint."""

    def metrics(answers: np.ndarray) -> dict[str, float]:
        return operating_points.metrics_of(answers, task, rows)

    metric = next(iter(metrics(logits[-1])), "")
    if options.sweep and not metric:
        raise InputError(f"--sweep needs labels; the {options.split} rows have none")
    found, title = [], f"{task.name}, {name}"
    if metric and (options.sweep or options.report):
        found = curves(logits, lambda answers: metrics(answers)[metric], options.names)
    if options.sweep:
        print(f"\n{report.curves_table(found, metric)}")
        if not task.is_regression or options.tolerance is not None:
            oracle = Oracle(rows.dataset.labels, options.tolerance or 0.0)
            (best,) = operating_points.replayed(logits, [oracle], task, rows)
            print(
                f"oracle (leaves at the first exit that is right): "
                f"{100 * best.metrics[metric]:.2f} at mean exit layer {best.mean_exit_layer:.2f}"
            )
        report.write_curves(folder, found, metric, title)
        print(f"sweep.csv, sweep.json, sweep.png are in {options.output}")
    if options.report:
        name = "report.html"
        write_report(folder / name, title, task, rows, logits, points, found, options.tolerance)
        print(f"the report is {options.output / name}")


def _show(name: str, points: list[OperatingPoint], rows: Rows) -> None:
    print(f"\n{name}: {len(rows.dataset)} rows")
    print(report.table(points))
    if rows.kinds is not None:
        print(f"\n{report.kinds_table(points, rows.kinds)}")


def _write(options: Options, folder: Path, task: Task, rows: Rows, found: list) -> None:
    output = options.output
    about = {"task": task.name, "split": options.split, "examples": len(rows.dataset)}
    about |= {"driver": options.driver, "metrics": list(task.metrics)}
    every = [
        {"checkpoint": name, **row}
        for name, points, _ in found
        for row in report.results(points, {})["rows"]
    ]
    report.write_json(folder / "results.json", {**report.results([], about), "rows": every})
    report.write_csv(folder / "results.csv", every)
    name, points, logits = found[-1]
    if points[0].metrics:
        report.plot_tradeoff(folder / "tradeoff.png", points, f"{task.name}, {name}")
        print(f"\nthe picture is {output / 'tradeoff.png'}")
    report.write_predictions(folder / "predictions.csv", points, task, rows)
    labels = {} if rows.dataset.labels is None else {"labels": rows.dataset.labels}
    np.savez(folder / "all_exit_logits.npz", logits=logits, ids=np.asarray(rows.ids), **labels)
    print(f"results.json, results.csv, predictions.csv, all_exit_logits.npz are in {output}")
    if options.predictions:
        for path in report.write_submission(options.predictions, points[0], task, rows):
            print(f"wrote {path}")
