"""Trains a small ALBERT from scratch on generated sentences (`pabee_jax.data.demo`).

    pabee-jax train --config demo --workdir runs/demo
    pabee-jax evaluate --checkpoint runs/demo --patience 0,1,2,3,4,5

From a clone, `python train.py --config configs/demo.py` and `python evaluate.py` do the same.

The model has six layers of width 64 that share their parameters. Training takes 2,000 steps of 64
sentences: two minutes on 2 CPU cores. docs/results-demo.md has the accuracy and the speed for three
seeds, which differ by several points of accuracy.
"""

from pabee_jax.training.config import ScratchConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        task="demo",
        scratch=ScratchConfig(
            num_hidden_layers=6,
            embedding_size=64,
            hidden_size=64,
            num_attention_heads=4,
            intermediate_size=128,
            initializer_range=0.06,
        ),
        max_seq_length=32,
        batch_size=64,
        learning_rate=1e-3,
        max_steps=2000,
        warmup_steps=150,
        weight_decay=0.01,
        eval_every=500,
    )
