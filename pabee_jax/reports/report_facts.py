"""The facts at the top of the HTML report: which model, rows, versions and hardware."""

import datetime

import jax

from pabee_jax.analysis.rows import Rows
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.labels import counts_text
from pabee_jax.data.task import Task
from pabee_jax.models.parameters import split
from pabee_jax.reports.files import environment


def facts_of(
    pretrained: Pretrained, checkpoint: str, task: Task, split_name: str, rows: Rows
) -> list[tuple[str, str]]:
    """Return the names and the values of the facts.

    Args:
        pretrained: the evaluated model.
        checkpoint: the name of the checkpoint, as the user gave it.
        task: the task of the rows.
        split_name: "dev" or "test".
        rows: the evaluated rows.
    """
    config = pretrained.model.config
    _, parameters = split(pretrained.model)
    num_parameters = sum(array.size for array in jax.tree.leaves(parameters))
    outputs = "1 score" if task.is_regression else f"{task.num_labels} classes"
    now = datetime.datetime.now(datetime.UTC)
    software = environment()
    versions = [f"{name} {software[name]}" for name in ("pabee_jax", "jax", "numpy")]
    versions.append(f"Python {software['python']}")
    return [
        ("task and split", f"{task.name}, {split_name}"),
        ("rows", str(len(rows.dataset))),
        *_classes(task, rows),
        ("checkpoint", checkpoint),
        (
            "model",
            f"{config.family}, {config.num_hidden_layers} layers with an exit each, hidden size "
            f"{config.hidden_size}, {outputs}",
        ),
        ("parameters", f"{num_parameters:,}"),
        ("hardware", software["device"]),
        ("versions", ", ".join(versions)),
        ("written at (UTC)", now.isoformat(timespec="seconds")),
    ]


def _classes(task: Task, rows: Rows) -> list[tuple[str, str]]:
    labels = rows.dataset.labels
    if task.is_regression or labels is None:
        return []
    facts = [("rows by class", counts_text(task.counts(labels)))]
    if "f1" in task.metrics:
        facts.append(("class of F1", task.label_names[task.positive_class]))
    return facts
