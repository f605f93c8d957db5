"""Runs beside each other: seeds are pooled, the rest is compared on the same rows."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from pabee_jax import InputError
from pabee_jax.analysis.comparison import Group, compared, grouped
from pabee_jax.commands.compare import compare, read_run
from pabee_jax.criteria import FixedLayer, Patience
from pabee_jax.training.config import TrainConfig

ROWS, EXITS = 300, 4


def write_run(folder, seed=0, quality=1.0, rows=ROWS, **fields):
    """What evaluate.py leaves in a run directory; a higher quality is right more often."""
    folder.mkdir(parents=True)
    config = TrainConfig(task="sst2", model="some/model", seed=seed, **fields)
    (folder / "train_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    about = {"task": config.task, "split": "dev", "metrics": ["accuracy"]}
    (folder / "results.json").write_text(json.dumps(about))
    labels = np.arange(rows) % 2
    noise = np.random.default_rng(seed).normal(size=(EXITS, rows, 2))
    evidence = quality * np.arange(1, EXITS + 1)[:, None, None] * np.eye(2)[labels]
    np.savez(
        folder / "all_exit_logits.npz",
        logits=(evidence + noise).astype(np.float32),
        ids=np.arange(rows).astype(str),
        labels=labels,
    )
    return str(folder)


def accuracy_of(path, layer):
    saved = np.load(f"{path}/all_exit_logits.npz")
    return float((saved["logits"][layer - 1].argmax(1) == saved["labels"]).mean())


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one configuration, two of another, better one."""
    first = [write_run(tmp_path / f"a{seed}", seed) for seed in (0, 1, 2)]
    second = [write_run(tmp_path / f"b{seed}", seed, 2.0, learning_rate=1e-4) for seed in (3, 4)]
    return first, second


def test_seeds_are_pooled_and_configurations_told_apart(runs):
    first, second = runs
    groups = grouped([read_run(path) for path in (*first, *second)])
    assert [group.name for group in groups] == ["learning_rate=2e-05", "learning_rate=0.0001"]
    assert [[run.path for run in group.runs] for group in groups] == [first, second]


def test_medians_and_differences(runs):
    first, second = runs
    groups = grouped([read_run(path) for path in (*first, *second)])
    ours, theirs = compared(groups, [FixedLayer(2)], "accuracy")
    expected = [[accuracy_of(path, 2) for path in paths] for paths in runs]
    assert ours[0].scores == pytest.approx(expected[0])
    assert ours[0].median == pytest.approx(np.median(expected[0]))
    assert ours[0].difference is None
    difference = np.mean(expected[1]) - np.mean(expected[0])
    assert theirs[0].difference == pytest.approx(difference)
    low, high = theirs[0].interval
    assert 0 < low < difference < high


def test_the_interval_is_that_of_the_paired_difference(tmp_path):
    """Against the normal approximation; an unpaired one would be several times wider."""
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", batch_size=16)
    groups = grouped([read_run(one), read_run(other)])
    right = groups[0].runs[0].logits[1].argmax(1) == groups[0].runs[0].labels
    worse = groups[1].runs[0].logits.copy()
    wrong = np.flatnonzero(right)[:20]
    worse[:, wrong] = worse[:, wrong, ::-1]  # The same answers but for 20 rows.
    changed = dataclasses.replace(groups[1].runs[0], logits=worse)
    _, (outcome,) = compared([groups[0], Group("b", [changed])], [FixedLayer(2)], "accuracy")
    share = 20 / ROWS
    error = np.sqrt(share * (1 - share) / ROWS)
    assert outcome.difference == pytest.approx(-share)
    np.testing.assert_allclose(
        outcome.interval, [-share - 1.96 * error, -share + 1.96 * error], atol=0.2 * error
    )


def test_a_run_equals_itself(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", batch_size=16)
    groups = grouped([read_run(one), read_run(other)])
    _, outcomes = compared(groups, [Patience(0), Patience(1)], "accuracy")
    assert all(outcome.interval == (0, 0) and outcome.difference == 0 for outcome in outcomes)


def test_correlations_are_resampled_too(tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", batch_size=16)
    runs = [read_run(one), read_run(other)]
    random = np.random.default_rng(0)
    labels = random.normal(size=ROWS).astype(np.float32)
    close, far = (labels + noise * random.normal(size=(EXITS, ROWS)) for noise in (0.1, 1.0))
    scored = [
        dataclasses.replace(run, labels=labels, logits=scores[..., None].astype(np.float32))
        for run, scores in zip(runs, (far, close), strict=True)
    ]
    _, (outcome,) = compared(grouped(scored), [FixedLayer(1)], "pearson")
    assert 0.1 < outcome.interval[0] < outcome.difference < outcome.interval[1] < 0.5


def test_leaves_a_table_and_a_picture(runs, tmp_path, capsys):
    first, second = runs
    compare([*first, *second], [], "", tmp_path / "out")
    said = capsys.readouterr().out
    assert "learning_rate=0.0001 (2 runs)" in said and "patience 2" in said
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (EXITS - 1)
    assert float(lines[0]["accuracy"]) == np.median([accuracy_of(path, EXITS) for path in first])
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_what_cannot_be_compared(tmp_path):
    one = write_run(tmp_path / "one")
    wrong = {
        "their task is sst2 and mrpc": write_run(tmp_path / "task", rows=ROWS),
        "not evaluated on the same rows": write_run(tmp_path / "rows", rows=ROWS - 1),
        "has not been evaluated: run pabee-jax evaluate": write_run(tmp_path / "new"),
        "results cannot be read": write_run(tmp_path / "broken"),
        "rows without labels": write_run(tmp_path / "hidden"),
        "has no train_config.json": write_run(tmp_path / "foreign"),
    }
    about = {"task": "mrpc", "split": "dev", "metrics": ["accuracy"]}
    (tmp_path / "task" / "results.json").write_text(json.dumps(about))
    (tmp_path / "new" / "all_exit_logits.npz").unlink()
    (tmp_path / "broken" / "all_exit_logits.npz").write_bytes(b"PK no archive")
    saved = dict(np.load(tmp_path / "hidden" / "all_exit_logits.npz"))
    np.savez(tmp_path / "hidden" / "all_exit_logits.npz", logits=saved["logits"], ids=saved["ids"])
    (tmp_path / "foreign" / "train_config.json").unlink()
    for message, other in wrong.items():
        with pytest.raises(InputError, match=message):
            compare([one, other], [], "", tmp_path / "out")
    with pytest.raises(InputError, match="the same run is given twice"):
        compare([one, one], [], "", tmp_path / "out")
    with pytest.raises(InputError, match="--metric 'f1' is not one of the task's: accuracy"):
        compare([one], [], "f1", tmp_path / "out")
    shutil.rmtree(tmp_path / "rows")
    with pytest.raises(InputError, match="rows has no"):
        compare([str(tmp_path / "rows")], [], "", tmp_path / "out")
    assert not (tmp_path / "out").exists()
