"""`train`: trains an encoder with an internal classifier on every layer, or resumes a run."""

from collections.abc import Sequence

from absl import flags

from pabee_jax.commands import command_line
from pabee_jax.commands.options import read_flags
from pabee_jax.commands.train_options import TrainOptions
from pabee_jax.distributed import processes
from pabee_jax.errors import InputError
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.run import train


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax train`."""
    command_line.define(TrainOptions, argv)

    def run(_: Sequence[str]) -> None:
        config: TrainConfig | None = flags.FLAGS.config
        if config is None:
            raise InputError(f"--config is missing: {TrainOptions.config_help}")
        options = read_flags(TrainOptions)
        if options.multihost:
            processes.start(
                options.coordinator,
                options.num_processes,
                options.process_id,
                timeout_s=options.start_timeout,
            )
        train(config, options.workdir, overwrite=options.overwrite)

    command_line.run(run, argv)
