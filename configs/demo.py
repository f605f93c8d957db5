"""demo"""

from pabee_jax.training.config import ScratchConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(task="demo")
