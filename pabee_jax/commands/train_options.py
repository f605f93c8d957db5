"""The options of `train`: each written down once, all checked before any file is opened."""

import dataclasses
from typing import ClassVar

from pabee_jax.commands.config_file import USAGE
from pabee_jax.commands.options import option, refuse_without_effect
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig, leaves

_TIMEOUT_S = 300


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The options of `train` beside `--config`; each field is a flag.

    Raises:
        InputError: a value that cannot be used, or an option that has no effect.
    """

    config_help: ClassVar[str] = f"Required: {USAGE}."
    config_fields: ClassVar[tuple[str, ...]] = tuple(leaves(TrainConfig()))

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
