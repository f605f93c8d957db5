"""Class labels: their spelling in files, the class that a label names, and likely mistakes."""

import csv
import decimal
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from pabee_jax.errors import InputError, listed, shown

# Names of a missing label in the programs that write files. ("unknown" is often a class.)
_PLACEHOLDERS = {"-1", "-", "--", "?", "nan", "<na>", "nat", "null", "none", "n/a", "#n/a", "na"}
# A number as programs write it: 1, 1.0, 1., .5, 1.000e+00; not 01, which is a code.
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d{0,99})(\.\d{0,99})?|\.\d{1,99})([eE][+-]?\d{1,2})?", re.A)
# At this share of the rows, a constant answer is nearly as accurate as a classifier.
_EXTREME_SHARE = 0.95


def spelled(value: object) -> str | None:
    """Return the label of a cell: 1 and 1.0 as "1", true as "true"; None for an empty cell.

    Raises:
        InputError: the cell holds neither a string nor a number.
    """
    if isinstance(value, float | Decimal):
        # Some writers store integers as floats if a cell is null.
        is_whole = math.isfinite(value) and value == int(value)
        value = int(value) if is_whole else None if math.isnan(value) else value
    if value is not None and not isinstance(value, str | int | float | Decimal):
        raise InputError(f"label {shown(value)} is neither a string nor a number")
    label = str(value).lower() if isinstance(value, bool) else str(value).strip()
    return None if value is None or not label else label


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the distinct classes of a column of labels, in numerical order if all are integers.

    If all labels are numbers, the labels of equal numbers are one class: 1, 1.0 and 1.00e+00 are
    the class "1".
    """
    names = set(labels)
    if all(_number(name) is not None for name in names):
        names = {_canonical(name) for name in names}
    return in_own_order(names)


def in_own_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in numerical order if all are integers, else in alphabetical order."""
    names = list(names)
    # Python refuses to convert an integer of thousands of digits.
    if all(re.fullmatch(r"-?\d{1,100}", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def in_order_of(classifier: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes of a classifier if they include the classes `names`, else `names`.

    The labels 0, 1, ... are the class ids of a classifier with the classes LABEL_0, LABEL_1, ...
    """
    if class_ids_of(names, classifier):
        return tuple(classifier)
    class_ids = tuple(map(str, range(len(classifier))))
    return class_ids if are_numbered(classifier) and {*names} <= {*class_ids} else names


def class_id_of(names: Sequence[str]) -> Callable[[str], int | None]:
    """Return a function that maps a label to the id of the class that it names, or to None.

    A label names the class that is spelled like the label; else the class that differs from the
    label only in case and white space, else only in separators (`-`, `_` or a space), else the
    class that is the same number. Two classes that differ in no more need their exact spelling.
    """
    keys = (str, _folded, _joined, _canonical)
    tables: list[dict[str, int | None]] = []
    for key in keys:
        table: dict[str, int | None] = {}
        for class_id, name in enumerate(names):
            table[key(name)] = None if key(name) in table else class_id
        tables.append(table)

    def id_of(label: str) -> int | None:
        for key, table in zip(keys, tables, strict=True):
            if key(label) in table:
                return table[key(label)]
        return None

    return id_of


def class_ids_of(labels: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Return the class that each label names, see `class_id_of`; None unless the classes differ."""
    ids = [class_id for class_id in map(class_id_of(names), labels) if class_id is not None]
    return ids if len(set(ids)) == len(labels) else None


def are_numbered(names: Sequence[str]) -> bool:
    """Return whether the names of a classifier say no more than the class ids: LABEL_0, LABEL_1."""
    return all(
        re.fullmatch(rf"((label|class)[\s_-]?)?{class_id}", name, re.I)
        for class_id, name in enumerate(names)
    )


def parse_names(text: str) -> tuple[str, ...]:
    """Return the class names in `config.label_names`, which are separated by commas.

    A name with a comma is quoted, as in CSV.

    Raises:
        InputError: a name is empty or given twice, there is only one name, or a quote has no end.
    """
    try:
        (names,) = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise InputError(f"config.label_names is {shown(text)}: {error}") from None
    names = [name.strip() for name in names]
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise InputError(
            f"config.label_names is {shown(text)}; it must be two or more different names, "
            "separated by commas"
        )
    return tuple(names)


def warnings(counts: Mapping[str, int]) -> list[str]:
    """Return one sentence for each likely mistake in the classes of a training set.

    Args:
        counts: the number of training rows by class.
    """
    rows, sentences = sum(counts.values()), []
    for name in counts:
        if name.casefold() in _PLACEHOLDERS:
            sentences.append(
                f"class {shown(name)} ({counts[name]} rows) is a usual sign of a missing label: if "
                "it is one here, remove these rows"
            )
    groups = {
        "differ only in case or white space": _folded,
        "differ only in case, white space or separators": _joined,
        "are equal as numbers": _canonical_code,
    }
    named: set[str] = set()
    for difference, key in groups.items():
        for group in _groups(counts, key):
            if not named.issuperset(group):
                sentences.append(
                    f"classes {listed(group, shown)} {difference}: if they are the same class, "
                    "give them the same label"
                )
            named |= set(group)
    numbers = [number for name in counts if (number := _number(name)) is not None]
    if len(numbers) == len(counts) and any(number != int(number) for number in numbers):
        sentences.append(
            f"all {len(counts)} classes are numbers and some have decimals "
            f"({listed(list(counts), limit=5)}): did you mean files.regression=true?"
        )
    lone = [name for name, count in counts.items() if count < 2]
    if len(counts) > 2 and 2 * len(counts) > rows:
        sentences.append(
            f"there are nearly as many classes as rows ({len(counts)} classes, {rows} rows): does "
            "files.label name the right column?"
        )
    elif lone:
        sentences.append(
            f"{len(lone)} of {len(counts)} classes have fewer than two training rows: "
            f"{listed(lone)}"
        )
    largest = max(counts, key=lambda name: counts[name])
    if counts[largest] >= _EXTREME_SHARE * rows and rows >= 20:
        sentences.append(
            f"class {shown(largest)} has {counts[largest] / rows:.1%} of the rows, so that a "
            "constant answer has this accuracy"
        )
    return sentences


def counts_text(counts: Mapping[str, int]) -> str:
    """Return classes with their counts for one line: "no 30, yes 28"."""
    return listed([f"{name} {count}" for name, count in counts.items()])


def _groups(names: Mapping[str, Any], key: Callable[[str], str]) -> list[list[str]]:
    """Return the names with the same key, in groups of two or more."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _folded(name: str) -> str:
    """Return a name without case, compatibility characters and differences of white space."""
    text = unicodedata.normalize("NFKC", name).casefold()
    visible = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(visible.split())


def _joined(name: str) -> str:
    """Return a folded name with a space for the separators between its words."""
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", _folded(name))


def _number(name: str) -> Decimal | None:
    return Decimal(name) if _NUMBER.fullmatch(name) else None


def _canonical(name: str) -> str:
    """Return the shortest spelling of a number: 1.0 as "1"; another name unchanged."""
    number = _number(name)
    if number is None:
        return name
    with decimal.localcontext(prec=400):
        return str(int(number)) if number == int(number) else format(number.normalize(), "f")


def _canonical_code(name: str) -> str:
    """Return the canonical number of a name, also of a code such as 01; another name unchanged."""
    return _canonical(re.sub(r"^([+-]?)0+(?=\d)", r"\1", name, flags=re.A))
