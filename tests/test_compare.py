"""Tests of `compare`: seeds are pooled, and groups are compared on the same rows."""

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
    """Write a run directory with the files of `evaluate`, and return its path.

    A higher `quality` gives a higher accuracy.
    """
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
    arrays = np.load(f"{path}/all_exit_logits.npz")
    return float((arrays["logits"][layer - 1].argmax(1) == arrays["labels"]).mean())


def write_two_runs(tmp_path):
    """Return two runs with equal logits whose configurations differ in the batch size."""
    paths = write_run(tmp_path / "first"), write_run(tmp_path / "second", batch_size=16)
    return [read_run(path) for path in paths]


@pytest.fixture
def runs(tmp_path):
    """Three seeds of a configuration, and two seeds of a configuration with a higher accuracy."""
    first = [write_run(tmp_path / f"a{seed}", seed) for seed in (0, 1, 2)]
    second = [write_run(tmp_path / f"b{seed}", seed, 2.0, learning_rate=1e-4) for seed in (3, 4)]
    return first, second


def test_runs_are_grouped_by_their_configuration_without_the_seed(runs):
    first, second = runs
    groups = grouped([read_run(path) for path in (*first, *second)])
    assert [group.name for group in groups] == ["learning_rate=2e-05", "learning_rate=0.0001"]
    assert [[run.path for run in group.runs] for group in groups] == [first, second]


def test_outcomes_have_the_median_over_seeds_and_the_difference_of_means(runs):
    first, second = runs
    groups = grouped([read_run(path) for path in (*first, *second)])
    first_outcomes, second_outcomes = compared(groups, [FixedLayer(2)], "accuracy")
    expected = [[accuracy_of(path, 2) for path in paths] for paths in runs]
    assert first_outcomes[0].scores == pytest.approx(expected[0])
    assert first_outcomes[0].median == pytest.approx(np.median(expected[0]))
    assert first_outcomes[0].difference is None
    difference = np.mean(expected[1]) - np.mean(expected[0])
    assert second_outcomes[0].difference == pytest.approx(difference)
    low, high = second_outcomes[0].interval
    assert 0 < low < difference < high


def test_the_interval_is_the_interval_of_the_paired_difference(tmp_path):
    """The normal approximation is expected; an unpaired interval is several times wider."""
    groups = grouped(write_two_runs(tmp_path))
    correct = groups[0].runs[0].logits[1].argmax(1) == groups[0].runs[0].labels
    worse = groups[1].runs[0].logits.copy()
    changed_rows = np.flatnonzero(correct)[:20]
    # The predictions of the two runs differ in 20 rows.
    worse[:, changed_rows] = worse[:, changed_rows, ::-1]
    worse_run = dataclasses.replace(groups[1].runs[0], logits=worse)
    _, (outcome,) = compared([groups[0], Group("b", [worse_run])], [FixedLayer(2)], "accuracy")
    share = 20 / ROWS
    error = np.sqrt(share * (1 - share) / ROWS)
    assert outcome.difference == pytest.approx(-share)
    np.testing.assert_allclose(
        outcome.interval, [-share - 1.96 * error, -share + 1.96 * error], atol=0.2 * error
    )


def test_runs_with_equal_logits_have_no_difference(tmp_path):
    groups = grouped(write_two_runs(tmp_path))
    _, outcomes = compared(groups, [Patience(0), Patience(1)], "accuracy")
    assert all(outcome.interval == (0, 0) and outcome.difference == 0 for outcome in outcomes)


def test_a_correlation_has_a_bootstrap_interval(tmp_path):
    runs = write_two_runs(tmp_path)
    random = np.random.default_rng(0)
    labels = random.normal(size=ROWS).astype(np.float32)
    close, far = (labels + noise * random.normal(size=(EXITS, ROWS)) for noise in (0.1, 1.0))
    regression_runs = [
        dataclasses.replace(run, labels=labels, logits=scores[..., None].astype(np.float32))
        for run, scores in zip(runs, (far, close), strict=True)
    ]
    _, (outcome,) = compared(grouped(regression_runs), [FixedLayer(1)], "pearson")
    assert 0.1 < outcome.interval[0] < outcome.difference < outcome.interval[1] < 0.5


