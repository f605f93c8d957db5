"""Predicts the rows of files, block by block; a job that was killed continues where it stopped.

A job keeps a folder beside its output, OUTPUT.parts:

    job.json             what the predictions depend on; a job with something else is refused
    000000.errors.jsonl  the rows of a block that could not be used
    000000.rows.csv      the predictions of the other rows
    000000.json          the summary of the block, written last

A block is a fixed number of input rows, so the number of summaries is the place at which to
continue. At the end, the blocks are joined.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from tqdm import tqdm

from pabee_jax import criteria
from pabee_jax.data import table_files
from pabee_jax.data.batching import prefetched
from pabee_jax.data.files import text_problem
from pabee_jax.data.row_files import Row, RowFile
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.inputs import Text
from pabee_jax.inference.predictions import Predictions, column_names
from pabee_jax.io import lock
from pabee_jax.io.atomic import write_atomically

# The input rows of a block. A restart repeats at most one block.
ROWS_PER_BLOCK = 4096
_JOB_FILE = "job.json"


@dataclasses.dataclass(frozen=True)
class FileJob:
    """The predictions of the rows of files.

    Attributes:
        checkpoint: the checkpoint as the user gave it.
        inputs: the files; their rows are read in this order.
        output: the file to write: .csv, .tsv, .jsonl or .parquet.
        text: the column of the texts.
        text_pair: the column of the second texts of pairs; empty for single texts.
        keep: columns of the input that are copied to the output.
        batch_size: the most rows that run together; None for the driver's default.

    Raises:
        InputError: a file lacks a column, or the output has another extension.
    """

    checkpoint: str
    inputs: Sequence[RowFile]
    output: epath.Path
    text: str
    text_pair: str
    keep: Sequence[str]
    batch_size: int | None

    def __post_init__(self):
        table_files.check_extension(self.output)
        wanted = [self.text, *([self.text_pair] if self.text_pair else []), *self.keep]
        for file in self.inputs:
            for name in wanted:
                if name not in file.columns:
                    columns = ", ".join(map(repr, file.columns))
                    raise InputError(f"{file.path} has no column {name!r}: it has {columns}")

    @property
    def folder(self) -> epath.Path:
        """The folder of the parts."""
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def errors(self) -> epath.Path:
        """The file of the rows that could not be used; it exists only if there are any."""
        return self.output.with_name(f"{self.output.name}.errors.jsonl")

    def description(self, classifier: EarlyExitClassifier) -> dict[str, Any]:
        """Return what the output depends on, as JSON values."""
        classifiers = jax.tree.leaves(nnx.to_pure_dict(nnx.state(classifier.model.classifiers)))
        digest = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in classifiers))
        return {
            "checkpoint": self.checkpoint,
            # Another training of the same encoder at the same place has other classifiers.
            "classifiers": digest.hexdigest()[:16],
            "criterion": criteria.to_config(classifier.criterion),
            "dtype": str(classifier.model.dtype),
            "driver": classifier.driver,
            "batch_size": self.batch_size,
            "inputs": [[str(file.path), file.size] for file in self.inputs],
            "text": self.text,
            "text_pair": self.text_pair,
            "keep": list(self.keep),
            "rows_per_block": ROWS_PER_BLOCK,
        }

    def files_of(self, block: int) -> tuple[epath.Path, epath.Path, epath.Path]:
        """Return the files of a block: its predictions, its errors and its summary."""
        suffixes = (f".rows{self.output.suffix}", ".errors.jsonl", ".json")
        rows, errors, summary = (self.folder / f"{block:06d}{suffix}" for suffix in suffixes)
        return rows, errors, summary


class Summary(NamedTuple):
    """What became of the rows of a block, or of a whole job.

    Attributes:
        rows: the rows in the output.
        bad_rows: the rows in the file of errors.
        layers: the sum of the exit layers of the rows in the output.
    """

    rows: int
    bad_rows: int
    layers: int


def run(job: FileJob, classifier: EarlyExitClassifier, *, overwrite: bool = False) -> Summary:
    """Run the job, or the rest of it, and write its output.

    Raises:
        InputError: the output exists or belongs to another job (unless `overwrite`), another
            process runs the job, or a file cannot be read or written.
    """
    columns = output_columns(classifier, job.keep)
    description = job.description(classifier)
    _refuse_existing(job, description, overwrite)
    with lock.locked(job.folder, f"--output {job.output}", "writes"):
        _prepare(job, description)
        summaries = _finished(job)
        with _bar(job) as bar, contextlib.closing(prefetched(_rest(job, len(summaries)))) as blocks:
            rows_before = sum(summary.rows for summary in summaries)
            for block in blocks:
                if not bar.n:  # The speed counts only what this process reads.
                    bar.initial = bar.n = _bytes_read(job, block[0])
                summaries.append(_predict_block(job, len(summaries), block, classifier, columns))
                bar.update(_bytes_read(job, block[-1]) - bar.n)
                rows_now = sum(summary.rows for summary in summaries) - rows_before
                bar.set_postfix_str(_speed(bar, rows_now), refresh=False)
        if not summaries:  # The files have headers only.
            summaries.append(_predict_block(job, 0, [], classifier, columns))
        _join(job, len(summaries), columns)
    job.folder.rmtree()
    return Summary(*map(sum, zip(*summaries, strict=True)))


def output_columns(classifier: EarlyExitClassifier, keep: Sequence[str]) -> list[str]:
    """Return the columns of the output: the kept columns, and those of the predictions.

    Raises:
        InputError: a kept column has the name of a column of the predictions.
    """
    own = column_names(classifier.pretrained.label_names)
    for name in keep:
        if name in own:
            raise InputError(f"--keep {name}: the output has a column {name!r} of its own")
    return [*keep, *own]


def _refuse_existing(job: FileJob, description: dict[str, Any], overwrite: bool) -> None:
    """Raise InputError for an output that another command wrote, or for the parts of another job.

    A job that was killed while it joined its parts has both, and joins them again.
    """
    if overwrite:
        return
    stored = _stored_description(job)
    if stored is not None:
        if stored != description:
            raise InputError(
                f"{job.folder} holds the parts of another job, with other inputs, another "
                "checkpoint or other options; give another --output, or discard the parts with "
                "--overwrite"
            )
    elif job.output.exists():
        raise InputError(f"--output {job.output} exists; replace it with --overwrite")


def _stored_description(job: FileJob) -> dict[str, Any] | None:
    """Return the description of the job whose parts are in the folder; None without parts."""
    path = job.folder / _JOB_FILE
    return json.loads(path.read_text()) if path.exists() else None


def _prepare(job: FileJob, description: dict[str, Any]) -> None:
    """Write the description of the job, and remove the files of another job."""
    if _stored_description(job) != description:
        for path in job.folder.iterdir():
            if path.name != lock.LOCK_FILE:
                path.unlink()
    text = json.dumps(description, indent=1)
    write_atomically(job.folder / _JOB_FILE, lambda path: path.write_text(text))


def _finished(job: FileJob) -> list[Summary]:
    """Return the summaries of the finished blocks; remove the files of a block that is not."""
    summaries, own_names = [], {lock.LOCK_FILE, _JOB_FILE}
    while (files := job.files_of(len(summaries)))[-1].exists():
        summaries.append(Summary(*json.loads(files[-1].read_text())))
        own_names |= {path.name for path in files}
    for path in job.folder.iterdir():
        if path.name not in own_names:
            path.unlink()
    return summaries


def _rest(job: FileJob, finished: int) -> Iterator[list[Row]]:
    """Yield the rows of the blocks that are not finished."""
    rows = itertools.chain.from_iterable(file.rows() for file in job.inputs)
    rows = itertools.islice(rows, finished * ROWS_PER_BLOCK, None)
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        yield block


def _predict_block(
    job: FileJob,
    index: int,
    block: Sequence[Row],
    classifier: EarlyExitClassifier,
    columns: Sequence[str],
) -> Summary:
    """Write the files of a block."""
    kept, texts, errors = [], [], []
    for row in block:
        text, problem = _text_of(job, row)
        record = {name: row.cells.get(name) for name in job.keep}
        problem = problem or table_files.problem_of(record, job.output)
        if problem:
            errors.append({"file": str(row.path), "place": row.place, "error": problem})
        else:
            kept.append(record)
            texts.append(text)
    records, layers = [], 0
    if texts:
        predictions = classifier.predict(texts, job.batch_size)
        layers = int(predictions.exit_layers.sum())
        pairs = zip(kept, _records(predictions), strict=True)
        records = [record | of_row for record, of_row in pairs]
    summary = Summary(len(records), len(errors), layers)
    rows_file, errors_file, summary_file = job.files_of(index)
    lines = "".join(f"{json.dumps(error, ensure_ascii=False)}\n" for error in errors)
    write_atomically(errors_file, lambda path: path.write_text(lines))
    table_files.write_part(rows_file, columns, records)
    write_atomically(summary_file, lambda path: path.write_text(json.dumps(summary)))
    return summary


def _text_of(job: FileJob, row: Row) -> tuple[Text, str]:
    """Return the text or the pair of a row, and why it cannot be used ("" if it can)."""
    if row.problem:
        return "", row.problem
    columns = [job.text, job.text_pair] if job.text_pair else [job.text]
    texts: list[Any] = [row.cells.get(column) for column in columns]
    problems = filter(None, map(text_problem, columns, texts))
    return texts[0] if len(texts) == 1 else (texts[0], texts[1]), next(problems, "")


def _records(predictions: Predictions) -> list[dict[str, Any]]:
    columns = predictions.columns()
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, map(_rounded, row), strict=True)) for row in rows]


def _rounded(value: Any) -> Any:
    """Return a float32 with as many digits as it has."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _join(job: FileJob, blocks: int, columns: Sequence[str]) -> None:
    """Write the output and the errors of all blocks."""
    files = [job.files_of(block) for block in range(blocks)]
    errors = [path for _, path, _ in files if path.stat().length]
    if errors:
        write_atomically(job.errors, lambda path: table_files.concatenate(path, errors))
    elif job.errors.exists():
        job.errors.unlink()  # Of the command whose output is replaced.
    table_files.join(job.output, columns, [path for path, _, _ in files])


def _bar(job: FileJob) -> tqdm:
    # In a log file, each update of the progress bar is a line, so updates are rare.
    interval = 0.2 if sys.stderr.isatty() else 30
    total = sum(file.size for file in job.inputs)
    return tqdm(total=total, unit="B", unit_scale=True, desc="predict", mininterval=interval)


def _bytes_read(job: FileJob, row: Row) -> int:
    """Return the bytes of all files up to and including this row."""
    before = itertools.takewhile(lambda file: file.path != row.path, job.inputs)
    return sum(file.size for file in before) + row.bytes_read


def _speed(bar: tqdm, rows: int) -> str:
    return f"{rows / max(bar.format_dict['elapsed'], 1e-9):.0f} rows/s"
