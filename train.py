"""Trains an encoder with an internal classifier on every layer.

python train.py --config configs/demo.py --workdir runs/demo
"""

from absl import flags
from ml_collections import config_flags

from pabee_jax import command_line, processes
from pabee_jax.data.glue import GLUE_TASKS
from pabee_jax.errors import InputError
from pabee_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, such as configs/demo.py."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run, or gs://BUCKET/...; an interrupted run goes on."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the run that is in --workdir.")
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "This is one of several processes; JAX finds the others where it can."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "With --multihost: HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --multihost: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --multihost: which one, from 0.")
_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "With --multihost: seconds to wait for the others.", lower_bound=1
)


def main(_) -> None:
    if _CONFIG.value is None:
        raise InputError(
            "--config is missing: give --config configs/demo.py, configs/files.py or "
            f"configs/glue.py:TASK, with TASK one of {', '.join(GLUE_TASKS)}"
        )
    if not _WORKDIR.value:
        raise InputError("--workdir is missing: give the directory of the run, as --workdir DIR")
    several = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _MULTIHOST.value:
        processes.start(*several, timeout_s=_TIMEOUT.value)
    elif any(value is not None for value in several):
        raise InputError("--coordinator, --num_processes and --process_id are for --multihost")
    train(_CONFIG.value, _WORKDIR.value, overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    command_line.run(main)
