"""Predicts the rows of files, block by block; a job that was killed continues where it stopped.

A job keeps a folder beside its output, OUTPUT.parts:

    job.json             what the predictions depend on; a job with something else is refused
    000000.errors.jsonl  the rows of a block that could not be used
    000000.rows.csv      the predictions of the other rows
    000000.json          the summary of the block, written last

A block is a fixed number of input rows, so the number of summaries is the place at which to
continue. A summary has the digest of all rows up to the end of its block: a job continues only if
it reads the same rows again. At the end, the blocks are joined. The job removes only files that it
has made.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from tqdm import tqdm

from pabee_jax import criteria
from pabee_jax.data import table_files
from pabee_jax.data.batching import prefetched
from pabee_jax.data.tables import Row, TableFile
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.inputs import Text
from pabee_jax.inference.predictions import Predictions, column_names
from pabee_jax.io import lock, storage
from pabee_jax.io.atomic import is_temporary, write_atomically

# The input rows of a block. A restart repeats at most one block.
ROWS_PER_BLOCK = 4096
_JOB_FILE = "job.json"
# The files of a job in its folder, and the temporary files that a killed process leaves there.
_OWN_FILE = re.compile(
    r"\.?(job\.json|\d{6,}\.(rows\.\w+|errors\.jsonl|json))(\.[0-9a-f]{8}\.tmp)?|"
    + re.escape(lock.LOCK_FILE)
)


@dataclasses.dataclass(frozen=True)
class FileJob:
    """The predictions of the rows of files.

    Attributes:
        checkpoint: the checkpoint as the user gave it.
        inputs: the files, opened with the columns of the texts and the kept columns; their rows
            are read in this order.
        output: the file to write: .csv, .tsv, .jsonl or .parquet.
        text: the column of the texts.
        text_pair: the column of the second texts of pairs; empty for single texts.
        keep: columns of the input that are copied to the output.
        batch_size: the most rows that run together; None for the driver's default.

    Raises:
        InputError: the output has another extension, is a folder or would replace an input.
    """

    checkpoint: str
    inputs: Sequence[TableFile]
    output: epath.Path
    text: str
    text_pair: str
    keep: Sequence[str]
    batch_size: int | None

    def __post_init__(self):
        table_files.check_extension(self.output)
        if self.output.is_dir():
            raise InputError(f"--output {self.output} is a folder; give a file")
        replaced = [storage.absolute(path) for path in (self.output, self.errors)]
        for file in self.inputs:
            if storage.absolute(epath.Path(file.path)) in replaced:
                raise InputError(f"--output {self.output} would replace --input {file.path}")

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
            "digests": True,  # Version 0.1 wrote parts without the digests of rows.
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
        bad_lines: the lines (Parquet: the rows) of these.
        layers: the sum of the exit layers of the rows in the output.
    """

    rows: int
    bad_rows: int
    bad_lines: int
    layers: int


class _Block(NamedTuple):
    """Rows that are predicted together, with the digest of all rows up to the last of them."""

    rows: list[Row]
    digest: str


