"""evaluate.py's work: one pass and a replay say what real early exits say."""

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
from pabee_jax.training import run_directory
from pabee_jax.training.config import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_the_table_and_everything_behind_it(run, tmp_path, capsys):
    evaluate(options(run, output=str(tmp_path)), None)
    table = capsys.readouterr().out
    saved = np.load(tmp_path / "all_exit_logits.npz")
    assert saved["logits"].shape == (5, ROWS, 2)
    results = json.loads((tmp_path / "results.json").read_text())
    predictions = rows_of(tmp_path / "predictions.csv")
    assert len(predictions) == results["examples"] == ROWS
    for line, row in zip(rows_of(tmp_path / "results.csv"), results["rows"], strict=True):
        patience = row["patience"]
        exits, answers = replay(Patience(patience), saved["logits"])
        labels, answers = saved["labels"], np.asarray(answers).argmax(axis=1)
        assert row["accuracy"] == pytest.approx(np.mean(labels == answers))
        assert float(line["accuracy"]) == row["accuracy"]
        assert row["mean_exit_layer"] == pytest.approx(np.mean(exits))
        assert row["layers_saved"] == pytest.approx(1 - np.mean(exits) / 5)
        assert row["layer_speedup"] == pytest.approx(5 / np.mean(exits))
        assert f"{np.mean(exits):.2f}" in table
        column = [int(one[f"exit_layer_patience_{patience}"]) for one in predictions]
        assert column == exits.tolist()
        named = [one[f"prediction_patience_{patience}"] for one in predictions]
        assert named == [("no", "yes")[answer] for answer in answers]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("driver", ["loop", "pool"])
def test_real_runs_agree_with_the_replay_row_for_row(run, tmp_path, driver):
    evaluate(options(run, output=str(tmp_path / "full")), None)
    evaluate(options(run, output=str(tmp_path / driver), driver=driver, batch_size=7), None)
    one, other = (rows_of(tmp_path / name / "predictions.csv") for name in ("full", driver))
    assert one == other


def test_time_adds_measured_columns(run, tmp_path):
    evaluate(options(run, output=str(tmp_path), time=True, patience="0,1"), None)
    for row in json.loads((tmp_path / "results.json").read_text())["rows"]:
        assert row["milliseconds_per_example"] > 0 and row["measured_speedup"] > 0


def test_a_split_without_labels_gives_layers_and_predictions(run, tmp_path, capsys):
    target = tmp_path / "submission.tsv"
    chosen = options(run, output=str(tmp_path), split="test", patience="1", predictions=str(target))
    evaluate(chosen, None)
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


def test_refuses_a_threshold_for_a_classification(run, tmp_path):
    chosen = options(run, regression_threshold=0.1, output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="is for regression; task files is a classification"):
        evaluate(chosen, None)
    assert not (tmp_path / "out").exists()


def test_refuses_data_of_another_shape(run, tmp_path):
    config = run_directory.read_config(run)
    config.files.regression = True
    with pytest.raises(InputError, match="asks for a score .1 output., but .* has 2 outputs"):
        evaluate(options(run, output=str(tmp_path)), config)
    config = TrainConfig(task="mnli", data_dir=str(tmp_path), max_seq_length=32)
    with pytest.raises(InputError, match="asks for 3 classes, but .* has 2 outputs"):
        evaluate(options(run, output=str(tmp_path)), config)


def test_a_run_that_is_not_finished_or_has_no_config(run, tmp_path):
    config = run_directory.read_config(run)
    run_directory.prepare(tmp_path / "new", config, overwrite=False)
    with pytest.raises(InputError, match="is not finished: resume it with the train command"):
        evaluate(options(tmp_path / "new"), None)
    with pytest.raises(InputError, match="give --config configs/glue.py:TASK"):
        evaluate(options(run.parent / "plain"), None)
    with pytest.raises(InputError, match="has no training checkpoints"):
        evaluate(options(run, all_checkpoints=True, output=str(tmp_path)), None)


