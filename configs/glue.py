"""glue"""

from pabee_jax.training.config import TrainConfig


def get_config(task: str = "") -> TrainConfig:
    return TrainConfig(task=task)
