r"""Fine-tunes a pretrained encoder on a GLUE task, with all exits trained jointly.

    pabee-jax train --config glue:mrpc --workdir runs/mrpc
    pabee-jax train --config glue:mrpc --config.model=DIR --config.data_dir=DIR --workdir runs/mrpc
    pabee-jax train --config glue:mrpc,recommended --workdir runs/mrpc
    pabee-jax evaluate --checkpoint runs/mrpc --patience 0,3,4,5,6,7,8

From a clone, `python train.py --config configs/glue.py:mrpc` and `python evaluate.py` do the same.

The task after the colon is cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli. The model and the
data come from the Hugging Face hub or, as in the second command, from local directories: a
checkpoint, and GLUE's original TSV files.

`--config glue:TASK` reproduces the fine-tuning of "BERT Loses Patience" (arXiv 2006.04152): batch
size 32, learning rate 2e-5, 5 epochs, 128 tokens, AdamW without weight decay, linear learning-rate
decay without warm-up, gradients clipped to norm 1. A batch is split over all devices; their number
must divide the batch size.

`--config glue:TASK,recommended` gives every exit its own pooler, which reads the mean over the
tokens, and initializes the biases of new classifiers with the logarithms of the class frequencies,
or with the mean score, of the training rows. The exits have a learning rate of their own and equal
weights in the loss, and the predictions of the last exit are distilled into the early exits.
docs/training-exits.md gives the reasons. PyTorch PABEE cannot load the resulting checkpoint.

docs/results.md lists results with their commands, hardware and seeds.
"""

from pabee_jax.data.glue import GLUE_TASKS
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig, recommend


def get_config(argument: str = "") -> TrainConfig:
    task, comma, preset = argument.partition(",")
    if comma and preset != "recommended":
        raise InputError(
            f"unknown preset {preset!r}: give --config glue:TASK or --config glue:TASK,recommended"
        )
    if task not in GLUE_TASKS:
        problem = f"unknown GLUE task {task!r}" if task else "the GLUE task is missing"
        raise InputError(
            f"{problem}: give --config glue:TASK, with TASK one of {', '.join(GLUE_TASKS)}"
        )
    config = TrainConfig(
        task=task,
        model="albert-base-v2",
        max_seq_length=128,
        batch_size=32,
        learning_rate=2e-5,
        num_epochs=5,
        warmup_steps=0,
        weight_decay=0.0,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
    )
    if preset:
        recommend(config)
    return config
