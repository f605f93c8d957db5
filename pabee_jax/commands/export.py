"""`export`: writes a checkpoint as one serialized program, with the early exit inside it."""

from collections.abc import Sequence

from pabee_jax.commands import command_line
from pabee_jax.commands.export_options import ExportOptions
from pabee_jax.commands.options import read_flags
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.export import DEFAULT_PLATFORMS, check_arguments, export
from pabee_jax.io import storage


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax export`."""
    command_line.define(ExportOptions, argv)

    def run(_: Sequence[str]) -> None:
        options = read_flags(ExportOptions)
        names = DEFAULT_PLATFORMS if options.platforms is None else options.platforms.split(",")
        platforms = [name.strip() for name in names if name.strip()]
        directory = storage.local_path_of(options.output)
        check_arguments(directory, platforms, options.sequence_length)
        classifier = EarlyExitClassifier.from_pretrained(options.checkpoint, dtype=options.dtype)
        export(
            classifier,
            directory,
            platforms=platforms,
            sequence_length=options.sequence_length,
        )
        print(f"wrote {directory}, for {', '.join(platforms)}")

    command_line.run(run, argv)
