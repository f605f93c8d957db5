"""From a configuration to its task."""

from collections.abc import Sequence
from pathlib import Path

from pabee_jax.data import demo, files, glue
from pabee_jax.data.config import DataConfig
from pabee_jax.data.task import Task
from pabee_jax.errors import InputError


def load_task(config: DataConfig, label_names: Sequence[str] = ()) -> Task:
    """The task that `config.task` names; its rows are read later, split by split.

    Args:
        label_names: the classes of a checkpoint that is evaluated on a user's own files, which
            then need no training file to say what the classes are.

    Raises:
        InputError: an unknown task.
    """
    if config.task == "demo":
        return demo.task()
    if config.task == "files":
        values = config.files
        paths = {name: getattr(values, name) for name in ("train", "dev", "test")}
        return files.task(
            **{name: _within(config.data_dir, path) for name, path in paths.items()},
            text=values.text,
            text_pair=values.text_pair,
            label=values.label,
            regression=values.regression,
            label_names=() if values.regression else label_names,
        )
    if not config.task:
        raise InputError(
            "config.task is empty: choose it with --config configs/glue.py:TASK, with TASK one of "
            f"{', '.join(glue.GLUE_TASKS)}"
        )
    return glue.task(config.task, config.data_dir)


def _within(data_dir: str, path: str) -> str:
    return str(Path(data_dir) / path) if path and data_dir else path
