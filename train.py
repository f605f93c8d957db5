"""Trains an encoder with an internal classifier on every layer.

python train.py --config configs/demo.py --workdir runs/demo
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from pabee_jax import command_line
from pabee_jax.data.glue import GLUE_TASKS
from pabee_jax.errors import InputError
from pabee_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/demo.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an interrupted run goes on.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the run that is in --workdir.")


def main(_) -> None:
    if _CONFIG.value is None:
        raise InputError(
            "--config is missing: give --config configs/demo.py, configs/files.py or "
            f"configs/glue.py:TASK, with TASK one of {', '.join(GLUE_TASKS)}"
        )
    if not _WORKDIR.value:
        raise InputError("--workdir is missing: give the directory of the run, as --workdir DIR")
    train(_CONFIG.value, Path(_WORKDIR.value), overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    command_line.run(main)
