r"""Fine-tunes a pretrained encoder on your own CSV, TSV, JSON-lines or Parquet files.

    pabee-jax train --config files --config.files.train=train.csv --config.files.dev=dev.csv \
        --config.files.text=review --config.files.label=verdict --workdir runs/reviews
    pabee-jax evaluate --checkpoint runs/reviews --patience 0,3,4,5,6,7,8

From a clone, `python train.py --config configs/files.py` and `python evaluate.py` do the same.

`--config.files.text_pair=COLUMN` adds the second text of a pair, `--config.files.regression=true`
trains on scores instead of classes, and `--config.model=DIR` starts from a local checkpoint.

The exits are those that docs/training-exits.md recommends: every exit has its own pooler, which
reads the mean over the tokens, the exits learn faster than the encoder, and also from the last
exit. With `files:paper`, the exits and the recipe are those of "BERT Loses Patience" (arXiv
2006.04152), which PyTorch PABEE can load; with some encoders, its early exits learn nothing.

A batch is split over all devices; their number must divide the batch size.
"""

from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig, recommend


def get_config(preset: str = "recommended") -> TrainConfig:
    if preset not in ("recommended", "paper"):
        raise InputError(f"unknown preset {preset!r}: give --config files or --config files:paper")
    config = TrainConfig(
        task="files",
        model="albert-base-v2",
        max_seq_length=128,
        batch_size=32,
        learning_rate=2e-5,
        num_epochs=5,
    )
    if preset == "recommended":
        recommend(config)
    return config
