"""Writes a checkpoint as one serialised program, with the early exit inside it.

pabee-jax export --checkpoint runs/mrpc --output exported/mrpc --platforms cpu,cuda,tpu
"""

import dataclasses
import sys
from collections.abc import Sequence

from pabee_jax.commands import command_line
from pabee_jax.commands.options import define_flags, option, read_flags
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.export import DEFAULT_PLATFORMS, check_arguments, export
from pabee_jax.io import storage


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of `export`; each field is a flag."""

    checkpoint: str = option("Required: run or checkpoint directory, or hub id.", "")
    output: str = option("Required: directory of the exported program.", "")
    platforms: str = option(
        "Some of cpu, cuda, rocm, tpu, comma-separated.", ",".join(DEFAULT_PLATFORMS)
    )
    sequence_length: int | None = option(
        "Tokens per row; by default as many as the checkpoint takes."
    )
    dtype: str = option("Compute type: float32 or bfloat16.", "float32")

    def __post_init__(self):
        for name, meaning in (("checkpoint", "a checkpoint"), ("output", "the directory to write")):
            if not getattr(self, name):
                raise InputError(f"--{name} is missing: it names {meaning}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `pabee-jax export`."""
    argv = sys.argv if argv is None else argv
    define_flags(ExportOptions)

    def run(_: Sequence[str]) -> None:
        options = read_flags(ExportOptions)
        platforms = [name.strip() for name in options.platforms.split(",") if name.strip()]
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

    command_line.run(run, argv, __doc__)
