"""The fastest setting within one standard error of full depth, and its place in a finished run."""

import json

import numpy as np
import pytest

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier, Patience
from pabee_jax.analysis.selection import fastest_within_one_standard_error
from pabee_jax.training.run import train
from pabee_jax.training.select_exit import select_exit
from runs import WORDS, run_config

SETTINGS = [Patience(patience) for patience in (3, 2, 1)]


def logits_of(predictions):
    """Logits of two classes for (exits, rows) predicted classes."""
    return np.float32(4 * np.eye(2)[np.asarray(predictions)] - 2)


def select(predictions, labels):
    return fastest_within_one_standard_error(
        SETTINGS, logits_of(predictions), np.asarray(labels), "accuracy"
    )


def test_exits_that_answer_like_full_depth_are_used_as_early_as_possible():
    labels = np.arange(200) % 2
    selection = select([labels] * 5, labels)
    assert selection.setting == Patience(1) and selection.mean_exit_layer == 2
    assert (selection.score, selection.full_depth, selection.standard_error) == (1, 1, 0)


@pytest.mark.parametrize(("wrong", "expected"), [(11, Patience(1)), (46, Patience(2))])
def test_a_setting_may_lose_one_standard_error(wrong, expected):
    """Exits 1 and 2 correct 10 of 400 rows that full depth gets wrong, and spoil `wrong` others.

    So patience 1 loses (wrong - 10) / 400, with a standard error of about sqrt(wrong + 10) / 400: 1
    of 4.6 rows, or 36 of 7.5 rows. Patience 2 waits for the exits that answer like full depth.
    """
    labels = np.zeros(400, int)
    early, late = labels.copy(), labels.copy()
    late[:10], early[10 : 10 + wrong] = 1, 1
    selection = select([early, early, late, late, late], labels)
    assert selection.setting == expected
    if wrong == 11:
        assert selection.full_depth - selection.score == pytest.approx(1 / 400)
        assert selection.standard_error == pytest.approx(np.sqrt(21) / 400, rel=0.2)


def test_no_setting_qualifies_if_only_the_last_exit_has_learned():
    labels = np.arange(400) % 2
    constant = np.zeros_like(labels)
    assert select([constant] * 4 + [labels], labels) is None


def test_the_table_shows_rows_that_did_not_select_the_setting():
    said, labels = [], np.arange(500) % 2
    assert select_exit(logits_of([labels] * 4), labels, ["accuracy"], said.append) == Patience(1)
    assert "dev, 250 rows" in said[0] and "on 250 other dev rows" in said[1]


def test_scores_select_a_patience_with_its_threshold():
    labels = np.linspace(0, 5, 60, dtype=np.float32)
    logits = np.stack([labels + 1, labels, labels, labels])[:, :, None]
    setting = select_exit(logits, labels, ["pearson"], lambda message: None)
    assert setting is not None and setting.patience >= 1 and setting.regression_threshold > 0


@pytest.mark.slow
def test_a_finished_run_exits_early_by_itself(sources, tmp_path):
    model = tiny_checkpoint(tmp_path / "m", WORDS, num_hidden_layers=4, initializer_range=0.3)
    train(run_config(sources, model=str(model)), tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["early_exit"]
    classifier = EarlyExitClassifier.from_pretrained(str(tmp_path / "run"))
    assert classifier.criterion == Patience(stored["patience"])
    assert repr(classifier.criterion) in repr(classifier)
    assert classifier.predict(WORDS).exit_layers.mean() < 4


@pytest.mark.slow
def test_a_run_that_trains_the_last_exit_only_selects_none(sources, tmp_path):
    config = run_config(sources, max_steps=2)
    config.loss.weights = "last"
    train(config, tmp_path / "run")
    assert "early_exit" not in json.loads((tmp_path / "run" / "config.json").read_text())
