r"""Gives exits to a trained classifier without changing what it says at full depth.

    pabee-jax train --config attach --config.model=DIR --config.files.train=train.csv \
        --config.files.dev=dev.csv --workdir runs/with-exits
    pabee-jax train --config attach:mrpc --config.model=DIR --workdir runs/with-exits
    pabee-jax evaluate --checkpoint runs/with-exits --patience 0,2,3,4

From a clone, `python train.py --config configs/attach.py` does the same.

The model is a sequence classifier of Hugging Face, whose classification head becomes the last exit.
The other exits, each with a pooler and a classifier of the shape of the head, are trained on the
frozen encoder. Encoder and last exit keep the values that they have, to the bit.

The exits learn from the labels and from the predictions of the last exit. Without labels
(`--config.files.label=`), they learn from the predictions alone; the metrics on dev are then the
agreement with full depth.
"""

from pabee_jax.data.glue import GLUE_TASKS
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig


def get_config(task: str = "files") -> TrainConfig:
    if task != "files" and task not in GLUE_TASKS:
        raise InputError(
            f"unknown GLUE task {task!r}: give --config attach for your own files, or "
            f"--config attach:TASK, with TASK one of {', '.join(GLUE_TASKS)}"
        )
    config = TrainConfig(
        task=task,
        max_seq_length=128,
        batch_size=32,
        learning_rate=1e-3,
        num_epochs=3,
        strategy="attach",
        pooler="per_exit",
        order="length_grouped",
    )
    config.distill.weight = 1.0
    return config
