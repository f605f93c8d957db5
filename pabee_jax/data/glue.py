"""The nine GLUE tasks, from the Hugging Face hub or from GLUE's original TSV files."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from pabee_jax.data.files import Table
from pabee_jax.data.tables import read_text
from pabee_jax.data.task import Examples, Task
from pabee_jax.errors import InputError, first_line_of
from pabee_jax.io import storage

_HUB_ID = "nyu-mll/glue"
_PROBE_SECONDS = 5.0
_USE_FILES = "use the original TSV files with --config.data_dir=DIR"
_BINARY = ("0", "1")
_MATCH = ("_matched", "_mismatched")


@dataclasses.dataclass(frozen=True)
class _Layout:
    """File names, column names, labels and metrics of a GLUE task.

    Attributes:
        folder: the usual name of the task's folder in the GLUE download.
        columns: names of the text columns in the TSV files.
        hub_columns: names of the same columns on the hub.
        label: name of the label column in the TSV files.
        label_names: class names by class id, in the hub's order; empty for scores from 0 to 5.
        spellings: class names in the TSV files and in GLUE submissions, by class id.
        metrics: names of the task's metrics; the first metric is the primary metric.
        headerless: column names of files without a header.
        suffixes: suffixes of "dev" and "test" in the names of their parts.
        skips_short_rows: rows with too few columns are skipped with a warning, not an error.
    """

    folder: str
    columns: tuple[str, ...]
    hub_columns: tuple[str, ...]
    label: str
    label_names: tuple[str, ...]
    spellings: tuple[str, ...]
    metrics: tuple[str, ...]
    headerless: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ("",)
    skips_short_rows: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_LAYOUTS = {
    "cola": _Layout(
        "CoLA", ("sentence",), ("sentence",), "label",
        ("unacceptable", "acceptable"), _BINARY, ("matthews",),
        headerless=("source", "label", "star", "sentence"),
    ),
    "mnli": _Layout(
        "MNLI", _PAIR, ("premise", "hypothesis"), "gold_label",
        _NLI, _NLI, ("accuracy",), suffixes=_MATCH,
    ),
    "mrpc": _Layout(
        "MRPC", ("#1 String", "#2 String"), _PAIR, "Quality",
        ("not_equivalent", "equivalent"), _BINARY, ("accuracy", "f1"),
    ),
    "qnli": _Layout(
        "QNLI", ("question", "sentence"), ("question", "sentence"), "label",
        _ENTAILMENT, _ENTAILMENT, ("accuracy",),
    ),
    "qqp": _Layout(
        "QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate",
        ("not_duplicate", "duplicate"), _BINARY, ("accuracy", "f1"), skips_short_rows=True,
    ),
    "rte": _Layout("RTE", _PAIR, _PAIR, "label", _ENTAILMENT, _ENTAILMENT, ("accuracy",)),
    "sst2": _Layout(
        "SST-2", ("sentence",), ("sentence",), "label",
        ("negative", "positive"), _BINARY, ("accuracy",),
    ),
    "stsb": _Layout("STS-B", _PAIR, _PAIR, "score", (), (), ("pearson", "spearman")),
    "wnli": _Layout(
        "WNLI", _PAIR, _PAIR, "label", ("not_entailment", "entailment"), _BINARY, ("accuracy",)
    ),
}  # fmt: skip

GLUE_TASKS = tuple(_LAYOUTS)


def task(name: str, data_dir: str = "") -> Task:
    """Return a GLUE task; `Task.read` reads a split, without labels for the test splits.

    Args:
        name: one of `GLUE_TASKS`.
        data_dir: the folder of the task's TSV files, or its parent folder; if empty, the rows come
            from the hub.

    Raises:
        InputError: the name is unknown or `data_dir` does not exist. `Task.read` raises InputError
            if the split is unknown or cannot be read.
    """
    if name not in _LAYOUTS:
        raise InputError(f"unknown GLUE task {name!r}: use one of {', '.join(GLUE_TASKS)}")
    layout = _LAYOUTS[name]
    if data_dir:
        folder = storage.local_path_of(data_dir)
        if not folder.is_dir():
            raise InputError(f"data_dir: there is no directory {folder.absolute()}")
        read_part = functools.partial(_read_tsv, layout, folder)
    else:
        read_part = functools.partial(_read_hub, layout, functools.cache(lambda: _load_hub(name)))

    def read(split: str) -> dict[str, Examples]:
        if split not in ("train", "dev", "test"):
            raise InputError(f"unknown split {split!r}: use train, dev or test")
        suffixes = ("",) if split == "train" else layout.suffixes
        return {split + suffix: read_part(split + suffix) for suffix in suffixes}

    return Task(name, layout.label_names, layout.metrics, read, layout.spellings)


def text_columns(name: str) -> tuple[str, ...]:
    """Return the hub's names of the task's one or two text columns; empty for other tasks."""
    return _LAYOUTS[name].hub_columns if name in _LAYOUTS else ()


def _read_tsv(layout: _Layout, folder: Path, part: str) -> Examples:
    hidden = part.startswith("test")
    table = _tsv_table(layout, _find(folder, layout, f"{part}.tsv"), hidden)
    texts = [table.texts(column) for column in layout.columns]
    if hidden:
        labels = None
    elif layout.spellings:
        labels = table.class_ids(layout.label, layout.spellings)
    else:
        labels = table.scores(layout.label, 0, 5)
    return Examples(texts[0], texts[1] if texts[1:] else None, labels, table.texts("index"))


def _find(folder: Path, layout: _Layout, name: str) -> Path:
    candidates = (folder, folder / layout.folder)
    for candidate in candidates:
        if (candidate / name).is_file():
            return candidate / name
    searched = " nor in ".join(str(candidate.absolute()) for candidate in candidates)
    raise InputError(f"{layout.folder}'s {name} is neither in {searched}")


def _tsv_table(layout: _Layout, path: Path, hidden: bool) -> Table:
    """Return the task's columns, and `index`: the file's column, else the row number from 0."""
    wanted = layout.columns if hidden else (*layout.columns, layout.label)
    rows = _tsv_rows(path)
    header: Sequence[str] = rows[0][1]
    if set(wanted) <= set(header):
        del rows[0]
    elif layout.headerless:
        header = layout.headerless
    else:
        missing = ", ".join(repr(name) for name in wanted if name not in header)
        available = ", ".join(map(repr, header))
        raise InputError(f"{path}: the header lacks {missing}: it has {available}")
    short = [line for line, cells in rows if len(cells) < len(header)]
    if short and not layout.skips_short_rows:
        raise InputError(f"{path}, line {short[0]}: fewer than {len(header)} columns")
    if short:
        lines = ", ".join(map(str, short))
        logging.warning(
            "%s: skipped %d rows with too few columns, on lines %s", path, len(short), lines
        )
    full = [(number, *row) for number, row in enumerate(rows) if len(row[1]) >= len(header)]
    if not full:
        raise InputError(f"{path} has no rows")
    cells = {name: [row[header.index(name)] for _, _, row in full] for name in wanted}
    if "index" in header:
        cells["index"] = [row[header.index("index")] for _, _, row in full]
    else:
        cells["index"] = [str(number) for number, _, _ in full]
    return Table(path, header, cells, [line for _, line, _ in full])


def _tsv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return the line number and the cells of every line; quotation marks are text."""
    # `str.splitlines` would also split at \x85 and \u2028, which occur inside sentences.
    lines = read_text(path).removesuffix("\n").split("\n")
    rows = [(n, line.removesuffix("\r").split("\t")) for n, line in enumerate(lines, 1)]
    while rows[-1][1] == [""]:
        rows.pop()
    return rows


