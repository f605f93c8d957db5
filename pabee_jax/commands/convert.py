"""`convert`: writes a checkpoint in a format that other libraries read."""

from collections.abc import Sequence

from pabee_jax.checkpoints.plain import save_plain
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.commands import command_line
from pabee_jax.commands.convert_options import ConvertOptions
from pabee_jax.commands.options import read_flags
from pabee_jax.errors import InputError
from pabee_jax.inference import conversion
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.export import exported_length
from pabee_jax.inference.onnx_model import export_onnx
from pabee_jax.io import storage


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax convert`."""
    command_line.define(ConvertOptions, argv)

    def run(_: Sequence[str]) -> None:
        convert(read_flags(ConvertOptions))

    command_line.run(run, argv)


def convert(options: ConvertOptions) -> None:
    """Write the checkpoint in the other format, and compare it with the checkpoint.

    Raises:
        InputError: the output exists, the format cannot describe the checkpoint, or the library for
            which it is written computes something else. There is no output then.
    """
    output = storage.path_of(options.output)
    if output.exists():
        raise InputError(f"{output} exists already; give another directory, or delete it")
    pretrained = load_pretrained(options.checkpoint)
    with storage.new_folder(output) as folder:
        if options.to in ("plain", "flax"):
            last, flax = pretrained.model.config.num_hidden_layers, options.to == "flax"
            exit = last if options.exit is None else options.exit
            save_plain(pretrained, folder, exit, flax=flax)
            conversion.compare_plain(pretrained, folder, exit, flax=flax)
        elif options.to == "onnx":
            classifier = EarlyExitClassifier(pretrained)
            length = exported_length(classifier, options.sequence_length)
            export_onnx(classifier, folder, length)
            conversion.compare_onnx(classifier, folder / "model.onnx", length)
        else:
            save_pretrained(pretrained, folder, for_pytorch=True)
            conversion.compare_exits(pretrained, folder)
    print(f"wrote {output}")
