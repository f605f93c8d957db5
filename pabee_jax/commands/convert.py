"""`convert`: writes a checkpoint in a format that other libraries read."""

from collections.abc import Sequence

from pabee_jax.checkpoints.plain import save_plain
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.commands import command_line
from pabee_jax.commands.convert_options import ConvertOptions
from pabee_jax.commands.options import read_flags
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.onnx_model import export_onnx
from pabee_jax.io import storage


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax convert`."""
    command_line.define(ConvertOptions, argv)

    def run(_: Sequence[str]) -> None:
        convert(read_flags(ConvertOptions))

    command_line.run(run, argv)


def convert(options: ConvertOptions) -> None:
    """Write the checkpoint in the other format.

    Raises:
        InputError: the output exists, or the format cannot describe the checkpoint.
    """
    output = storage.path_of(options.output)
    if output.exists():
        raise InputError(f"{output} exists already; give another directory, or delete it")
    pretrained = load_pretrained(options.checkpoint)
    if options.to in ("plain", "flax"):
        last = pretrained.model.config.num_hidden_layers
        exit = last if options.exit is None else options.exit
        save_plain(pretrained, output, exit, flax=options.to == "flax")
    elif options.to == "onnx":
        export_onnx(EarlyExitClassifier(pretrained), output, options.sequence_length)
    else:
        save_pretrained(pretrained, output, for_pytorch=True)
    print(f"wrote {output}")
