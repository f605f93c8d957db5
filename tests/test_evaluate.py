"""Tests of `evaluate`: the replay of one full pass gives the results of real early exits."""

import csv
import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from evaluated import ROWS, finished_run, options
from pabee_jax import EarlyExitClassifier, InputError, Patience, replay
from pabee_jax.analysis import measured, metrics, operating_points
from pabee_jax.analysis.rows import Rows
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.criteria import MaxProbability
from pabee_jax.data.task import Examples, Task
from pabee_jax.reports import files
from pabee_jax.reports.html_page import Section, write_page
from pabee_jax.training import run_directory
from pabee_jax.training.config import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_and_the_result_files_agree_with_a_replay(run, tmp_path, capsys):
    evaluate(options(run, output=str(tmp_path)), None)
    table = capsys.readouterr().out
    arrays = np.load(tmp_path / "all_exit_logits.npz")
    assert arrays["logits"].shape == (5, ROWS, 2)
    results = json.loads((tmp_path / "results.json").read_text())
    predictions = rows_of(tmp_path / "predictions.csv")
    assert len(predictions) == results["examples"] == ROWS
    for line, row in zip(rows_of(tmp_path / "results.csv"), results["rows"], strict=True):
        patience = row["patience"]
        exit_layers, exit_logits = map(np.asarray, replay(Patience(patience), arrays["logits"]))
        class_ids = exit_logits.argmax(axis=1)
        assert row["accuracy"] == pytest.approx(np.mean(arrays["labels"] == class_ids))
        assert float(line["accuracy"]) == row["accuracy"]
        assert row["mean_exit_layer"] == pytest.approx(np.mean(exit_layers))
        assert row["layers_saved"] == pytest.approx(1 - np.mean(exit_layers) / 5)
        assert row["layer_speedup"] == pytest.approx(5 / np.mean(exit_layers))
        assert f"{np.mean(exit_layers):.2f}" in table
        written_layers = [int(row[f"exit_layer_patience_{patience}"]) for row in predictions]
        assert written_layers == exit_layers.tolist()
        written_classes = [row[f"prediction_patience_{patience}"] for row in predictions]
        assert written_classes == [("no", "yes")[class_id] for class_id in class_ids]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["loop", "pool"])
def test_a_driver_gives_every_row_the_exit_and_the_class_of_the_replay(run, tmp_path, driver):
    evaluate(options(run, output=str(tmp_path / "full")), None)
    evaluate(options(run, output=str(tmp_path / driver), driver=driver, batch_size=7), None)
    replayed = rows_of(tmp_path / "full" / "predictions.csv")
    measured_rows = rows_of(tmp_path / driver / "predictions.csv")
    assert measured_rows == replayed, (
        f"predictions.csv of the {driver} driver differs from the replay of the full pass"
    )


def test_time_adds_measured_columns(run, tmp_path):
    evaluate(options(run, output=str(tmp_path), time=True, patience="0,1"), None)
    for row in json.loads((tmp_path / "results.json").read_text())["rows"]:
        assert row["milliseconds_per_example"] > 0 and row["measured_speedup"] > 0


