"""`convert`: writes a checkpoint in a format that other libraries read."""

from collections.abc import Sequence

from pabee_jax.checkpoints.plain import save_plain
from pabee_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from pabee_jax.commands import command_line
from pabee_jax.commands.convert_options import ConvertOptions
from pabee_jax.commands.options import read_flags
from pabee_jax.errors import InputError
from pabee_jax.io import storage


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax convert`."""
    command_line.define(ConvertOptions, argv)

    def run(_: Sequence[str]) -> None:
        options = read_flags(ConvertOptions)
        output = storage.path_of(options.output)
        if output.exists():
            raise InputError(f"{output} exists already; give another directory, or delete it")
        pretrained = load_pretrained(options.checkpoint)
        if options.to == "plain":
            exit = options.exit
            if exit is None:
                exit = pretrained.model.config.num_hidden_layers
            save_plain(pretrained, output, exit)
        else:
            save_pretrained(pretrained, output, for_pytorch=True)
        print(f"wrote {output}")

    command_line.run(run, argv)
