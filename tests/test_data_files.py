"""A user's own files: formats, labels, and the message about every kind of mistake."""

import csv
import decimal
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from pabee_jax.data import files
from pabee_jax.errors import InputError

TEXTS = ['She said "yes", then left.', "two\u2028of\x85them", " spaced ", "caf\u00e9"]
LABELS = ["b", "a", "c", "a"]
KINDS = ["csv", "tsv", "jsonl", "json", "parquet"]


def write(path, **cells):
    """Write the columns in the format that the extension of `path` names; return the path."""
    rows = list(zip(*cells.values(), strict=True))
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(cells), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([cells, *rows])
    elif path.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in [tuple(cells), *rows]]
        path.write_bytes("\n".join(lines).encode())
    else:
        records = [dict(zip(cells, row, strict=True)) for row in rows]
        path.write_bytes("".join(json.dumps(r) + "\n" for r in records).encode())
    return str(path)


def read(split="train", **arguments):
    return files.task(**arguments).read(split)[split]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_examples(tmp_path, kind):
    path = write(tmp_path / f"train.{kind}", extra=TEXTS, label=LABELS, text=TEXTS)
    task = files.task(train=path, text_pair="extra")
    examples = task.read("train")["train"]
    assert task.label_names == task.submission_labels == ("a", "b", "c")
    assert examples.texts == examples.pairs == TEXTS
    assert examples.labels.dtype == np.int32 and examples.labels.tolist() == [1, 0, 2, 0]
    assert examples.ids == ["0", "1", "2", "3"]
    assert task.metrics == ("accuracy", "macro_f1")


@pytest.mark.parametrize("kind", KINDS)
def test_numeric_labels_are_read_as_float32_scores_for_regression(tmp_path, kind):
    path = write(tmp_path / f"train.{kind}", text=["one", "two"], label=[1.5, -2])
    task = files.task(train=path, regression=True)
    examples = task.read("train")["train"]
    assert task.is_regression and task.metrics == ("pearson", "spearman")
    assert examples.labels.dtype == np.float32 and examples.labels.tolist() == [1.5, -2]


@pytest.mark.parametrize("kind", KINDS)
def test_integer_labels_sort_as_numbers(tmp_path, kind):
    path = write(tmp_path / f"train.{kind}", text=["x"] * 4, label=[10, 9, -1, 10])
    task = files.task(train=path)
    assert task.label_names == ("-1", "9", "10"), "as strings, 10 would come before 9"
    assert task.read("train")["train"].labels.tolist() == [2, 1, 0, 2]


def test_boolean_and_float_labels_become_class_names(tmp_path):
    booleans = write(tmp_path / "a.parquet", text=["x", "y"], label=[True, False])
    assert files.task(train=booleans).label_names == ("false", "true")
    floats = write(tmp_path / "b.jsonl", text=["x", "y"], label=[1.0, 0])
    assert files.task(train=floats).label_names == ("0", "1"), "1.0 and 1 are one class"


def test_two_classes_are_judged_by_accuracy_and_f1(tmp_path):
    path = write(tmp_path / "train.csv", text=["x", "y"], label=["no", "yes"])
    assert files.task(train=path).metrics == ("accuracy", "f1")


def test_label_names_fix_the_order_and_need_no_training_file(tmp_path):
    path = write(tmp_path / "dev.csv", text=["x", "y"], label=["no", "yes"])
    examples = read("dev", dev=path, label_names=["yes", "no"])
    assert examples.labels.tolist() == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_test_file_may_lack_labels(tmp_path, kind):
    train = write(tmp_path / f"train.{kind}", text=TEXTS, label=LABELS)
    bare = write(tmp_path / f"bare.{kind}", text=TEXTS, other=TEXTS)
    task = files.task(train=train, dev=bare, test=bare)
    assert task.read("test")["test"].labels is None
    with pytest.raises(InputError, match="no column 'label': it has 'text', 'other'"):
        task.read("dev")


def test_labels_of_a_test_file_are_read_if_the_file_has_them(tmp_path):
    path = write(tmp_path / "all.tsv", text=TEXTS, label=LABELS)
    assert read("test", train=path, test=path).labels.tolist() == [1, 0, 2, 0]


def test_only_the_requested_split_is_read(tmp_path):
    (tmp_path / "train.csv").write_text("nonsense")
    dev = write(tmp_path / "dev.csv", text=["x"], label=["a"])
    assert len(read("dev", train=str(tmp_path / "train.csv"), dev=dev, label_names="ab")) == 1


