"""`pabee-jax predict`: the rows of files, in every format, after kills and with bad rows."""

import csv
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
from pabee_jax.data import row_files
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
    source = write_csv(tmp_path / "rows.csv", [*TEXTS, 'a "quoted", film', ""])
    first, second = tmp_path / f"first{suffix}", tmp_path / "second.jsonl"
    run(checkpoint, first, source, keep="text")
    run(checkpoint, second, first, keep="text")
    rows, again = read_any(first), read_any(second)
    assert [row["text"] for row in rows] == [*TEXTS, 'a "quoted", film', ""]
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


def test_a_file_of_bad_rows_alone_gives_an_output_without_rows(checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    run(checkpoint, tmp_path / "out.csv", tmp_path / "rows.jsonl")
    assert (tmp_path / "out.csv").read_text() == "label,score_LABEL_0,score_LABEL_1,exit_layer\n"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_with_a_header_alone_gives_an_output_without_rows(checkpoint, tmp_path, suffix):
    (tmp_path / "rows.csv").write_text("id,text\n")
    run(checkpoint, tmp_path / f"out{suffix}", tmp_path / "rows.csv", keep="id")
    assert read_any(tmp_path / f"out{suffix}") == []


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
    rows = list(row_files.open_file(str(tmp_path / "rows.csv")).rows())
    assert [(row.place, row.cells["text"]) for row in rows] == [
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
