"""`predict`: the predictions and exit layers of the rows of files."""

from collections.abc import Sequence

from pabee_jax.commands import command_line
from pabee_jax.commands.options import read_flags
from pabee_jax.commands.predict_options import PredictOptions
from pabee_jax.data.tables import open_table
from pabee_jax.distributed import sharding
from pabee_jax.inference import file_job
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.file_job import FileJob
from pabee_jax.io import storage


def main(argv: Sequence[str]) -> None:
    """Run `pabee-jax predict`."""
    command_line.define(PredictOptions, argv)

    def run(_: Sequence[str]) -> None:
        predict(read_flags(PredictOptions))

    command_line.run(run, argv)


def predict(options: PredictOptions) -> None:
    """Write the predictions of the rows, and the rows that cannot be used.

    Raises:
        InputError: a checkpoint or a file that cannot be used, an output that exists, or no row
            that can be used.
    """
    texts = [options.text, *([options.text_pair] if options.text_pair else [])]
    paths = [storage.path_of(name) for name in options.input]
    job = FileJob(
        checkpoint=options.checkpoint,
        inputs=[open_table(path, texts, others=options.kept_columns) for path in paths],
        output=storage.path_of(options.output),
        text=options.text,
        text_pair=options.text_pair,
        keep=options.kept_columns,
        batch_size=options.batch_size,
    )
    classifier = EarlyExitClassifier.from_pretrained(
        options.checkpoint,
        criterion=options.exit_criterion,
        driver=options.driver,
        dtype=options.dtype,
        mesh=sharding.make_mesh(),
        compilation_cache=options.compilation_cache,
    )
    classifier.pretrained.require_tokenizer()
    summary = file_job.run(job, classifier, overwrite=options.overwrite)
    print(f"wrote {job.output}: {summary.rows} rows", end="")
    if summary.rows:
        mean = summary.layers / summary.rows
        print(f", mean exit layer {mean:.2f} of {classifier.num_layers}", end="")
    print()
    if summary.bad_rows:
        lines = "" if summary.bad_lines == summary.bad_rows else f" ({summary.bad_lines} lines)"
        print(f"{summary.bad_rows} rows{lines} could not be used: see {job.errors}")
