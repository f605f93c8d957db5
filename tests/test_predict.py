"""`pabee-jax predict`: the rows of files, in every format, after kills and with bad rows."""

import csv
import datetime
import decimal
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import film_texts, tiny_classifier
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.commands.predict import predict
from pabee_jax.commands.predict_options import PredictOptions
from pabee_jax.data import tables
from pabee_jax.inference import file_job

TEXTS = film_texts(50)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("checkpoint"), 2)


@pytest.fixture
def blocks_of_8(monkeypatch):
    monkeypatch.setattr(file_job, "ROWS_PER_BLOCK", 8)


def write_csv(path, texts=TEXTS, **columns):
    rows = zip(range(len(texts)), texts, *columns.values(), strict=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text", *columns], *rows])
    return path


def run(checkpoint, output, *inputs, **options):
    predict(
        PredictOptions(
            checkpoint=checkpoint, input=tuple(map(str, inputs)), output=str(output), **options
        )
    )


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_output_has_the_predictions_of_the_classifier_in_the_order_of_the_rows(
    checkpoint, tmp_path, blocks_of_8
):
    source = write_csv(tmp_path / "rows.csv")
    run(checkpoint, tmp_path / "out.csv", source, keep="id,text")
    rows = read_csv(tmp_path / "out.csv")
    assert [row["text"] for row in rows] == TEXTS
    assert [int(row["id"]) for row in rows] == list(range(len(TEXTS)))
    predictions = EarlyExitClassifier.from_pretrained(checkpoint).predict(TEXTS)
    assert [row["label"] for row in rows] == predictions.label_strings
    assert [int(row["exit_layer"]) for row in rows] == predictions.exit_layers.tolist()
    assert len(set(predictions.exit_layers.tolist())) > 1
    scores = [[float(row["score_LABEL_0"]), float(row["score_LABEL_1"])] for row in rows]
    np.testing.assert_allclose(scores, predictions.probabilities, atol=1e-6)
    assert not (tmp_path / "out.csv.parts").exists()
    assert not (tmp_path / "out.csv.errors.jsonl").exists()


def test_map_columns_of_datasets(checkpoint):
    datasets = pytest.importorskip("datasets")
    classifier = EarlyExitClassifier.from_pretrained(checkpoint)
    dataset = datasets.Dataset.from_dict({"first": TEXTS[:9], "second": TEXTS[9:18]})
    fields = {"text": "first", "text_pair": "second"}
    mapped = dataset.map(classifier.map_columns, batched=True, batch_size=4, fn_kwargs=fields)
    predictions = classifier.predict(list(zip(TEXTS[:9], TEXTS[9:18], strict=True)))
    assert mapped["label"][:] == predictions.label_strings
    assert mapped["exit_layer"][:] == predictions.exit_layers.tolist()
    np.testing.assert_allclose(
        mapped["score_LABEL_1"][:], predictions.probabilities[:, 1], atol=1e-6
    )
    with pytest.raises(InputError, match="there is no column 'text': there are first, second"):
        classifier.map_columns(dataset[:3])


def read_any(path):
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".tsv":
        header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
        return [dict(zip(header, line, strict=True)) for line in lines]
    return read_csv(path)


@pytest.mark.parametrize(
    "suffix", [".csv", pytest.param(".tsv", marks=pytest.mark.slow), ".jsonl", ".parquet"]
)
def test_every_format_can_be_read_and_written(checkpoint, tmp_path, suffix, blocks_of_8):
    """The output of one format is the input of the next command."""
    source = write_csv(tmp_path / "rows.csv", [*TEXTS, 'a "quoted", film', '"quoted"'])
    first, second = tmp_path / f"first{suffix}", tmp_path / "second.jsonl"
    run(checkpoint, first, source, keep="text")
    run(checkpoint, second, first, keep="text")
    rows, again = read_any(first), read_any(second)
    assert [row["text"] for row in rows] == [*TEXTS, 'a "quoted", film', '"quoted"']
    for name in ("label", "exit_layer", "score_LABEL_0", "text"):
        assert [str(row[name]) for row in rows] == [str(row[name]) for row in again], name


def test_pairs_and_several_files(checkpoint, tmp_path):
    first = write_csv(tmp_path / "a.csv", TEXTS[:20], other=TEXTS[1:21])
    second = write_csv(tmp_path / "b.csv", TEXTS[20:40], other=TEXTS[21:41])
    run(checkpoint, tmp_path / "out.jsonl", first, second, text_pair="other", patience=2)
    rows = read_any(tmp_path / "out.jsonl")
    classifier = EarlyExitClassifier.from_pretrained(checkpoint, criterion=Patience(2))
    pairs = list(itertools.pairwise(TEXTS[:41]))
    predictions = classifier.predict(pairs)
    assert [row["exit_layer"] for row in rows] == predictions.exit_layers.tolist()
    assert [row["label"] for row in rows] == predictions.label_strings


BAD_ROWS = {
    ".csv": (
        'id,text\n0,good\n1\n2,"bad "film"\n3,\xff\n4,bad\n5,a,b\n',
        {3: "1 cells where", 4: "malformed CSV", 5: "not UTF-8", 7: "3 cells where"},
    ),
    ".tsv": ("id\ttext\n0\tgood\n1\n2\t\xff\n4\tbad\n", {3: "1 cells where", 4: "not UTF-8"}),
    ".jsonl": (
        '{"text": "good"}\n{"text": 5}\nnothing\n{"text": null}\n[1]\n{"text": "\\ud800"}\n'
        '{"other": ""}\n{"text": "a", "text": "b"}\n{"text": "bad"}\n',
        {
            2: "it must be a string",
            3: "malformed JSON",
            4: "missing or null",
            5: "not a JSON object",
            6: "incomplete Unicode",
            7: "missing or null",
            8: "occurs twice",
        },
    ),
}


@pytest.mark.parametrize("suffix", BAD_ROWS)
def test_a_bad_row_goes_to_the_errors_with_its_line_and_stops_nothing(
    checkpoint, tmp_path, suffix, capsys
):
    content, problems = BAD_ROWS[suffix]
    source = tmp_path / f"rows{suffix}"
    source.write_bytes(content.encode("latin-1"))
    run(checkpoint, tmp_path / "out.csv", source, keep="text")
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ["good", "bad"]
    errors = read_any(tmp_path / "out.csv.errors.jsonl")
    assert [error["place"] for error in errors] == list(problems)
    for error in errors:
        assert problems[error["place"]] in error["error"] and error["file"] == str(source)
    assert f"{len(problems)} rows could not be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        ("rows.jsonl", '{"text": 1}\n{"text": ""}\n', ["it must be a string", "is empty"]),
        ("rows.csv", "id,text\n", []),
        ("rows.csv", "id,text\n\n\n", []),
    ],
)
def test_without_a_row_that_can_be_used_the_command_fails_and_keeps_the_old_output(
    checkpoint, tmp_path, name, content, problems
):
    (tmp_path / name).write_text(content)
    output, errors = tmp_path / "out.csv", tmp_path / "out.csv.errors.jsonl"
    output.write_text("mine\n")
    with pytest.raises(InputError, match="no row of --input can be used"):
        run(checkpoint, output, tmp_path / name, overwrite=True)
    assert output.read_text() == "mine\n"
    assert not (tmp_path / "out.csv.parts").exists()
    found = read_any(errors) if problems else []
    assert errors.exists() == bool(problems)
    assert all(problem in row["error"] for row, problem in zip(found, problems, strict=True))