def test_compare_prints_a_table_and_writes_a_csv_file_and_a_plot(runs, tmp_path, capsys):
    first, second = runs
    compare([*first, *second], [], "", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "learning_rate=0.0001 (2 runs)" in printed and "patience 2" in printed
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (EXITS - 1)
    assert float(lines[0]["accuracy"]) == np.median([accuracy_of(path, EXITS) for path in first])
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_are_input_errors(tmp_path):
    valid = write_run(tmp_path / "valid")
    invalid_runs = {
        "different values of task .* has sst2, .* has mrpc": write_run(
            tmp_path / "task", rows=ROWS
        ),
        "were evaluated on different rows": write_run(tmp_path / "rows", rows=ROWS - 1),
        "has not been evaluated: run pabee-jax evaluate": write_run(tmp_path / "new"),
        "results cannot be read": write_run(tmp_path / "broken"),
        "rows without labels": write_run(tmp_path / "hidden"),
        "has no train_config.json": write_run(tmp_path / "foreign"),
    }
    about = {"task": "mrpc", "split": "dev", "metrics": ["accuracy"]}
    (tmp_path / "task" / "results.json").write_text(json.dumps(about))
    (tmp_path / "new" / "all_exit_logits.npz").unlink()
    (tmp_path / "broken" / "all_exit_logits.npz").write_bytes(b"PK no archive")
    arrays = dict(np.load(tmp_path / "hidden" / "all_exit_logits.npz"))
    del arrays["labels"]
    np.savez(tmp_path / "hidden" / "all_exit_logits.npz", **arrays)
    (tmp_path / "foreign" / "train_config.json").unlink()
    for message, invalid in invalid_runs.items():
        with pytest.raises(InputError, match=message):
            compare([valid, invalid], [], "", tmp_path / "out")
    with pytest.raises(InputError, match="the same run is given twice"):
        compare([valid, valid], [], "", tmp_path / "out")
    with pytest.raises(InputError, match="--metric 'f1' is not one of the task's: accuracy"):
        compare([valid], [], "f1", tmp_path / "out")
    results = tmp_path / "rows" / "results.json"
    for content in ("[]", "3", '"x"', '{"metrics": "accuracy"}', '{"task": "sst2"}', "nonsense"):
        results.write_text(content)
        with pytest.raises(InputError, match="rows: its results cannot be read"):
            compare([str(tmp_path / "rows")], [], "", tmp_path / "out")
    shutil.rmtree(tmp_path / "rows")
    with pytest.raises(
        InputError, match="rows is not the directory of a run: it has no train_config.json"
    ):
        compare([str(tmp_path / "rows")], [], "", tmp_path / "out")
    assert not (tmp_path / "out").exists()


ODD_ARRAYS = {
    "two dimensions": {"logits": np.zeros((EXITS, ROWS), np.float32)},
    "no exits": {"logits": np.zeros((0, ROWS, 2), np.float32)},
    "integers": {"logits": np.zeros((EXITS, ROWS, 2), int)},
    "not finite": {"logits": np.full((EXITS, ROWS, 2), np.nan, np.float32)},
    "other rows": {"logits": np.zeros((EXITS, ROWS + 1, 2), np.float32)},
    "labels of other classes": {"labels": np.full(ROWS, 2)},
    "labels that are scores": {"labels": np.zeros(ROWS, np.float32)},
    "too few ids": {"ids": np.arange(ROWS - 1)},
    "texts": {"logits": np.full((EXITS, ROWS, 2), "x")},
}


@pytest.mark.parametrize("case", ODD_ARRAYS)
def test_odd_logits_are_an_input_error(case, tmp_path):
    run = write_run(tmp_path / "run")
    arrays = dict(np.load(tmp_path / "run" / "all_exit_logits.npz"))
    np.savez(tmp_path / "run" / "all_exit_logits.npz", **arrays | ODD_ARRAYS[case])
    with pytest.raises(InputError, match="its results cannot be read"):
        compare([run], [], "", tmp_path / "out")


def test_two_names_of_one_run_are_the_same_run(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for other in ("run/", "./run", "link", str(tmp_path / "run")):
        with pytest.raises(InputError, match="the same run is given twice"):
            compare(["run", other], [], "", tmp_path / "out")


def test_files_of_the_user_are_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.csv").write_text("the user's")
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"compare\.csv exists .* --overwrite"):
        compare([run], [], "", tmp_path / "out")
    compare([run], [], "", tmp_path / "out", overwrite=True)
    compare([run], [], "", tmp_path / "out")