def run(job: FileJob, classifier: EarlyExitClassifier, *, overwrite: bool = False) -> Summary:
    """Run the job, or the rest of it, and write its output.

    Raises:
        InputError: the output exists or belongs to another job (unless `overwrite`), the folder of
            the parts holds something else, another process runs the job, a file cannot be read or
            written, the rows of finished blocks have changed (unless `overwrite`), or no row can be
            used. In the last case, the file of errors is written.
    """
    columns = output_columns(classifier, job.keep)
    table_files.check_columns(job.output, columns)
    description = job.description(classifier)
    _refuse_existing(job, description, overwrite)
    with lock.locked(job.folder, f"--output {job.output}", "writes"):
        if _stored_job(job).get("job") != description:
            _remove_files(job)
        _write_job(job, description, may_replace=overwrite)
        summaries, blocks = _finished(job, overwrite)
        with _bar(job) as bar, contextlib.closing(prefetched(blocks)) as rest:
            rows_before = sum(summary.rows for summary in summaries)
            for block in rest:
                if not bar.n:  # The speed counts only what this process reads.
                    bar.initial = bar.n = _bytes_read(job, block.rows[0])
                summaries.append(_predict_block(job, len(summaries), block, classifier, columns))
                bar.update(_bytes_read(job, block.rows[-1]) - bar.n)
                rows_now = sum(summary.rows for summary in summaries) - rows_before
                bar.set_postfix_str(_speed(bar, rows_now), refresh=False)
        total = (
            Summary(*map(sum, zip(*summaries, strict=True))) if summaries else Summary(0, 0, 0, 0)
        )
        _write_job(job, description, may_replace=True)
        _join(job, len(summaries), total, columns)
        _remove_files(job)
    _remove_folder(job)
    if not total.rows:
        reason = f"see {job.errors}" if total.bad_rows else "the files have no rows"
        raise InputError(f"no row of --input can be used, and no output was written: {reason}")
    return total


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
    """Raise InputError if the job would replace files of the user or the parts of another job.

    A job that was killed while it joined its parts has both output and parts, and joins them again.
    """
    stored = _stored_job(job)
    if overwrite:
        return
    if stored and stored["job"] != description:
        other = "another job, with other inputs, another checkpoint or other options"
        if "digests" not in stored["job"]:
            other = "an earlier version of pabee_jax, which cannot be continued"
        raise InputError(
            f"{job.folder} holds the parts of {other}; give another --output, or discard the parts "
            "with --overwrite"
        )
    for path in (job.output, job.errors):
        if path.exists() and not stored.get("may_replace"):
            raise InputError(f"--output {job.output}: {path} exists; replace it with --overwrite")


def _stored_job(job: FileJob) -> dict[str, Any]:
    """Return the content of the job file in the folder of the parts; empty without parts.

    Raises:
        InputError: the folder is not one that a job has made.
    """
    folder = job.folder
    if not folder.exists():
        return {}
    try:
        if folder.is_dir() and not [path for path in folder.iterdir() if not _is_of_start(path)]:
            return {}
        content = json.loads((folder / _JOB_FILE).read_text(encoding="utf-8"))
        if "classifiers" in content:  # The description of a job of version 0.1.
            content = {"job": content}
        if "classifiers" in content["job"]:
            return content
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise InputError(
        f"{folder} was not made by predict, which keeps its parts in a folder of this name: move "
        "it away, or give another --output"
    )


def _is_of_start(path: epath.Path) -> bool:
    """Return whether a job has made this file before it wrote its job file."""
    is_lock = path.name == lock.LOCK_FILE and not path.stat().length
    return is_lock or is_temporary(path.name, [_JOB_FILE])


def _write_job(job: FileJob, description: dict[str, Any], *, may_replace: bool) -> None:
    """Write the job file, with whether the job may replace files at the place of its output."""
    may_replace = may_replace or _stored_job(job).get("may_replace", False)
    text = json.dumps({"job": description, "may_replace": may_replace}, indent=1)
    write_atomically(job.folder / _JOB_FILE, lambda path: path.write_text(text))


def _remove_files(job: FileJob, keep: Collection[str] = (lock.LOCK_FILE,)) -> None:
    """Remove the files that a job has made in its folder.

    The summaries go first, from the last one, and the job file goes last, so that a killed process
    leaves parts that can be continued.
    """
    if not job.folder.exists():  # A bucket has no empty folders.
        return
    paths = [path for path in job.folder.iterdir() if _OWN_FILE.fullmatch(path.name)]
    paths.sort(key=lambda path: path.name, reverse=True)
    paths.sort(key=lambda path: (path.name == _JOB_FILE, path.name.count(".") > 1))
    for path in paths:
        if path.name not in keep:
            path.unlink()


