"""The task that a configuration names."""

from collections.abc import Sequence
from pathlib import Path

from pabee_jax.data import demo, files, glue
from pabee_jax.data.config import DataConfig
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError


def load_task(config: DataConfig, label_names: Sequence[str] = ()) -> Task:
    """Return the task that `config.task` names; `Task.read` reads the rows of a split later.

    Args:
        label_names: class names by class id for task "files", from the checkpoint that is
            evaluated; without them, the training file is read for its labels.

    Raises:
        InputError: the task is unknown or empty, its files or folder cannot be read, or the class
            names of the user's files cannot be determined.
    """
    if config.task == "demo":
        return demo.task()
    if config.task == "files":
        values = config.files
        paths = {split: getattr(values, split) for split in ("train", "dev", "test")}
        return files.task(
            **{split: _within(config.data_dir, path) for split, path in paths.items()},
            text=values.text,
            text_pair=values.text_pair,
            label=values.label,
            regression=values.regression,
            skip_bad_rows=values.skip_bad_rows,
            label_names=() if values.regression else label_names,
        )
    if not config.task:
        raise InputError(
            "config.task is empty: choose it with --config glue:TASK, with TASK one of "
            f"{', '.join(glue.GLUE_TASKS)}"
        )
    return glue.task(config.task, config.data_dir)


def _within(data_dir: str, path: str) -> str:
    return str(Path(data_dir) / path) if path and data_dir else path
