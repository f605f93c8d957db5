"""A correlation that is undefined is said once, and is the same in every table and file."""

import csv
import json
import warnings

import numpy as np
import pytest

from evaluated import options
from pabee_jax.analysis import metrics
from pabee_jax.commands.compare import compare
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.data.config import FilesConfig
from pabee_jax.io import storage
from pabee_jax.training.run import train
from runs import WORDS, run_config, sources  # noqa: F401


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory):  # noqa: F811
    """Two runs on equal dev scores."""
    folder = tmp_path_factory.mktemp("scores")
    random = np.random.default_rng(0)
    for name, scores in (("train", random.normal(size=40)), ("dev", np.full(20, 2.5))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([" ".join(random.choice(WORDS, 4)), score] for score in scores)
    files = FilesConfig(train="train.csv", dev="dev.csv", regression=True)
    for seed in (0, 1):
        overrides = {"data_dir": str(folder), "files": files, "max_steps": 4, "seed": seed}
        overrides |= {"export": "best", "eval_every": 2, "batch_size": 10 + 10 * seed}
        train(run_config(sources, **overrides), folder / f"run{seed}")
    return folder


def test_training_says_why_and_prints_the_word(sources, trained, tmp_path, capsys, caplog):  # noqa: F811
    files = FilesConfig(train="train.csv", dev="dev.csv", regression=True)
    overrides = {"data_dir": str(trained), "files": files, "max_steps": 4}
    train(run_config(sources, **overrides), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "step 4: dev pearson undefined at the last exit" in printed
    assert "undefined  undefined" in printed and "nan" not in printed
    said = [message for message in caplog.messages if "all 20 labels are 2.5" in message]
    assert len(said) == 1 and said[0].startswith("dev: undefined: pearson and spearman, because")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_every_table_and_file_of_evaluate_agrees(trained, tmp_path, capsys, caplog):
    evaluate(options(trained / "run0", output=str(tmp_path), sweep=True, report=True), None)
    printed = capsys.readouterr().out
    assert "nan" not in printed.lower() and "0.00 " not in printed.partition("criterion")[2]
    assert "pearson at full depth: undefined" in printed
    (said,) = (message for message in caplog.messages if "undefined" in message)
    assert said.startswith("undefined: pearson") and "all 20 labels are 2.5" in said
    for name, column in (("results", "pearson"), ("sweep", "pearson")):
        content = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
        records = content["rows" if name == "results" else "settings"]
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert {record[column] for record in records} == {None}
        assert {line[column] for line in lines} == {""} and len(lines) == len(records)
    page = (tmp_path / "report.html").read_text()
    assert "<dd>undefined</dd>" in page and ">nan" not in page


def test_a_comparison_agrees(trained, tmp_path, capsys, caplog):
    runs = [str(trained / f"run{seed}") for seed in (0, 1)]
    for run in runs:
        evaluate(options(run), None)
    caplog.clear()
    capsys.readouterr()
    compare(runs, [], "", storage.path_of(tmp_path / "compared"))
    printed = capsys.readouterr().out
    assert "undefined" in printed and "nan" not in printed
    assert len([message for message in caplog.messages if "undefined" in message]) == 1
    text = (tmp_path / "compared" / "compare.json").read_text()
    records = json.loads(text, parse_constant=pytest.fail)["settings"]
    assert {record["pearson"] for record in records} == {None}
    with (tmp_path / "compared" / "compare.csv").open(newline="") as file:
        assert {(line["pearson"], line["difference"]) for line in csv.DictReader(file)} == {
            ("", "")
        }


@pytest.mark.parametrize(
    ("scores", "labels", "reason"),
    [
        ([[1.0], [1.0]], [1.0, 2.0], "some exits or settings give all rows the same score"),
        ([[1.0], [2.0]], [3.0, 3.0], "all 2 labels are 3"),
        ([[1.0]], [3.0], "there is one row"),
    ],
)
def test_an_undefined_correlation_has_its_reason(scores, labels, reason):
    labels = np.float32(labels)
    values = metrics.compute(["pearson", "spearman"], np.float32(scores), labels)
    assert np.isnan([*values.values()]).all()
    sentence = metrics.undefined([values], labels)
    assert sentence.startswith("undefined: pearson and spearman, because") and reason in sentence
    assert metrics.undefined([{"pearson": 0.0}], labels) == ""


def test_the_matthews_correlation_of_one_class_is_0_without_a_warning():
    logits = np.float32([[1, 0], [1, 0]])
    assert metrics.compute(["matthews"], logits, np.array([0, 0])) == {"matthews": 0.0}
