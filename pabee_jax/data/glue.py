"""The nine GLUE tasks, from the hub or from the original TSV files."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from pabee_jax.data.files import Table, tsv_rows
from pabee_jax.data.task import Examples, Task
from pabee_jax.errors import InputError
from pabee_jax.io import storage

_HUB_ID = "nyu-mll/glue"
_PROBE_SECONDS = 5.0
_USE_FILES = "use the original TSV files with --config.data_dir=DIR"
_BINARY = ("0", "1")
_MATCH = ("_matched", "_mismatched")


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where one task's texts and labels are, and how it is judged.

    Attributes:
        folder: the task's usual folder in the GLUE download.
        columns: the text columns in the TSV files.
        hub_columns: the same columns on the hub.
        label: the label column in the TSV files.
        label_names: class names by class id, in the hub's order; empty for scores from 0 to 5.
        spellings: what the TSV files and GLUE's submission server call each class.
        metrics: names of the task's metrics; the first is the primary one.
        headerless: column names of files without a header.
        suffixes: what follows "dev" and "test" in the names of their parts.
        skips_short_rows: rows with too few columns are skipped and named, not an error.
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
    """One of `GLUE_TASKS`, from the TSV files in `data_dir` or, without it, from the hub.

    `data_dir` is the task's own folder or the folder that holds it. A split is read when it is
    asked for; labels of test splits are always None. Raises InputError.
    """
    if name not in _LAYOUTS:
        raise InputError(f"unknown GLUE task {name!r}: use one of {', '.join(GLUE_TASKS)}.")
    layout = _LAYOUTS[name]
    if data_dir:
        folder = storage.local_path_of(data_dir)
        if not folder.is_dir():
            raise InputError(f"data_dir: there is no directory {folder.absolute()}.")
        read_part = functools.partial(_read_tsv, layout, folder)
    else:
        read_part = functools.partial(_read_hub, layout, functools.cache(lambda: _load_hub(name)))

    def read(split: str) -> dict[str, Examples]:
        if split not in ("train", "dev", "test"):
            raise InputError(f"unknown split {split!r}: use train, dev or test.")
        suffixes = ("",) if split == "train" else layout.suffixes
        return {split + suffix: read_part(split + suffix) for suffix in suffixes}

    return Task(name, layout.label_names, layout.metrics, read, layout.spellings)


def text_columns(name: str) -> tuple[str, ...]:
    """What the hub calls the task's one or two texts."""
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
    places = (folder, folder / layout.folder)
    for place in places:
        if (place / name).is_file():
            return place / name
    looked = " nor in ".join(str(place.absolute()) for place in places)
    raise InputError(f"{layout.folder}'s {name} is neither in {looked}.")


def _tsv_table(layout: _Layout, path: Path, hidden: bool) -> Table:
    """The task's columns, and `index`: the file's own, else the row number from 0."""
    wanted = layout.columns if hidden else (*layout.columns, layout.label)
    rows = tsv_rows(path)
    header: Sequence[str] = rows[0][1]
    if set(wanted) <= set(header):
        del rows[0]
    elif layout.headerless:
        header = layout.headerless
    else:
        missing = ", ".join(repr(name) for name in wanted if name not in header)
        found = ", ".join(map(repr, header))
        raise InputError(f"{path}: the header lacks {missing}: it has {found}.")
    short = [line for line, cells in rows if len(cells) < len(header)]
    if short and not layout.skips_short_rows:
        raise InputError(f"{path}, line {short[0]}: fewer than {len(header)} columns.")
    if short:
        lines = ", ".join(map(str, short))
        logging.warning(
            "%s: skipped %d rows with too few columns, on lines %s.", path, len(short), lines
        )
    kept = [(n, *row) for n, row in enumerate(rows) if len(row[1]) >= len(header)]
    if not kept:
        raise InputError(f"{path} has no rows.")
    cells = {name: [row[header.index(name)] for _, _, row in kept] for name in wanted}
    if "index" in header:
        cells["index"] = [row[header.index("index")] for _, _, row in kept]
    else:
        cells["index"] = [str(n) for n, _, _ in kept]
    return Table(path, header, cells, [line for _, line, _ in kept])


def _read_hub(layout: _Layout, load: Callable[[], Any], part: str) -> Examples:
    rows = load()[part.replace("dev", "validation")]
    texts = [list(rows[column][:]) for column in layout.hub_columns]
    labels = None
    if not part.startswith("test"):
        labels = np.asarray(rows["label"][:], np.int32 if layout.label_names else np.float32)
    ids = [str(index) for index in rows["idx"]]
    return Examples(texts[0], texts[1] if texts[1:] else None, labels, ids)


def _load_hub(name: str) -> Any:
    """The task's `datasets.DatasetDict`, from the hub or its cache."""
    try:
        import datasets
    except ImportError:
        message = f"GLUE from the hub needs `pip install datasets`; or {_USE_FILES}."
        raise InputError(message) from None
    reachable = True
    try:
        with _offline_if_unreachable() as reachable:
            return datasets.load_dataset(_HUB_ID, name)
    except Exception as error:  # datasets, the hub client and its HTTP library share no base class
        reason = "it cannot be reached and nothing is cached"
        if reachable:
            reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        message = f"cannot load GLUE's {name} from the hub ({reason}): {_USE_FILES}."
        raise InputError(message) from error


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """Whether the hub answers; if not, only the cache is used.

    Offline, the hub's own client retries noisily for over 20 s before it gives up.
    """
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
        reachable = True
    except Exception:  # the class depends on which HTTP library the hub client uses
        reachable = False
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield reachable
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before