def test_a_quoted_csv_cell_may_span_lines_and_line_numbers_stay_right(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"two\r\nlines, ""quoted""",a\r\nb,b\r\n\r\n')
    assert read(train=str(path)).texts == ['two\r\nlines, "quoted"', "b"]
    path.write_bytes(b'text,label\n"two\nlines",a\nonly one cell\n')
    with pytest.raises(InputError, match=r"train\.csv, line 4: 1 cells where the header has 2"):
        files.task(train=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_the_training_file_lacks_is_refused(tmp_path, kind):
    train = write(tmp_path / f"train.{kind}", text=TEXTS, label=LABELS)
    dev = write(tmp_path / f"dev.{kind}", text=["x", "y"], label=["a", "z"])
    place = {"csv": "line 3", "tsv": "line 3", "parquet": "row 2"}.get(kind, "line 2")
    with pytest.raises(InputError, match=rf"dev\.{kind}, {place}: label 'z' is not one of a, b, c"):
        read("dev", train=train, dev=dev)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_text_column_lists_the_columns(tmp_path, kind):
    path = write(tmp_path / f"train.{kind}", sentence=TEXTS, label=LABELS)
    with pytest.raises(InputError, match="no column 'text': it has 'sentence', 'label'"):
        read(train=path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_null_text_or_label_is_refused(tmp_path, kind):
    path = write(tmp_path / f"text.{kind}", text=["x", None], label=["a", "b"])
    with pytest.raises(InputError, match=r"(line|row) 2: the text .* is missing or null"):
        read(train=path)
    path = write(tmp_path / f"label.{kind}", text=["x", "y"], label=["a", None])
    with pytest.raises(InputError, match=r"(line|row) 2: the label .* is empty"):
        read(train=path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.csv", "text,label\nx,\n", "line 2: the label in column 'label' is empty"),
        ("a.tsv", "text\tlabel\nx\ta\ty\n", "line 2: 3 cells where the header has 2"),
        ("a.tsv", "text\tlabel\n\nx\n", "line 3: 1 cells where the header has 2"),
        ("a.csv", "text,label,text\nx,a,y\nx,b,y\n", "more than one column 'text'"),
        ("a.csv", 'text,label\n"x,a\n', "line 2: malformed CSV"),
        ("a.csv", "text,label\nx,a\ny,a\n", "only one label, 'a'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', "line 2: malformed JSON"),
        (
            "a.jsonl",
            '{"text": "x", "label": 1}\n\n{"text": "x"}\n',
            "line 3: the label .* is empty",
        ),
        ("a.json", '[{"text": "x", "label": 1}, 2]', "row 2: not a JSON object"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": 5, "label": 2}', "line 2: the text"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n{"text": "", "label": 2}', "line 1: .*Uni"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}', "line 2: the label .* is empty"),
        ("a.jsonl", '{"text": "x", "label": [1]}', "line 1: label .* neither a string"),
        ("a.jsonl", '{"text": "x", "label": "\\ud800"}', "line 1: the label .* Unicode escape"),
        ("a.jsonl", '{"text": "x", "text": "y", "label": 1}', "line 1: .*'text' occurs twice"),
        ("a.jsonl", '{"text": "x", "label": 1' + "0" * 5000 + "}", "line 1: malformed JSON"),
        ("a.jsonl", '{"text": [["x"]], "label": 1}\n{"text": "", "label": 2}', "line 1: the text"),
        ("a.jsonl", '{"text": ' + "[" * 9999, "line 1: malformed JSON"),
        ("a.csv", b"text,label\nx,a\ncaf\xe9,b\n", "line 3: the text .* is not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9", "label": 1}', "line 1: the text .* is not UTF-8"),
        ("a.jsonl", '{"text": "x", "label": 1}'.encode("utf-16"), "line 1: .*UTF-16"),
        ("a.csv", "text,label\nx,a\n ,b\n,b\n", "line 3: .* is empty; 2 of 3 rows cannot be used"),
        ("a.csv", "text,label\n,a\n", "; 1 of 1 rows cannot .* set files.skip_bad_rows"),
        ("a.csv", 'text,label\n"two\nlines",a,b\nx,a\n', "lines 2 to 3: 3 cells where"),
        ("a.csv", "text,label\nx,a\n".encode("utf-16"), "line 1: not UTF-8"),
        ("a.csv", "text,label\nx,a".encode("utf-16-le"), "line 1: not UTF-8 text but UTF-16"),
        ("a.parquet", "text,label\n", "a.parquet is not a readable Parquet file"),
    ],
)
def test_an_invalid_file_raises_one_line_with_the_file_and_the_reason(
    tmp_path, name, content, message
):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message) as error:
        read(train=str(path))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("score", ["high", "nan", "-inf", "1e39"])
def test_a_score_that_is_not_a_finite_number_is_refused(tmp_path, score):
    path = write(tmp_path / "train.csv", text=["x"], label=[score])
    with pytest.raises(InputError, match=r"train\.csv, line 2: score .* not a finite number"):
        read(train=path, regression=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_of_thousands_of_digits_is_a_class_name(tmp_path, kind):
    digits = "9" * 5000  # Python refuses to convert these digits to an integer.
    path = write(tmp_path / f"train.{kind}", text=["x", "y"], label=[digits, "10"])
    task = files.task(train=path)
    assert task.label_names == ("10", digits)
    assert task.read("train")["train"].labels.tolist() == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_nul_characters_and_texts_of_a_megabyte_are_read_as_they_are(tmp_path, kind):
    texts = ["a\0b", "x" * 1_000_000]
    path = write(tmp_path / f"train.{kind}", text=texts, label=["a", "b"])
    assert read(train=path).texts == texts


def test_decimals_are_labels_and_scores(tmp_path):
    values = [decimal.Decimal(text) for text in ("1.50", "2.00", "-0.25")]
    path = write(tmp_path / "train.parquet", text=["x", "y", "z"], label=values)
    assert files.task(train=path).label_names == ("-0.25", "1.5", "2")
    assert read(train=path, regression=True).labels.tolist() == [1.5, 2, -0.25]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_cannot_be_used_are_skipped_on_request_with_their_count(tmp_path, kind, caplog):
    """The ids stay the numbers of the rows in the file, and a skipped row makes no class."""
    texts, labels = ["x", " ", "y", "z", "x"], ["a", "only here", "", "b", "a"]
    path = write(tmp_path / f"train.{kind}", text=texts, label=labels)
    place = {"csv": "line 3", "tsv": "line 3", "parquet": "row 2"}.get(kind, "line 2")
    with pytest.raises(InputError, match=f"{place}: .*2 of 5 rows cannot be used: .*skip_bad_rows"):
        files.task(train=path)
    task = files.task(train=path, skip_bad_rows=True)
    examples = task.read("train")["train"]
    assert task.label_names == ("a", "b") and examples.texts == ["x", "z", "x"]
    assert examples.ids == ["0", "3", "4"]
    (warning,) = caplog.messages
    assert f"skipped 2 of 5 rows; the first, {path}, {place}: the text" in warning


def test_a_file_of_rows_that_cannot_be_used_is_refused_although_they_are_skipped(tmp_path):
    path = write(tmp_path / "dev.csv", text=["", " "], label=["a", "b"])
    with pytest.raises(InputError, match="line 2: .*; 2 of 2 rows cannot be used"):
        read("dev", dev=path, label_names="ab", skip_bad_rows=True)


def test_parquet_columns_of_other_types_are_refused(tmp_path):
    texts, labels = ["x", "y"], ["a", "b"]
    for wrong in ([["x"], ["y"]], [{"a": 1}, {"a": 2}], [b"x", b"y"], [1, 2]):
        path = write(tmp_path / "text.parquet", text=wrong, label=labels)
        with pytest.raises(InputError, match="row 1: the text in column 'text' is .* be a string"):
            read(train=path)
    for wrong in ([[1], [2]], [b"x", b"y"]):
        path = write(tmp_path / "label.parquet", text=texts, label=wrong)
        with pytest.raises(InputError, match="row 1: label .* neither a string nor a number"):
            read(train=path)


def test_a_message_lists_a_few_of_many_labels(tmp_path):
    train = write(tmp_path / "train.csv", text=["x"] * 900, label=[f"l{i}" for i in range(900)])
    dev = write(tmp_path / "dev.csv", text=["x"], label=["z"])
    with pytest.raises(InputError, match="and 880 more") as error:
        read("dev", train=train, dev=dev)
    assert len(str(error.value)) < 500


def test_invalid_arguments_are_refused(tmp_path):
    path = write(tmp_path / "train.csv", text=TEXTS, label=LABELS)
    for message, arguments in {
        "files.text is empty: it must name the column": {"train": path, "text": ""},
        "files.label is empty: it must name the column": {"train": path, "label": ""},
        "is too long: its longest name has 5004 bytes": {"train": "x" * 5000 + ".csv"},
        "give a train, dev or test file": {},
        r"known extensions \.csv, \.tsv, \.jsonl, \.json, \.parquet": {"train": "rows.xlsx"},
        "none of the known": {"train": "rows"},
        "no file .*absent.csv": {"train": str(tmp_path / "absent.csv")},
        "class names are unknown": {"dev": path},
        "leave them out": {"train": path, "regression": True, "label_names": ("a", "b")},
        "two or more different": {"train": path, "label_names": ("a", "a")},
    }.items():
        with pytest.raises(InputError, match=message):
            files.task(**arguments)
    with pytest.raises(InputError, match=r"'dev' split \(given: train\)"):
        read("dev", train=path)