def _remove_folder(job: FileJob) -> None:
    _remove_files(job, keep=())
    if not job.folder.exists():
        return
    if any(job.folder.iterdir()):
        logging.warning("%s holds files that predict has not made; it stays", job.folder)
    else:
        job.folder.rmdir()


def _finished(job: FileJob, overwrite: bool) -> tuple[list[Summary], Iterator[_Block]]:
    """Return the summaries of the finished blocks, and the blocks that are not finished.

    Raises:
        InputError: the rows of a finished block have changed (unless `overwrite`).
    """
    summaries: list[Summary] = []
    blocks = _blocks(job)
    own_names = {lock.LOCK_FILE, _JOB_FILE}
    while (files := job.files_of(len(summaries)))[-1].exists():
        *counts, digest = json.loads(files[-1].read_text())
        block = next(blocks, None)
        if block is None or block.digest != digest:
            if not overwrite:
                raise InputError(
                    f"{job.folder} holds predictions of rows that have changed in --input since; "
                    "give another --output, or discard the parts with --overwrite"
                )
            summaries, blocks, own_names = [], _blocks(job), {lock.LOCK_FILE, _JOB_FILE}
            break
        summaries.append(Summary(*counts))
        own_names |= {path.name for path in files}
    _remove_files(job, keep=own_names)
    return summaries, blocks


def _blocks(job: FileJob) -> Iterator[_Block]:
    """Yield all rows of the inputs in blocks."""
    digest = hashlib.sha256()
    rows = itertools.chain.from_iterable(file.rows() for file in job.inputs)
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        for row in block:
            consumed = [str(row.path), row.first, row.last, row.cells, row.problem]
            digest.update(repr(consumed).encode())
        yield _Block(block, digest.hexdigest())


def _predict_block(
    job: FileJob,
    index: int,
    block: _Block,
    classifier: EarlyExitClassifier,
    columns: Sequence[str],
) -> Summary:
    """Write the files of a block."""
    kept, errors = [], []
    texts: list[Text] = []
    bad_lines = 0
    for row in block.rows:
        record = {name: row.cells.get(name) for name in job.keep}
        if problem := row.problem or table_files.problem_of(record, job.output):
            bad_lines += row.last - row.first + 1
            place = {"place": row.first, "where": row.place}
            errors.append({"file": str(row.path), **place, "error": problem})
            continue
        kept.append(record)
        text = row.cells[job.text]
        texts.append((text, row.cells[job.text_pair]) if job.text_pair else text)
    records, layers = [], 0
    if texts:
        predictions = classifier.predict(texts, job.batch_size)
        layers = int(predictions.exit_layers.sum())
        pairs = zip(kept, _records(predictions), strict=True)
        records = [record | of_row for record, of_row in pairs]
    summary = Summary(len(records), len(errors), bad_lines, layers)
    rows_file, errors_file, summary_file = job.files_of(index)
    lines = "".join(f"{json.dumps(error, ensure_ascii=False)}\n" for error in errors)
    write_atomically(errors_file, lambda path: path.write_text(lines, encoding="utf-8"))
    table_files.write_part(rows_file, columns, records)
    text = json.dumps([*summary, block.digest])
    write_atomically(summary_file, lambda path: path.write_text(text))
    return summary


def _records(predictions: Predictions) -> list[dict[str, Any]]:
    columns = predictions.columns()
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, map(_rounded, row), strict=True)) for row in rows]


def _rounded(value: Any) -> Any:
    """Return a float32 with as many digits as it has."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _join(job: FileJob, blocks: int, total: Summary, columns: Sequence[str]) -> None:
    """Write the errors of all blocks, and the output if any row could be used."""
    files = [job.files_of(block) for block in range(blocks)]
    if total.bad_rows:
        errors = [path for _, path, _ in files]
        write_atomically(job.errors, lambda path: table_files.concatenate(path, errors))
    if total.rows:
        table_files.join(job.output, columns, [path for path, _, _ in files])
        if not total.bad_rows:  # Of the command whose output is replaced.
            job.errors.unlink(missing_ok=True)


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