def _read_hub(layout: _Layout, load: Callable[[], Any], part: str) -> Examples:
    rows = load()[part.replace("dev", "validation")]
    texts = [list(rows[column][:]) for column in layout.hub_columns]
    labels = None
    if not part.startswith("test"):
        labels = np.asarray(rows["label"][:], np.int32 if layout.label_names else np.float32)
    ids = [str(index) for index in rows["idx"]]
    return Examples(texts[0], texts[1] if texts[1:] else None, labels, ids)


def _load_hub(name: str) -> Any:
    """Return the task's `datasets.DatasetDict`, from the hub or from the local cache."""
    try:
        import datasets
    except ImportError:
        message = f"GLUE from the hub needs `pip install datasets`; or {_USE_FILES}"
        raise InputError(message) from None
    reachable = True
    try:
        with _offline_if_unreachable() as reachable:
            return datasets.load_dataset(_HUB_ID, name)
    except Exception as error:  # The libraries involved have no common base class of errors.
        reason = "it cannot be reached and nothing is cached"
        if reachable:
            reason = first_line_of(error)
        message = f"cannot load GLUE's {name} from the hub ({reason}): {_USE_FILES}"
        raise InputError(message) from error


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """Use only the local cache if the hub does not answer; yield whether the hub answers.

    If the hub cannot be reached, its client retries for over 20 s and logs every attempt.
    """
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    previous = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
        reachable = True
    except Exception:  # The class depends on the HTTP library of the hub client.
        reachable = False
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = previous


def submission_paths(path: Path) -> tuple[Path, Path, Path]:
    """Return the path of a submission, and for MNLI of its matched and of its mismatched part."""
    suffixes = ("", "-m", "-mm")
    plain, matched, mismatched = (
        path.with_name(f"{path.stem}{suffix}{path.suffix}") for suffix in suffixes
    )
    return plain, matched, mismatched