def test_a_split_without_labels_has_exit_layers_and_predictions_only(run, tmp_path, capsys):
    target = tmp_path / "submission.tsv"
    changes = {"split": "test", "patience": "1", "predictions": str(target)}
    evaluate(options(run, output=str(tmp_path), **changes), None)
    assert "accuracy" not in capsys.readouterr().out
    lines = target.read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == ROWS + 1
    assert {line.split("\t")[1] for line in lines[1:]} <= {"no", "yes"}
    assert not (tmp_path / "tradeoff.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "--checkpoint is missing"),
        ({"patience": "-1"}, "--patience must be 0 or more, not -1"),
        ({"patience": "two"}, "takes whole numbers with commas between them, not 'two'"),
        ({"patience": "1,,2"}, "takes whole numbers"),
        ({"patience": ""}, "takes whole numbers"),
        ({"patience": "1.5"}, "takes whole numbers"),
        ({"driver": "warp"}, "unknown driver 'warp'; known are auto, full, loop, pool"),
        ({"split": "train"}, "--split is 'train'; it must be dev or test"),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"predictions": "x.tsv"}, "give one --patience, not 4"),
        ({"predictions": "absent/x.tsv", "patience": "1"}, "its directory does not exist"),
        ({"patience": "99999999999"}, "whole number"),
    ],
)
def test_arguments_are_checked_before_any_file_is_opened(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        options(tmp_path / "absent", **changes)


def test_a_regression_threshold_for_a_classification_is_an_input_error(run, tmp_path):
    invalid = options(run, regression_threshold=0.1, output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="is for regression; task files is a classification"):
        evaluate(invalid, None)
    assert not (tmp_path / "out").exists()


def test_data_with_another_number_of_outputs_is_an_input_error(run, tmp_path):
    config = run_directory.read_config(run)
    config.files.regression = True
    with pytest.raises(InputError, match="asks for a score .1 output., but .* has 2 outputs"):
        evaluate(options(run, output=str(tmp_path)), config)
    config = TrainConfig(task="mnli", data_dir=str(tmp_path), max_seq_length=32)
    with pytest.raises(InputError, match="asks for 3 classes, but .* has 2 outputs"):
        evaluate(options(run, output=str(tmp_path)), config)


def test_a_run_without_weights_config_or_checkpoints_is_an_input_error(run, tmp_path):
    config = run_directory.read_config(run)
    run_directory.prepare(tmp_path / "new", config, {}, overwrite=False)
    with pytest.raises(InputError, match="is not finished: resume it with the train command"):
        evaluate(options(tmp_path / "new"), None)
    with pytest.raises(
        InputError, match="name the data, with --config files --config.files.dev=FILE or"
    ):
        evaluate(options(run.parent / "plain"), None)
    with pytest.raises(InputError, match="has no training checkpoints"):
        evaluate(options(run, all_checkpoints=True, output=str(tmp_path)), None)


def test_metrics_equal_their_definitions():
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 2, 50), random.normal(size=(50, 2))
    class_ids = logits.argmax(axis=1)
    names = ("accuracy", "f1", "macro_f1", "matthews")
    values = metrics.compute(names, logits, labels)
    assert values["accuracy"] == pytest.approx((labels == class_ids).mean())
    hits = ((labels == 1) & (class_ids == 1)).sum()
    assert values["f1"] == pytest.approx(2 * hits / ((labels == 1).sum() + (class_ids == 1).sum()))
    # The Matthews coefficient is the correlation of the two indicator variables.
    assert values["matthews"] == pytest.approx(np.corrcoef(labels, class_ids)[0, 1])
    assert values["macro_f1"] == pytest.approx(sk.f1_score(labels, class_ids, average="macro"))
    scores, targets = random.normal(size=(50, 1)), random.normal(size=50)
    values = metrics.compute(("pearson", "spearman"), scores, targets)
    assert values["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], targets)[0, 1])
    ranks = [stats.rankdata(column) for column in (scores[:, 0], targets)]
    assert values["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_correlations_of_many_large_scores_are_exact():
    """Scores in float32, as a model gives them, such as prices."""
    random = np.random.default_rng(0)
    scores = (1e6 + random.normal(size=(10_000, 1))).astype(np.float32)
    targets = (scores[:, 0] + random.normal(size=10_000)).astype(np.float32)
    expected = np.corrcoef(scores[:, 0].astype(np.float64), targets.astype(np.float64))[0, 1]
    values = metrics.compute(("pearson",), scores, targets)
    assert values["pearson"] == pytest.approx(expected, rel=1e-9)


def test_a_correlation_of_constant_predictions_is_nan_and_null_in_json(tmp_path):
    values = metrics.compute(("pearson",), np.ones((5, 1)), np.arange(5.0))
    assert np.isnan(values["pearson"])
    files.write_json(tmp_path / "x.json", {"rows": [values]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"rows": [{"pearson": None}]}


def test_half_of_a_surrogate_pair_is_written_escaped(tmp_path):
    files.write_csv(tmp_path / "x.csv", [{"label": "\ud800"}])
    assert (tmp_path / "x.csv").read_text().splitlines() == ["label", "\\ud800"]
    section = Section("Rows \ud800", "", ["text"], [["\ud800"]], is_list=True)
    write_page(tmp_path / "x.html", "\ud800", [("fact", "\ud800")], [section])
    page = (tmp_path / "x.html").read_text()
    assert page.count("\\ud800") >= 4 and "%5Cud800" in page


@pytest.mark.slow
def test_mnli_has_metrics_and_a_submission_file_for_each_part(run, tmp_path):
    classifier = EarlyExitClassifier.from_pretrained(
        str(run.parent / "plain"), num_labels=3, criterion=Patience(1)
    )
    parts = {
        "dev_matched": Examples(["good"] * 3, ["bad"] * 3, np.int32([0, 1, 2]), ["0", "1", "2"]),
        "dev_mismatched": Examples(["film"] * 2, ["a"] * 2, np.int32([1, 1]), ["0", "1"]),
    }
    names = ("entailment", "neutral", "contradiction")
    task = Task("mnli", names, ("accuracy",), lambda split: parts, names)
    rows = Rows.of(parts, classifier.tokenize)
    (point,) = measured.run(classifier, [Patience(1)], task, rows, None)
    class_ids = point.logits.argmax(axis=1)
    assert point.metrics["accuracy_matched"] == pytest.approx(np.mean(class_ids[:3] == [0, 1, 2]))
    assert point.metrics["accuracy_mismatched"] == pytest.approx(np.mean(class_ids[3:] == [1, 1]))
    paths = files.write_submission(tmp_path / "MNLI.tsv", point, task, rows)
    assert [path.name for path in paths] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    lines = [line.split("\t") for line in paths[1].read_text().splitlines()]
    assert lines == [
        ["index", "prediction"],
        *[[str(index), names[class_id]] for index, class_id in enumerate(class_ids[3:])],
    ]


def test_stsb_scores_are_clipped_to_their_scale_in_a_submission(tmp_path):
    task = Task("stsb", (), ("pearson",), dict)
    dataset = EarlyExitClassifier  # A placeholder: a submission does not use the dataset.
    rows = operating_points.Rows(dataset, ["", ""], ["7", "8"], None, {"test": slice(0, 2)})
    logits = np.float32([[-0.3], [5.4]])
    point = operating_points.OperatingPoint(Patience(0), np.int32([2, 2]), logits, {}, 2)
    (path,) = files.write_submission(tmp_path / "STS-B.tsv", point, task, rows)
    assert path.read_text() == "index\tprediction\n7\t0.000\n8\t5.000\n"


def test_other_scores_are_not_clipped_in_a_submission(tmp_path):
    task = Task("files", (), ("pearson",), dict)
    rows = operating_points.Rows(EarlyExitClassifier, [""], ["1"], None, {"test": slice(0, 1)})
    point = operating_points.OperatingPoint(Patience(0), np.int32([2]), np.float32([[80.0]]), {}, 2)
    (path,) = files.write_submission(tmp_path / "scores.tsv", point, task, rows)
    assert path.read_text() == "index\tprediction\n1\t80.000\n"


def test_the_mean_exit_layer_is_computed_for_each_kind_of_example():
    point = operating_points.OperatingPoint(
        Patience(1), np.int32([2, 4, 3]), np.zeros((3, 2)), {}, 6
    )
    assert operating_points.mean_exit_by_kind(point, ["b", "a", "b"]) == {"b": 2.5, "a": 4.0}


def test_a_row_is_within_the_rounding_margin_if_a_decision_up_to_its_exit_is():
    """Three exits, two classes: row 0 exits at layer 2, row 1 exits at layer 3."""
    logits = np.zeros((3, 2, 2), np.float32)
    logits[:, 0] = [[3, 1], [0.5, 0], [7, 7]]  # The tie at layer 3 is after the exit of row 0.
    logits[:, 1] = [[1, 2], [4, 1], [0, 1e-6]]
    is_within = operating_points.within_rounding_margin
    assert is_within(Patience(1), logits).tolist() == [False, True]
    point = operating_points.OperatingPoint(Patience(1), np.array([2, 3]), logits[-1], {}, 3)
    different = operating_points.OperatingPoint(Patience(1), np.array([2, 2]), logits[-1], {}, 3)
    text = operating_points.agreement([different], [point], logits)
    assert text.startswith("1 of 2 exit layers differ from the full pass (1 of them")

    # The threshold 1 / (1 + e^-2) is the probability at a logit of 2. The logits at layer 1 are
    # above 2 by 1e-6 for row 0 and by 1e-3 for row 1.
    confident = np.zeros((2, 2, 2), np.float32)
    confident[0, :, 1] = [2 + 1e-6, 2 + 1e-3]
    threshold = 1 / (1 + np.exp(-2))
    assert is_within(MaxProbability(threshold), confident).tolist() == [True, False]

    # The scores of two exits may move toward each other, so a difference of 8e-6 is within the
    # margin of 1e-5 per score.
    scores = np.float32([0.0, 0.25 + 8e-6, 1.0]).reshape(3, 1, 1)
    assert is_within(Patience(1, 0.25), scores).tolist() == [True]
    assert is_within(Patience(1, 0.5), scores).tolist() == [False]
