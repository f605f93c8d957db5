"""What evaluate.py does, with its arguments checked before any file is opened."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pabee_jax import compilation_cache
from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.criteria import Patience, warn
from pabee_jax.data.load import load_task
from pabee_jax.data.task import Task
from pabee_jax.drivers.plan import check_driver
from pabee_jax.errors import InputError
from pabee_jax.evaluation import report, sweep
from pabee_jax.evaluation.sweep import OperatingPoint, Rows
from pabee_jax.parameters import merge, split, stacked, unstacked
from pabee_jax.pretrained import Pretrained, load_pretrained
from pabee_jax.training import run_directory
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import TrainConfig, check


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of evaluate.py; see its flags."""

    checkpoint: str
    settings: tuple[Patience, ...]
    driver: str
    time: bool
    batch_size: int | None
    output: Path
    regression_threshold: float | None
    split: str
    predictions: Path | None
    all_checkpoints: bool
    compilation_cache: str | None

    @classmethod
    def checked(
        cls,
        *,
        checkpoint: str | None,
        patience: str,
        output: str | None,
        predictions: str | None,
        **others: Any,
    ) -> "Options":
        """Raises InputError for arguments that cannot be meant."""
        if not checkpoint:
            raise InputError("--checkpoint is missing: a run directory, a checkpoint or a hub id")
        check_driver(others["driver"])
        if others["split"] not in ("dev", "test"):
            raise InputError(f"--split is {others['split']!r}; it must be dev or test")
        if others["batch_size"] is not None and others["batch_size"] < 1:
            raise InputError(f"--batch_size is {others['batch_size']}; it must be at least 1")
        threshold = others["regression_threshold"]
        settings = tuple(
            Patience(value, 0.0 if threshold is None else threshold)
            for value in _patience_values(patience)
        )
        if predictions and len(settings) != 1:
            raise InputError(
                "--predictions writes the answers of one setting: give one --patience, not "
                f"{len(settings)}"
            )
        if predictions and not Path(predictions).expanduser().parent.is_dir():
            raise InputError(f"--predictions {predictions}: there is no such folder")
        if not output and not Path(checkpoint).expanduser().is_dir():
            output = Path(checkpoint).name
        return cls(
            checkpoint=checkpoint,
            settings=settings,
            output=Path(output or checkpoint).expanduser(),
            predictions=Path(predictions).expanduser() if predictions else None,
            **others,
        )


def evaluate(options: Options, config: TrainConfig | None) -> None:
    """Prints the table and writes the results.

    Raises:
        InputError: a checkpoint or data that cannot be used, or that do not fit each other.
    """
    checkpoint = Path(options.checkpoint).expanduser()
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
    check(config)
    if options.compilation_cache:
        compilation_cache.enable(options.compilation_cache)
    pretrained = load_pretrained(options.checkpoint).with_max_length(config.max_seq_length)
    task = _task(config, pretrained, options)
    for setting in options.settings:
        warn(setting, pretrained.model.config.num_hidden_layers, task.is_regression)
    rows = None
    found = []
    for name, one in _checkpoints(options, checkpoint, pretrained):
        classifier = EarlyExitClassifier(one, driver=options.driver)
        rows = rows or Rows.of(task.read(options.split), classifier)
        points, logits = _evaluate_one(options, classifier, task, rows)
        _show(name, points, rows)
        found.append((name, points, logits))
    _write(options, task, rows, found)


def _patience_values(text: str) -> list[int]:
    values = []
    for part in text.split(","):
        try:
            values.append(int(part))
        except ValueError:
            raise InputError(
                f"--patience takes whole numbers with commas between them, not {text!r}"
            ) from None
    if any(value < 0 for value in values):
        raise InputError(f"--patience must be 0 or more, not {min(values)}")
    return list(dict.fromkeys(values))


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


def _checkpoints(
    options: Options, directory: Path, pretrained: Pretrained
) -> Iterator[tuple[str, Pretrained]]:
    """The finished checkpoint, or with --all_checkpoints every training checkpoint that is kept."""
    if not options.all_checkpoints:
        yield options.checkpoint, pretrained
        return
    folder = directory / run_directory.CHECKPOINTS
    if not folder.is_dir():
        raise InputError(f"--all_checkpoints: {directory} has no training checkpoints")
    checkpoints = Checkpoints(folder)
    graph, like = split(stacked(pretrained.model))
    for step in checkpoints.steps:
        model = unstacked(merge(graph, checkpoints.parameters(step, like)))
        yield f"step {step}", dataclasses.replace(pretrained, model=model)
    checkpoints.close()


def _evaluate_one(
    options: Options, classifier: EarlyExitClassifier, task: Task, rows: Rows
) -> tuple[list[OperatingPoint], np.ndarray]:
    logits = classifier.all_exit_logits(rows.dataset, options.batch_size)
    points = sweep.replayed(logits, options.settings, task, rows)
    if options.driver != "full":
        expected = points
        if classifier.driver == "pool":
            print(classifier.pool_plan(options.batch_size))
        points = sweep.run(classifier, options.settings, task, rows, options.batch_size)
        print(sweep.agreement(points, expected, logits))
    if options.time:
        # The full driver cannot save time: what is timed is the driver that people deploy.
        if options.driver == "full":
            classifier = EarlyExitClassifier(classifier.pretrained, driver="auto")
        points = sweep.timed(points, classifier, rows, options.batch_size)
    return points, logits


def _show(name: str, points: list[OperatingPoint], rows: Rows) -> None:
    print(f"\n{name}: {len(rows.dataset)} rows")
    print(report.table(points))
    if rows.kinds is not None:
        print(f"\n{report.kinds_table(points, rows.kinds)}")


def _write(options: Options, task: Task, rows: Rows, found: list) -> None:
    output = options.output
    about = {"task": task.name, "split": options.split, "examples": len(rows.dataset)}
    about |= {"driver": options.driver}
    try:
        output.mkdir(parents=True, exist_ok=True)
        every = [
            {"checkpoint": name, **row}
            for name, points, _ in found
            for row in report.results(points, {})["rows"]
        ]
        report.write_json(output / "results.json", {**report.results([], about), "rows": every})
        report.write_csv(output / "results.csv", every)
        name, points, logits = found[-1]
        if points[0].metrics:
            report.plot_tradeoff(output / "tradeoff.png", points, f"{task.name}, {name}")
            print(f"\nthe picture is {output / 'tradeoff.png'}")
        report.write_predictions(output / "predictions.csv", points, task, rows)
        labels = {} if rows.dataset.labels is None else {"labels": rows.dataset.labels}
        np.savez(output / "all_exit_logits.npz", logits=logits, ids=np.asarray(rows.ids), **labels)
        print(f"results.json, results.csv, predictions.csv, all_exit_logits.npz are in {output}")
        if options.predictions:
            for path in report.write_submission(options.predictions, points[0], task, rows):
                print(f"wrote {path}")
    except OSError as error:
        place = error.filename or output
        raise InputError(f"the results cannot be written: {place}: {error.strerror}") from None
