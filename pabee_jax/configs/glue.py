r"""Fine-tunes a pretrained BERT or ALBERT on one of GLUE's nine tasks, every exit jointly.

    python train.py --config configs/glue.py:mrpc --workdir runs/mrpc
    python train.py --config configs/glue.py:mrpc --config.model=DIR --config.data_dir=DIR \
        --workdir runs/mrpc
    python train.py --config configs/glue.py:mrpc,recommended --workdir runs/mrpc
    python evaluate.py --checkpoint runs/mrpc --patience 0,3,4,5,6,7,8

TASK, after the colon, is cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli. The model and the
data come from the Hugging Face hub, or, as in the second command, from local directories: a
checkpoint, and GLUE's original TSV files.

`TASK,recommended` gives every exit a pooler of its own that reads the mean over the tokens, and for
the scores of stsb the early exits also learn from the last one: docs/training-exits.md says why.
PyTorch PABEE cannot load the result.

Without it, reproduces the fine-tuning of "BERT Loses Patience" (arXiv 2006.04152): batch 32,
learning rate 2e-5, 5 epochs, 128 tokens, AdamW without weight decay, a linear decay without
warm-up, gradients clipped to norm 1. A batch is split over all devices; their number must divide
the batch size.

Results, with command, hardware and seeds: docs/results.md.
"""

from pabee_jax.data.glue import GLUE_TASKS
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig


def get_config(argument: str = "") -> TrainConfig:
    task, comma, preset = argument.partition(",")
    if comma and preset != "recommended":
        raise InputError(
            f"unknown preset {preset!r}: give --config configs/glue.py:TASK or "
            "configs/glue.py:TASK,recommended"
        )
    if task not in GLUE_TASKS:
        wrong = f"unknown GLUE task {task!r}" if task else "the GLUE task is missing"
        raise InputError(
            f"{wrong}: give --config configs/glue.py:TASK, with TASK one of {', '.join(GLUE_TASKS)}"
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
        config.pooling = "mean"
        config.pooler = "per_exit"
        config.classifier_bias = "prior"
        if task == "stsb":
            config.distill.weight = 1.0
    return config