def test_a_checkpoint_that_was_trained_again_does_not_continue_the_job(
    checkpoint, tmp_path, blocks_of_8, monkeypatch
):
    """The path is the same, but the classifiers are not."""
    shutil.copytree(checkpoint, tmp_path / "model")
    source, output = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv"

    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(file_job, "_join", stop)
        with pytest.raises(Killed):
            run(str(tmp_path / "model"), output, source)
    again = EarlyExitClassifier.from_pretrained(
        Path(checkpoint).parent / "encoder", num_labels=2, seed=1, criterion=Patience(1)
    )
    again.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="holds the parts of another job"):
        run(str(tmp_path / "model"), output, source)


def test_a_text_with_a_tab_is_a_bad_row_of_a_tsv_output(checkpoint, tmp_path):
    source = write_csv(tmp_path / "rows.csv", ["good", "a\tb", "bad"])
    run(checkpoint, tmp_path / "out.tsv", source, keep="text")
    assert [row["text"] for row in read_any(tmp_path / "out.tsv")] == ["good", "bad"]
    (error,) = read_any(tmp_path / "out.tsv.errors.jsonl")
    assert "holds a tab" in error["error"] and error["place"] == 3


class Killed(BaseException):
    pass


@pytest.mark.parametrize("suffix", [".csv", pytest.param(".parquet", marks=pytest.mark.slow)])
def test_a_job_that_is_killed_anywhere_continues_to_the_same_bytes(
    checkpoint, tmp_path, suffix, blocks_of_8, monkeypatch
):
    """Each attempt is killed at a later atomic write, so every write is the last one once."""
    source = write_csv(tmp_path / "rows.csv", [*TEXTS[:30], ""])
    with source.open("a") as file:
        file.write("broken\n")
    expected = tmp_path / f"expected{suffix}"
    run(checkpoint, expected, source, keep="id")
    output = tmp_path / f"out{suffix}"
    write = file_job.write_atomically
    attempts = 0
    for allowed in range(1, 30):
        left = allowed

        def limited(path, content):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            write(path, content)

        monkeypatch.setattr(file_job, "write_atomically", limited)
        monkeypatch.setattr(file_job.table_files, "write_atomically", limited)
        try:
            run(checkpoint, output, source, keep="id")
            break
        except Killed:
            attempts += 1
    assert attempts >= 3
    assert output.read_bytes() == expected.read_bytes()
    errors = tmp_path / f"{output.name}.errors.jsonl"
    assert errors.read_text() == (tmp_path / f"{expected.name}.errors.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def test_an_output_that_exists_and_the_parts_of_another_job_are_refused(
    checkpoint, tmp_path, blocks_of_8, monkeypatch
):
    source, output = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv"
    output.write_text("mine\n")
    with pytest.raises(InputError, match=r"out\.csv exists; replace it with --overwrite"):
        run(checkpoint, output, source)
    assert output.read_text() == "mine\n" and len(list(tmp_path.iterdir())) == 2

    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(file_job, "_join", stop)
        with pytest.raises(Killed):
            run(checkpoint, output, source, overwrite=True)
    with pytest.raises(InputError, match="holds the parts of another job"):
        run(checkpoint, output, source, patience=3)
    assert output.read_text() == "mine\n"
    run(checkpoint, output, source, patience=3, overwrite=True)
    layers = [int(row["exit_layer"]) for row in read_csv(output)]
    classifier = EarlyExitClassifier.from_pretrained(checkpoint, criterion=Patience(3))
    assert layers == classifier.predict(TEXTS).exit_layers.tolist()


