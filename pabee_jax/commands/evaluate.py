"""`evaluate`: quality, exit layers and speed of every setting of a checkpoint, from one pass."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags, logging

from pabee_jax.analysis import measured, metrics, operating_points
from pabee_jax.analysis.curves import Curve, curves
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.analysis.rows import Rows
from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained
from pabee_jax.commands import choose_setting, command_line, perturbed
from pabee_jax.commands.evaluate_options import EvaluateOptions
from pabee_jax.commands.evaluate_results import (
    Evaluated,
    draw_figures,
    results_folder,
    write_data,
)
from pabee_jax.commands.options import read_flags
from pabee_jax.criteria import ONLY_LAST_EXIT, Oracle, check_task, criterion_class, warn
from pabee_jax.data.labels import are_numbered
from pabee_jax.data.load import load_task
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError
from pabee_jax.inference import compilation_cache
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.models.parameters import merge, split, stacked, unstacked
from pabee_jax.reports import tables
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
    output = results_folder(options, config, task)
    rows: Rows | None = None
    evaluated: list[Evaluated] = []
    for name, checkpoint in _checkpoints(options, pretrained):
        classifier = EarlyExitClassifier(checkpoint, driver=options.driver)
        rows = rows or _read_rows(options, task, classifier)
        points, logits = _evaluate_one(options, classifier, task, rows)
        _show(name, points, rows)
        evaluated.append(Evaluated(name, points, logits))
    if rows is None:
        raise InputError(f"--all_checkpoints: no checkpoint is kept in {options.checkpoint}")
    last = evaluated[-1]
    last_curves = _curves(options, task, rows, last)
    is_numbered = are_numbered(pretrained.label_names) and not (config and config.label_names)
    _warn(task, rows, evaluated, last_curves, is_numbered=is_numbered)
    if options.sweep:
        _show_curves(options, task, rows, last, last_curves)
    write_data(options, output, task, rows, evaluated, last_curves)
    draw_figures(options, output, pretrained, task, rows, last, last_curves)


def _load(options: EvaluateOptions, config: TrainConfig | None) -> tuple[Pretrained, Task]:
    checkpoint = options.checkpoint_directory
    if (checkpoint / run_directory.CONFIG_FILE).is_file() and not (
        checkpoint / run_directory.WEIGHTS_FILE
    ).is_file():
        raise InputError(
            f"the run in {checkpoint} is not finished: resume it with the train command that "
            "started it"
        )
    if config is None and not (checkpoint / run_directory.CONFIG_FILE).is_file():
        raise InputError(
            f"{options.checkpoint} is not the directory of a run, whose data would be used: name "
            "the data, with --config files --config.files.dev=FILE or with --config glue:TASK"
        )
    config = config or run_directory.read_config(checkpoint)
    check_config(config)
    if options.compilation_cache:
        compilation_cache.enable(options.compilation_cache)
    pretrained = load_pretrained(options.checkpoint).with_max_length(config.max_seq_length)
    task = _task(config, pretrained, options)
    shape = pretrained.model.config
    all_exits = [name for name in ("calibrate", "sweep", "report") if getattr(options, name)]
    if all_exits and pretrained.trained_exits == "last" and shape.num_hidden_layers > 1:
        raise InputError(
            f"--{all_exits[0]} evaluates exits that were never trained: {ONLY_LAST_EXIT}"
        )
    for setting in options.settings:
        pretrained.check_criterion(setting)
        warn(setting, shape.num_hidden_layers, task.is_regression)
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
    return task


def _read_rows(options: EvaluateOptions, task: Task, classifier: EarlyExitClassifier) -> Rows:
    rows = Rows.of(task.read(options.split), classifier.tokenize)
    if options.sweep and rows.dataset.labels is None:
        raise InputError(f"--sweep needs labels; the {options.split} rows have none")
    return rows


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
            print(classifier.pool_plan())
        points = measured.run(classifier, options.settings, task, rows, options.batch_size)
        print(operating_points.agreement(points, expected, logits))
    if options.time:
        # The full driver cannot save time: what is timed is the driver that people deploy.
        if options.driver == "full":
            classifier = EarlyExitClassifier(classifier.pretrained, driver="auto")
        points = measured.timed(points, classifier, rows, options.batch_size)
    return points, logits


def _curves(options: EvaluateOptions, task: Task, rows: Rows, evaluated: Evaluated) -> list[Curve]:
    """Return the curves of --sweep and --report; none if the rows have no labels."""
    metric = evaluated.metric
    if not metric or not (options.sweep or options.report):
        return []

    def score(answers: np.ndarray) -> float:
        return operating_points.metrics_of(answers, task, rows)[metric]

    return curves(evaluated.logits, score, options.criterion_names)


def _warn(
    task: Task,
    rows: Rows,
    evaluated: Sequence[Evaluated],
    last_curves: Sequence[Curve],
    *,
    is_numbered: bool,
) -> None:
    """Log what is undefined, and whether the classes may be in another order."""
    labels, last = rows.dataset.labels, evaluated[-1]
    if labels is None:
        return
    values = [point.metrics for result in evaluated for point in result.points]
    values += [
        {last.metric: score} for curve in last_curves for score in (*curve.ends, *curve.scores)
    ]
    for sentence in (
        metrics.undefined(values, labels),
        metrics.wrong_order(last.logits[-1], labels, task, is_numbered=is_numbered),
    ):
        if sentence:
            logging.warning("%s", sentence)


def _show(name: str, points: list[OperatingPoint], rows: Rows) -> None:
    print(f"\n{name}: {len(rows.dataset)} rows")
    print(tables.table(points))
    if rows.kinds is not None:
        print(f"\n{tables.kinds_table(points, rows.kinds)}")


def _show_curves(
    options: EvaluateOptions, task: Task, rows: Rows, evaluated: Evaluated, last_curves: list[Curve]
) -> None:
    metric, labels = evaluated.metric, rows.dataset.labels
    print(f"\n{tables.curves_table(last_curves, metric)}")
    if labels is not None and (not task.is_regression or options.tolerance is not None):
        oracle = Oracle(labels, options.tolerance or 0.0)
        (best,) = operating_points.replayed(evaluated.logits, [oracle], task, rows)
        print(
            f"oracle (each row exits at the first exit that is correct): "
            f"{tables.percent(best.metrics[metric])} at mean exit layer {best.mean_exit_layer:.2f}"
        )
