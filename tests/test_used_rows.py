"""The guarantee of `--calibrate`: a checkpoint records which rows it has seen."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from evaluated import finished_run, options
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.analysis.risk_control import NoSetting
from pabee_jax.commands import choose_setting
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.criteria import MaxProbability
from pabee_jax.data import used_rows
from pabee_jax.data.config import FilesConfig
from pabee_jax.data.task import Examples
from pabee_jax.training import run_directory
from pabee_jax.training.run import train
from runs import run_config, sources  # noqa: F401

EASY = {"calibrate": True, "max_drop": 0.6, "criterion": ["max_probability"]}


def examples(texts, pairs=None, labels=None):
    return Examples(texts, pairs, labels, [str(row) for row in range(len(texts))])


TEXTS = [f"row {row}" for row in range(900)]


@pytest.mark.parametrize(
    ("texts", "is_used"),
    [
        (TEXTS, True),
        (TEXTS[::-1], True),
        (TEXTS[:450], True),
        ([*TEXTS, "one more"], True),
        (TEXTS + [f"other {row}" for row in range(9000)], True),
        ([f"other {row}" for row in range(900)], False),
        ([f"row {row} " for row in range(900)], False),
    ],
)
def test_rows_are_recognized_in_any_order_and_in_other_files(texts, is_used):
    records = used_rows.with_uses(None, examples(TEXTS), [used_rows.TRAINED])
    labels = np.zeros(len(texts), np.int32)
    assert bool(used_rows.uses_of(records, [examples(texts, labels=labels)])) == is_used


def test_the_second_text_of_a_pair_belongs_to_the_row():
    records = used_rows.with_uses(None, examples(["a"] * 50, TEXTS[:50]), [used_rows.CALIBRATED])
    assert used_rows.uses_of(records, [examples(["a"] * 50, TEXTS[:50])]) == {"calibration": 1}
    assert used_rows.uses_of(records, [examples(["a"] * 50, TEXTS[50:100])]) == {}


def test_uses_are_counted():
    uses = [used_rows.TRAINED, used_rows.CALIBRATED]
    records = used_rows.with_uses(None, examples(TEXTS), uses)
    records = used_rows.with_uses(records, examples(["x"]), [used_rows.CHOSE_STEP])
    records = used_rows.with_uses(records, examples(TEXTS[::-1]), [used_rows.CALIBRATED])
    records = json.loads(json.dumps(records))
    assert used_rows.uses_of(records, [examples(TEXTS)]) == {"trained": 1, "calibration": 2}
    text = used_rows.describe(used_rows.uses_of(records, [examples(TEXTS)]))
    assert text == "trained the weights and were calibrated on before (2 times)"


@pytest.mark.parametrize("damaged", ["x", [1], [{}], [{"sample": 1, "uses": {}}], {"a": 1}])
def test_a_damaged_record_is_ignored(damaged):
    assert used_rows.uses_of(damaged, [examples(TEXTS)]) == {}
    assert len(used_rows.with_uses(damaged, examples(TEXTS), [used_rows.TRAINED])) == 1


def uses_in(run):
    records = json.loads((run / "config.json").read_text())["rows_used"]
    return [record["uses"] for record in records]


def claim_in(run):
    return json.loads((run / "config.json").read_text())["early_exit"]["guarantee"]["claim"]


@pytest.mark.parametrize("export", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_a_run_records_its_rows_and_calibrating_on_them_is_an_estimate(
    sources,  # noqa: F811
    export,
    tmp_path,
    capsys,
):
    run = tmp_path / "run"
    train(run_config(sources, export=export, learning_rate=3e-2), run)
    chosen = {"setting": 1} | ({"step": 1} if export == "best" else {})
    assert uses_in(run) == [{"trained": 1}, chosen]
    evaluate(options(run, **EASY), None)
    printed = capsys.readouterr().out
    assert "by estimate at most 60.00% of new rows" in printed and "confidence" not in printed
    words = "these rows, or many of them, "
    words += "chose the step whose weights were exported and " if export == "best" else ""
    words += "chose the setting at the end of training; calibrate on rows that were not used"
    assert words in printed and words in claim_in(run)
    # A copy of the directory has seen the same rows.
    copy = shutil.copytree(run, tmp_path / "copy")
    evaluate(options(copy, **EASY), None)
    assert "were calibrated on before (1 time)" in claim_in(copy)
    assert uses_in(copy)[1]["calibration"] == 2


def test_new_rows_are_guaranteed_once(sources, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    train(run_config(sources, learning_rate=3e-2), run)
    with (sources / "dev.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "new.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        # Another order of the words gives other texts with the same label.
        writer.writerows(
            [f"{row['text']} {row['text']} {row['text']}", row["label"]] for row in rows
        )
    config = run_directory.read_config(run)
    config.data_dir, config.files = str(tmp_path), FilesConfig(dev="new.csv")
    evaluate(options(run, **EASY), config)
    assert claim_in(run) == "guaranteed"
    assert "with 95% confidence at most 60.00% of new rows" in capsys.readouterr().out
    evaluate(options(run, **EASY), config)
    assert claim_in(run).startswith("an estimate without a guarantee")
    # A checkpoint that is saved again, and one that is trained further, have seen the rows.
    EarlyExitClassifier.from_pretrained(str(run)).save_pretrained(tmp_path / "again")
    assert uses_in(tmp_path / "again") == uses_in(run)
    again = run_config(sources, model=str(tmp_path / "again"), max_steps=2)
    train(again, tmp_path / "further")
    assert {"calibration": 2} in uses_in(tmp_path / "further")


@pytest.mark.slow
def test_rows_that_trained_the_weights_are_recognized(sources, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    train(run_config(sources, learning_rate=3e-2), run)
    config = run_directory.read_config(run)
    config.files = dataclasses.replace(config.files, dev="train.csv")
    evaluate(options(run, **EASY), config)
    assert "trained the weights" in claim_in(run)


def test_a_failed_test_counts_and_changes_nothing_else(tmp_path, monkeypatch):
    """Otherwise a user could try criteria and limits on the same rows until one succeeds."""
    run = finished_run(tmp_path, rows=400)
    before = json.loads((run / "config.json").read_text())
    with pytest.raises(InputError, match="saves no layer; it is not stored"):
        evaluate(options(run, **EASY | {"max_drop": 0.02}), None)
    with pytest.raises(InputError, match="200 calibration rows are too few"):
        evaluate(options(run, **EASY | {"max_drop": 0.001}), None)  # No test was made.

    def fail(*_, **__):
        raise NoSetting("no setting qualifies", is_tested=True)

    with monkeypatch.context() as context:
        context.setattr(choose_setting, "fastest_safe_setting", fail)
        with pytest.raises(InputError, match="no setting qualifies"):
            evaluate(options(run, **EASY), None)
    after = json.loads((run / "config.json").read_text())
    assert after.pop("rows_used")[0]["uses"] == {"calibration": 2} and after == before
    evaluate(options(run, **EASY), None)
    assert "were calibrated on before (2 times)" in claim_in(run)


def test_a_checkpoint_without_a_record_has_a_condition(tmp_path, capsys):
    run = finished_run(tmp_path)
    evaluate(options(run, **EASY), None)
    claim = "guaranteed if the rows are new to the checkpoint, which does not record the rows"
    assert claim in capsys.readouterr().out and claim_in(run).startswith(claim)
    config = run_directory.read_config(run)
    rows = [{"text": f"a film {number}", "label": "no"} for number in range(40)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.files.dev = "new.jsonl"
    evaluate(options(run, **EASY), config)
    assert claim_in(run).startswith(claim), "what trained the weights is still not known"
    assert isinstance(EarlyExitClassifier.from_pretrained(str(run)).criterion, MaxProbability)