def snapshot(folder):
    """Return the bytes of all files below a folder, and its empty folders."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def killed_job(checkpoint, output, *inputs, **options):
    """Run a job that is killed before it joins its parts."""

    def stop(*arguments):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_job, "_join", stop)
        with pytest.raises(Killed):
            run(checkpoint, output, *inputs, **options)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "years of work"},
        {"job.json": "{}"},
        {"job.json": '{"job": {"mine": 1}}'},
        {"job.json": "[1]", "000000.json": "[1]"},
        {"000000.rows.csv": "mine"},
        {".lock": "mine"},
        None,
    ],
    ids=str,
)
def test_a_folder_of_the_user_is_left_as_it_is(checkpoint, tmp_path, files, overwrite):
    source, folder = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv.parts"
    if files is None:
        folder.write_text("a file")
    else:
        (folder / "sub").mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="was not made by predict"):
        run(checkpoint, tmp_path / "out.csv", source, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_a_file_of_the_user_among_the_parts_stays(checkpoint, tmp_path, blocks_of_8, caplog):
    source, folder = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv.parts"
    killed_job(checkpoint, tmp_path / "out.csv", source)
    (folder / "notes.txt").write_text("mine")
    (folder / "000009.errors.jsonl.txt").write_text("mine")
    run(checkpoint, tmp_path / "out.csv", source)
    assert len(read_csv(tmp_path / "out.csv")) == len(TEXTS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "000009.errors.jsonl.txt",
        "notes.txt",
    ]
    assert "files that predict has not made" in caplog.text


@pytest.mark.parametrize("is_killed_at_join", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_input_that_changed_since_the_kill_is_refused(
    checkpoint, tmp_path, blocks_of_8, is_killed_at_join
):
    """The file has the same size as before; both the text and a kept column count."""
    source, output = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv"
    killed_job(checkpoint, output, source, keep="id")
    content = source.read_bytes()
    if not is_killed_at_join:
        (tmp_path / "out.csv.parts" / "000006.json").unlink()
    for old, new in {b"\n9,": b"\n8,", b"\n12,": b"\n13,", b"film": b"plot"}.items():
        source.write_bytes(content.replace(old, new, 1))
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match="rows that have changed in --input since"):
            run(checkpoint, output, source, keep="id")
        after = snapshot(tmp_path)
        assert before.keys() == after.keys(), "parts were removed"
        assert not output.exists()
    run(checkpoint, output, source, keep="id", overwrite=True)
    expected = tmp_path / "expected.csv"
    run(checkpoint, expected, source, keep="id")
    assert output.read_bytes() == expected.read_bytes()


def test_rows_that_were_not_read_before_the_kill_may_change(checkpoint, tmp_path, blocks_of_8):
    source, output = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv"
    killed_job(checkpoint, output, source)
    for block in (5, 6):
        (tmp_path / "out.csv.parts" / f"{block:06d}.json").unlink()
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join([*lines[:41], *reversed(lines[41:])]))
    run(checkpoint, output, source)
    run(checkpoint, tmp_path / "expected.csv", source)
    assert output.read_bytes() == (tmp_path / "expected.csv").read_bytes()


def test_parts_of_version_0_1_are_refused_with_a_way_out(checkpoint, tmp_path, blocks_of_8):
    source, output = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv"
    killed_job(checkpoint, output, source)
    job_file = tmp_path / "out.csv.parts" / "job.json"
    description = json.loads(job_file.read_text())["job"]
    del description["digests"]
    job_file.write_text(json.dumps(description))
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="earlier version of pabee_jax, .* with --overwrite"):
        run(checkpoint, output, source)
    assert snapshot(tmp_path) == before
    run(checkpoint, output, source, overwrite=True)
    assert len(read_csv(output)) == len(TEXTS)


def test_files_that_appear_at_the_place_of_the_output_after_a_kill_stay(
    checkpoint, tmp_path, blocks_of_8
):
    source, output = write_csv(tmp_path / "rows.csv"), tmp_path / "out.csv"
    errors = tmp_path / "out.csv.errors.jsonl"

    def killed_before_join(path):
        raise Killed

    for path in (output, errors):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file_job, "_finished", killed_before_join)
            with pytest.raises((Killed, TypeError)):
                run(checkpoint, output, source)
        path.write_text("mine")
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match=f"{path.name} exists; replace it with --overwrite"):
            run(checkpoint, output, source)
        assert snapshot(tmp_path) == before
        path.unlink()


@pytest.mark.parametrize("output", ["rows.csv", "folder.csv"])
def test_an_output_that_would_replace_an_input_or_a_folder_is_refused(checkpoint, tmp_path, output):
    source = write_csv(tmp_path / "rows.csv")
    (tmp_path / "folder.csv").mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="would replace --input|is a folder"):
        run(checkpoint, tmp_path / output, source, overwrite=True)
    assert snapshot(tmp_path) == before


# The values of a kept column in three blocks of 8 rows, whose types differ.
KEPT = {
    "integers, then text": [*range(8), *"abcdefgh", *[None] * 8],
    "integers, then floats": [*range(8), *[0.5] * 8, *range(8)],
    "an integer that a float does not hold": [2**60 + 1] * 8 + [0.5] * 16,
    "integers beyond 64 bits": [2**63] * 8 + [2**64 + 1] * 8 + [1] * 8,
    "one block of several types": [1, "a", True, None, 2.5, 2**70, [1], {"a": 1}] * 3,
    "booleans, then integers": [True] * 8 + [1] * 16,
    "objects of different names": [{"a": 1}] * 8 + [{"b": "x"}] * 8 + [{}] * 8,
    "lists, then text": [[1]] * 8 + ["a"] * 8 + [[]] * 8,
    "nothing, then text": [None] * 8 + ["a"] * 16,
    "no number": [float("nan"), float("inf"), 1.0, 2] * 6,
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_kept_column_of_several_types_can_be_written(
    checkpoint, tmp_path, suffix, blocks_of_8, caplog
):
    source, output = tmp_path / "rows.jsonl", tmp_path / f"out{suffix}"
    names = [f"c{index}" for index in range(len(KEPT))]
    values = list(zip(*KEPT.values(), strict=True))
    records = [dict(zip(names, row, strict=True)) | {"text": TEXTS[0]} for row in values]
    source.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    run(checkpoint, output, source, keep=",".join(names))
    rows = read_any(output)
    assert len(rows) == 24
    for name, column in zip(names, KEPT.values(), strict=True):
        for value, row in zip(column, rows, strict=True):
            check_written(row[name], value, suffix)
    warned = [message for message in caplog.messages if "values of several types" in message]
    assert len(warned) == len({*warned}), "a column is warned about once"
    assert ("'c0'" in caplog.text) == (suffix == ".parquet")


def check_written(written, value, suffix):
    """`written` is `value`, as itself or as its text."""
    if isinstance(value, float) and value not in (0.5, 2.5, 1.0):
        assert str(written) in ("nan", "inf") or (written is None and suffix == ".jsonl")
    elif value is None:
        assert written == (None if suffix in (".jsonl", ".parquet") else "")
    elif suffix == ".jsonl" or (suffix == ".parquet" and not isinstance(written, str)):
        # Parquet gives every object of a column all names.
        found = written if not isinstance(value, dict) else {k: written[k] for k in value}
        assert found == value
    elif isinstance(value, bool | dict | list):
        assert json.loads(written) == value or isinstance(value, dict)
    else:
        assert written == value or written in (str(value), str(float(value)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_kept_columns_of_parquet_can_be_written(checkpoint, tmp_path, suffix, blocks_of_8):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    times = [datetime.datetime(2026, 1, 1, 0, 0, row) for row in range(20)]
    prices = [decimal.Decimal(10) ** (row // 5) + decimal.Decimal("0.25") for row in range(20)]
    columns = {
        "text": TEXTS[:20],
        "time": times,
        "price": prices,
        "kind": pyarrow.array(["a", "b"] * 10).dictionary_encode(),
        "raw": pyarrow.array([b"x"] * 20),
        "far": pyarrow.array([4_000_000] * 20, pyarrow.int32()).cast(pyarrow.date32()),
    }
    folder = tmp_path / "x.parquet"
    folder.mkdir()
    table = pyarrow.table(columns)
    for part in (0, 1):
        parquet.write_table(table.slice(10 * part, 10), folder / f"part-{part}.parquet")
    (folder / "_SUCCESS").touch()
    output = tmp_path / f"out{suffix}"
    run(checkpoint, output, folder, keep="time,price,kind,raw,far")
    rows = read_any(output)
    is_typed = suffix == ".parquet"
    assert [row["time"] for row in rows] == (times if is_typed else list(map(str, times)))
    assert [row["price"] for row in rows] == (prices if is_typed else list(map(str, prices)))
    assert [row["kind"] for row in rows] == ["a", "b"] * 10


def test_a_column_name_with_a_tab_is_refused_for_tsv(checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "good", "a\tb": 1}))
    with pytest.raises(InputError, match=r"the name of column .*write .csv"):
        run(checkpoint, tmp_path / "out.tsv", tmp_path / "rows.jsonl", keep="a\tb")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_lines_of_the_rows_that_could_not_be_used_are_counted(checkpoint, tmp_path, capsys):
    content = 'id,text\n1,"two\nlines",x\n2,good\n3," "\n4,"open\n5,bad\n'
    (tmp_path / "rows.csv").write_text(content)
    run(checkpoint, tmp_path / "out.csv", tmp_path / "rows.csv", keep="id")
    assert [row["id"] for row in read_csv(tmp_path / "out.csv")] == ["2", "5"]
    errors = read_any(tmp_path / "out.csv.errors.jsonl")
    assert [error["where"] for error in errors] == ["lines 2 to 3", "line 5", "line 6"]
    assert "3 rows (4 lines) could not be used" in capsys.readouterr().out


REFUSED = {
    "no input": (dict(input=()), "--input is missing"),
    "no output": (dict(output=""), "--output is missing"),
    "output format": (dict(output="out.txt"), "none of the known extensions .csv, .tsv"),
    "input format": (dict(input=("rows.txt",)), "none of the known extensions .csv, .tsv"),
    "no file": (dict(input=("none.csv",)), "there is no file"),
    "no column": (dict(text="body"), "has no column 'body': it has 'id', 'text'"),
    "no kept column": (dict(keep="body"), "has no column 'body'"),
    "kept twice": (dict(keep="id,id"), "an empty or a repeated name"),
    "a taken name": (
        dict(keep="exit_layer", input=("taken.csv",)),
        "column 'exit_layer' of its own",
    ),
    "one column": (dict(text_pair="text"), "name the same column"),
    "two criteria": (dict(patience=1, criterion="vote:votes=2"), "give one of them"),
    "a threshold": (dict(regression_threshold=0.1), "no effect without --patience"),
    "no criterion": (dict(criterion="hunch"), "unknown exit criterion"),
    "no batch": (dict(batch_size=0), "--batch_size must be at least 1"),
    "empty": (dict(input=("empty.csv",)), "is empty"),
    "repeated": (dict(input=("repeated.csv",)), "more than one column 'text'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_options_are_refused_and_write_nothing(checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "rows.csv")
    write_csv(tmp_path / "taken.csv", exit_layer=TEXTS)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "repeated.csv").write_text("text,text\na,b\n")
    before = sorted(tmp_path.iterdir())
    options, message = REFUSED[name]
    defaults = dict(checkpoint=checkpoint, input=("rows.csv",), output="out.csv")
    with pytest.raises(InputError, match=message):
        predict(PredictOptions(**defaults | options))
    assert sorted(tmp_path.iterdir()) == before


def test_a_csv_record_over_several_lines_has_the_number_of_its_first_line(tmp_path):
    (tmp_path / "rows.csv").write_text('text\n"a\nb"\nc\n"d\n\ne"\n')
    rows = list(tables.open_table(tmp_path / "rows.csv", ["text"]).rows())
    assert [(row.first, row.cells["text"]) for row in rows] == [
        (2, "a\nb"),
        (4, "c"),
        (5, "d\n\ne"),
    ]
    assert rows[-1].bytes_read == (tmp_path / "rows.csv").stat().st_size


@pytest.mark.slow
def test_a_process_that_is_killed_three_times_writes_the_undisturbed_output(checkpoint, tmp_path):
    texts = [TEXTS[row % len(TEXTS)] for row in range(40_000)]
    source = write_csv(tmp_path / "rows.csv", texts)

    def command(output):
        arguments = ["predict", f"--checkpoint={checkpoint}", f"--input={source}"]
        return [sys.executable, "-m", "pabee_jax.commands.main", *arguments, f"--output={output}"]

    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command(tmp_path / "expected.csv"), check=True, env=environment)
    output = tmp_path / "out.csv"
    parts = Path(f"{output}.parts")
    for blocks in (1, 3, 6):
        process = subprocess.Popen(command(output), env=environment)
        while not (parts / f"{blocks:06d}.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the job ended before it was killed"
    subprocess.run(command(output), check=True, env=environment)
    assert output.read_bytes() == (tmp_path / "expected.csv").read_bytes()