def test_metrics_are_the_libraries_own():
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, 2, 50), random.normal(size=(50, 2))
    answers = logits.argmax(axis=1)
    names = ("accuracy", "f1", "macro_f1", "matthews")
    found = metrics.compute(names, logits, labels)
    assert found["accuracy"] == pytest.approx((labels == answers).mean())
    hits = ((labels == 1) & (answers == 1)).sum()
    assert found["f1"] == pytest.approx(2 * hits / ((labels == 1).sum() + (answers == 1).sum()))
    # Matthews' coefficient is the correlation of the two indicator variables.
    assert found["matthews"] == pytest.approx(np.corrcoef(labels, answers)[0, 1])
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, answers, average="macro"))
    scores, truth = random.normal(size=(50, 1)), random.normal(size=50)
    found = metrics.compute(("pearson", "spearman"), scores, truth)
    assert found["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], truth)[0, 1])
    ranks = [stats.rankdata(values) for values in (scores[:, 0], truth)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_a_correlation_of_constant_predictions_is_nan_and_null_in_json(tmp_path):
    found = metrics.compute(("pearson",), np.ones((5, 1)), np.arange(5.0))
    assert np.isnan(found["pearson"])
    files.write_json(tmp_path / "x.json", {"rows": [found]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"rows": [{"pearson": None}]}


def test_mnli_has_two_parts_in_table_and_submission(run, tmp_path):
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
    answers = point.logits.argmax(axis=1)
    assert point.metrics["accuracy_matched"] == pytest.approx(np.mean(answers[:3] == [0, 1, 2]))
    assert point.metrics["accuracy_mismatched"] == pytest.approx(np.mean(answers[3:] == [1, 1]))
    written = files.write_submission(tmp_path / "MNLI.tsv", point, task, rows)
    assert [path.name for path in written] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    lines = [line.split("\t") for line in written[1].read_text().splitlines()]
    assert lines == [
        ["index", "prediction"],
        *[[str(i), names[a]] for i, a in enumerate(answers[3:])],
    ]


def test_stsb_scores_are_submitted_within_their_scale(tmp_path):
    task = Task("stsb", (), ("pearson",), dict)
    dataset = EarlyExitClassifier  # Not read for a submission.
    rows = operating_points.Rows(dataset, ["", ""], ["7", "8"], None, {"test": slice(0, 2)})
    logits = np.float32([[-0.3], [5.4]])
    point = operating_points.OperatingPoint(Patience(0), np.int32([2, 2]), logits, {}, 2)
    (path,) = files.write_submission(tmp_path / "STS-B.tsv", point, task, rows)
    assert path.read_text() == "index\tprediction\n7\t0.000\n8\t5.000\n"


def test_other_scores_are_submitted_as_they_are(tmp_path):
    task = Task("files", (), ("pearson",), dict)
    rows = operating_points.Rows(EarlyExitClassifier, [""], ["1"], None, {"test": slice(0, 1)})
    point = operating_points.OperatingPoint(Patience(0), np.int32([2]), np.float32([[80.0]]), {}, 2)
    (path,) = files.write_submission(tmp_path / "scores.tsv", point, task, rows)
    assert path.read_text() == "index\tprediction\n1\t80.000\n"


def test_mean_exit_layer_by_kind():
    point = operating_points.OperatingPoint(
        Patience(1), np.int32([2, 4, 3]), np.zeros((3, 2)), {}, 6
    )
    assert operating_points.mean_exit_by_kind(point, ["b", "a", "b"]) == {"b": 2.5, "a": 4.0}


def test_a_row_hangs_on_rounding_where_a_decision_on_its_way_does():
    """By hand: three exits, two classes; row 0 leaves at layer 2, row 1 at layer 3."""
    logits = np.zeros((3, 2, 2), np.float32)
    logits[:, 0] = [[3, 1], [0.5, 0], [7, 7]]  # The tie at layer 3 is beyond its exit.
    logits[:, 1] = [[1, 2], [4, 1], [0, 1e-6]]
    hangs = operating_points.hangs_on_rounding
    assert hangs(Patience(1), logits).tolist() == [False, True]
    point = operating_points.OperatingPoint(Patience(1), np.array([2, 3]), logits[-1], {}, 3)
    moved = operating_points.OperatingPoint(Patience(1), np.array([2, 2]), logits[-1], {}, 3)
    text = operating_points.agreement([moved], [point], logits)
    assert text.startswith("1 of 2 exits are at another layer than in the full pass (1 of them")

    # Rows 0 and 1 are surer at layer 1 than 1 / (1 + e^-2) by 1e-6 and by 1e-3.
    sure = np.zeros((2, 2, 2), np.float32)
    sure[0, :, 1] = [2 + 1e-6, 2 + 1e-3]
    threshold = 1 / (1 + np.exp(-2))
    assert hangs(MaxProbability(threshold), sure).tolist() == [True, False]

    # Two exits that move towards each other: 5e-6 each is enough for a distance of 8e-6.
    scores = np.float32([0.0, 0.25 + 8e-6, 1.0]).reshape(3, 1, 1)
    assert hangs(Patience(1, 0.25), scores).tolist() == [True]
    assert hangs(Patience(1, 0.5), scores).tolist() == [False]
