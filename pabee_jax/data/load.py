"""The task that a configuration names."""

from collections.abc import Sequence
from pathlib import Path

from pabee_jax.data import demo, files, glue, labels
from pabee_jax.data.config import DataConfig
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError, listed


def load_task(
    config: DataConfig, classifier: Sequence[str] = (), *, is_new_head: bool = False
) -> Task:
    """Return the task that `config.task` names; `Task.read` reads the rows of a split later.

    The classes get the ids that they have in the classifier. Class names are compared without case
    and separators, see `labels.class_id_of`.

    Args:
        classifier: the names of the classifier's outputs in their order. LABEL_0, LABEL_1, ... say
            nothing: the order is then that of `config.label_names` or the task's own.
        is_new_head: the classifier may be new, or be trained for other classes: if `classifier`
            does not name the classes of the task, the task keeps its own order.

    Raises:
        InputError: the task is unknown or empty, its files or folder cannot be read, the class
            names of the user's files cannot be determined, or the classes of the task differ from
            `config.label_names` or from those of the classifier.
    """
    stated = labels.parse_names(config.label_names) if config.label_names else ()
    names = stated or (() if labels.are_numbered(classifier) else tuple(classifier))
    _check_stated(stated, classifier)
    if config.task == "files":
        is_known = stated or not is_new_head
        return _files_task(config, names if is_known else (), classifier, is_new_head)
    task = demo.task() if config.task == "demo" else _glue_task(config)
    if stated and task.is_regression:
        raise InputError(
            f"config.label_names is for classification, but task {task.name} is a regression task"
        )
    if not names or task.is_regression:
        return task
    ordered = task.with_classes(names)
    if ordered is None and stated:
        raise InputError(
            f"config.label_names is {', '.join(stated)}, but the classes of task {task.name} are "
            f"{listed(task.label_names)}"
        )
    # For another number of classes, the message about the number is clearer.
    if ordered is None and not is_new_head and len(names) == task.num_labels:
        raise other_classes(names, task)
    return ordered or task


def other_classes(names: Sequence[str], task: Task) -> InputError:
    """Return the error for a classifier whose classes are not those of the task."""
    return InputError(
        f"the classifier has the classes {listed(names)} in this order, but task {task.name} has "
        f"{listed(task.label_names)}; if they mean the same, give the classes of the task in the "
        "order of the classifier with config.label_names"
    )


def _check_stated(stated: Sequence[str], classifier: Sequence[str]) -> None:
    """Raise InputError if `config.label_names` has the classifier's classes in another order."""
    order = labels.class_ids_of(stated, classifier)
    if order and order != sorted(order):
        raise InputError(
            f"config.label_names is {listed(stated)}, but the classifier has these classes in the "
            f"order {listed(classifier)}; leave config.label_names out"
        )


def _files_task(
    config: DataConfig, names: Sequence[str], classifier: Sequence[str], is_new_head: bool
) -> Task:
    values = config.files
    if values.regression and config.label_names:
        raise InputError("config.label_names is for classification, but files.regression is true")
    paths = {split: getattr(values, split) for split in ("train", "dev", "test")}
    return files.task(
        **{split: _within(config.data_dir, path) for split, path in paths.items()},
        text=values.text,
        text_pair=values.text_pair,
        label=values.label,
        regression=values.regression,
        skip_bad_rows=values.skip_bad_rows,
        label_names=() if values.regression else names,
        # A new head has no classes that could replace those of the files.
        classifier=classifier if values.label or not is_new_head else (),
    )


def _glue_task(config: DataConfig) -> Task:
    if not config.task:
        raise InputError(
            "config.task is empty: name your files, with --config files "
            "--config.files.train=FILE --config.files.dev=FILE, or a task, with --config "
            f"glue:TASK, TASK being one of {', '.join(glue.GLUE_TASKS)}"
        )
    return glue.task(config.task, config.data_dir)


def _within(data_dir: str, path: str) -> str:
    return str(Path(data_dir) / path) if path and data_dir else path
