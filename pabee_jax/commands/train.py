"""Trains an encoder with an internal classifier on every layer, or resumes a run.

pabee-jax train --config demo --workdir runs/demo
"""

import dataclasses
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from pabee_jax.commands import command_line
from pabee_jax.commands.config_file import USAGE
from pabee_jax.commands.options import define_flags, option, read_flags, refuse_without_effect
from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.run import train

_TIMEOUT_S = 300


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The options of `train` beside `--config`; each field is a flag."""

    workdir: str = option(
        "Required: directory of the run, or gs://BUCKET/...; an unfinished run is resumed.", ""
    )
    overwrite: bool = option("Replace the run that is in --workdir.", False)
    multihost: bool = option(
        "Join the other processes of a run; on known clusters JAX finds them by itself.", False
    )
    coordinator: str | None = option("With --multihost: HOST:PORT of process 0.")
    num_processes: int | None = option("With --multihost: the number of processes.")
    process_id: int | None = option("With --multihost: the index of this process, from 0.")
    start_timeout: int = option(
        "With --multihost: seconds to wait for the other processes.", _TIMEOUT_S
    )

    def __post_init__(self):
        if not self.workdir:
            raise InputError(
                "--workdir is missing: give the directory of the run, as --workdir DIR"
            )
        if self.start_timeout < 1:
            raise InputError(f"--start_timeout is {self.start_timeout}; it must be at least 1")
        for_multihost = ("coordinator", "num_processes", "process_id", "start_timeout")
        refuse_without_effect(self, {}, {name: ("multihost",) for name in for_multihost})


def main(argv: Sequence[str] | None = None) -> None:
    """Run `pabee-jax train`."""
    argv = sys.argv if argv is None else argv
    define_flags(TrainOptions)
    config_flags.DEFINE_config_file("config", None, f"Required: {USAGE}.", sys_argv=list(argv))

    def run(_: Sequence[str]) -> None:
        config: TrainConfig | None = flags.FLAGS.config
        if config is None:
            raise InputError(f"--config is missing: give {USAGE}")
        options = read_flags(TrainOptions)
        if options.multihost:
            processes.start(
                options.coordinator,
                options.num_processes,
                options.process_id,
                timeout_s=options.start_timeout,
            )
        train(config, options.workdir, overwrite=options.overwrite)

    command_line.run(run, argv, __doc__)
