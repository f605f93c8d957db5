"""Whole training runs: the files that a run writes, and the runs that are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from helpers import random_batch, tiny_checkpoint
from pabee_jax.checkpoints.names import to_tensors
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.data.config import FilesConfig
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.errors import InputError
from pabee_jax.models.parameters import merge, split, stacked, unstacked
from pabee_jax.training import run, run_directory
from pabee_jax.training.config import DistillConfig, SampleWeightsConfig
from pabee_jax.training.run import TrainingDiverged, train
from runs import (
    TOTAL_STEPS,
    WORDS,
    Killed,
    contents,
    kept_steps,
    metrics_of,
    run_config,
    weights_of,
)


def tensors_from(sources, parameters):
    """Return the parameters of a recorded state, named as in a Hugging Face checkpoint."""
    start = load_pretrained(str(sources / "model"), num_labels=2).model
    return to_tensors(unstacked(merge(split(stacked(start))[0], parameters)))


def assert_same_weights(workdir, tensors):
    exported = load_file(workdir / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_a_finished_run_directory_is_a_hugging_face_style_checkpoint(finished, sources):
    expected = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
        "train_config.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert expected <= {path.name for path in finished.iterdir()}
    with safe_open(finished / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    pretrained = load_pretrained(str(finished))
    assert pretrained.label_names == ("no", "yes")
    assert pretrained.max_length == 8
    source = (sources / "model" / "vocab.txt").read_text().split()
    assert (finished / "vocab.txt").read_text().split() == source
    text = ["good but weak, and DULL"]
    ids = pretrained.encode(text, None).input_ids
    assert ids[0].tolist() == [2, 5, 1, 13, 1, 1, 12, 3]


def test_the_log_has_every_step_once_and_the_evaluations(finished):
    lines = metrics_of(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, TOTAL_STEPS + 1))
    assert all(len(line["exit_losses"]) == 2 for line in steps)
    evaluations = [line for line in lines if "dev" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert all(len(line["dev"]["accuracy"]) == 2 for line in evaluations)
    assert len(steps) + len(evaluations) == len(lines)
    text = (finished / "metrics.jsonl").read_text().splitlines()
    speeds = [line["speed"] for line in map(json.loads, text) if "speed" in line]
    assert speeds and all(speed["tokens_per_second"] > 0 for speed in speeds)
    assert "flop_utilisation" not in speeds[0], (
        "the peak of a CPU is unknown, so the log must not have flop_utilisation"
    )
    assert evaluations[-1]["dev"]["accuracy"][-1] > 0.8, "the run must learn its training data"


def test_the_finished_run_gives_the_logits_of_the_trained_parameters(
    finished, sources, recording, tmp_path
):
    """In addition, the same run in another directory exports the same bytes."""
    train(run_config(sources), tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(finished)
    assert_same_weights(finished, tensors_from(sources, recording.saved[TOTAL_STEPS]))
    batch = random_batch(4, 8)
    batch["input_ids"] %= len(WORDS)
    start = load_pretrained(str(sources / "model"), num_labels=2).model
    parameters = jax.device_put(recording.saved[TOTAL_STEPS])
    trained = merge(split(stacked(start))[0], parameters)
    logits = all_exit_logits(load_pretrained(str(finished)).model, batch)
    np.testing.assert_allclose(logits, all_exit_logits(trained, batch), atol=1e-5)
    assert jnp.abs(logits - all_exit_logits(start, batch)).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(strategy="two_stage"), "'two_stage', but the model has one layer"),
        (dict(pooling="max"), "config.pooling is 'max'; it must be one of cls, mean"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(sources, tmp_path, fields, message):
    tiny_checkpoint(tmp_path / "model", WORDS, num_hidden_layers=1)
    config = run_config(sources, model=str(tmp_path / "model"), **fields)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_of_one_layer_without_early_exits_can_be_trained(sources, tmp_path):
    tiny_checkpoint(tmp_path / "model", WORDS, num_hidden_layers=1)
    train(run_config(sources, model=str(tmp_path / "model"), max_steps=2), tmp_path / "run")
    assert load_pretrained(str(tmp_path / "run")).model.config.num_hidden_layers == 1


def test_a_distillation_temperature_is_refused_for_regression(sources, tmp_path):
    (tmp_path / "scores.csv").write_text("text,label\ngood,1.5\nbad,0.5\n")
    files = FilesConfig(train="scores.csv", dev="scores.csv", regression=True)
    distill = DistillConfig(weight=1.0, temperature=2.0)
    config = run_config(sources, data_dir=str(tmp_path), files=files, distill=distill)
    with pytest.raises(InputError, match="a regression task, whose scores have no temperature"):
        train(config, tmp_path / "run")


def test_sample_weights_are_refused_for_regression(sources, tmp_path):
    (tmp_path / "scores.csv").write_text("text,label\ngood,1.5\nbad,0.5\n")
    files = FilesConfig(train="scores.csv", dev="scores.csv", regression=True)
    for weights in (SampleWeightsConfig(decay=1.0), SampleWeightsConfig(calibration=1.0)):
        config = run_config(sources, data_dir=str(tmp_path), files=files, sample_weights=weights)
        with pytest.raises(InputError, match="config.sample_weights is for classification"):
            train(config, tmp_path / "run")


@pytest.mark.slow
def test_prior_bias_of_a_regression_is_the_mean_score(sources, tmp_path):
    (tmp_path / "scores.csv").write_text("text,label\ngood,4.5\nbad,0.5\nfair,4\n")
    files = FilesConfig(train="scores.csv", dev="scores.csv", regression=True)
    config = run_config(
        sources, data_dir=str(tmp_path), files=files, classifier_bias="prior", max_steps=1
    )
    train(dataclasses.replace(config, learning_rate=1e-12), tmp_path / "run")
    biases = load_pretrained(str(tmp_path / "run")).model.classifiers.bias[...]
    np.testing.assert_allclose(biases, 3.0, atol=1e-6)


def test_another_config_is_refused_and_nothing_changes(finished, sources):
    before = contents(finished)
    with pytest.raises(InputError, match="learning_rate is 0.003 in that run and 0.5 in this run"):
        train(run_config(sources, learning_rate=0.5), finished)
    assert contents(finished) == before


def test_a_directory_with_files_of_no_run_is_refused_and_does_not_change(sources, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=str(tmp_path)):
            train(run_config(sources), tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_run_killed_while_writing_its_config_or_clearing_can_start_again(sources, tmp_path):
    config = run_config(sources)
    (tmp_path / ".train_config.json.tmp").write_text("{")
    run_directory.check(tmp_path, config, overwrite=False)
    run_directory.prepare(tmp_path, config, {}, overwrite=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train_config.json", "train_inputs.json"}
    # --overwrite removes this file last, so that a directory is still a run directory after an
    # interrupted removal.
    assert run_directory._OWN_FILES[-1] == "train_config.json"
    run_directory.check(tmp_path, config, overwrite=True)


def test_overwrite_replaces_the_run_and_removes_no_other_file(
    sources, finished, recording, tmp_path
):
    recording.kill_in_step = 4
    with pytest.raises(Killed):
        train(run_config(sources, eval_every=2), tmp_path)
    assert kept_steps(tmp_path) == [2]
    (tmp_path / "thesis.txt").write_text("years of work")
    recording.kill_in_step = None
    train(run_config(sources), tmp_path, overwrite=True)
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_loss_that_is_not_finite_stops_the_run(sources, tmp_path, monkeypatch):
    training_batch = run.training_batch

    def batch_without_valid_rows(*arguments, **options):
        batch = training_batch(*arguments, **options)
        if arguments[-1] + 1 == 6:
            batch["valid"] = np.zeros_like(batch["valid"])  # The mean of no rows is 0 / 0.
        return batch

    monkeypatch.setattr(run, "training_batch", batch_without_valid_rows)
    good = tmp_path / "checkpoints" / "4"
    with pytest.raises(
        TrainingDiverged, match=rf"step 6: the loss .*last good checkpoint is {good}\b"
    ):
        train(run_config(sources), tmp_path)
    assert kept_steps(tmp_path) == [2, 4]
    assert not (tmp_path / "model.safetensors").exists()
    assert [line["step"] for line in metrics_of(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]


def test_parameters_that_are_not_finite_are_not_saved(sources, tmp_path, monkeypatch):
    def finite_twice(parameters):
        finite_twice.calls += 1
        return finite_twice.calls < 3

    finite_twice.calls = 0
    monkeypatch.setattr(run, "all_finite", finite_twice)
    good = tmp_path / "checkpoints" / "4"
    with pytest.raises(TrainingDiverged, match=rf"step 6: the new parameters .* is {good}\b"):
        train(run_config(sources), tmp_path)
    assert kept_steps(tmp_path) == [2, 4]


def test_a_learning_rate_that_overflows_stops_before_the_first_checkpoint(sources, tmp_path):
    with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
        train(run_config(sources, learning_rate=1e38, max_grad_norm=0.0), tmp_path)
    assert kept_steps(tmp_path) == []


@pytest.mark.slow
def test_export_best_exports_the_parameters_of_the_best_step(sources, recording, tmp_path):
    # The labels of dev are swapped: the more the run learns, the lower the accuracy.
    text = (sources / "dev.csv").read_text()
    swapped = text.replace(",no", ",?").replace(",yes", ",no").replace(",?", ",yes")
    (sources / "swapped.csv").write_text(swapped)
    files = FilesConfig(train="train.csv", dev="swapped.csv")
    train(run_config(sources, files=files, export="best", save_every=4), tmp_path)
    scores = {
        line["step"]: line["dev"]["accuracy"][-1] for line in metrics_of(tmp_path) if "dev" in line
    }
    best = max(scores, key=lambda step: (scores[step], step))
    assert best < TOTAL_STEPS, (
        "the accuracy on swapped labels must fall during training: adjust the data of this test"
    )
    assert_same_weights(tmp_path, tensors_from(sources, recording.saved[best]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_epochs": 1e308}, "num_epochs is 1e\\+308, which makes more than 2147483647 steps"),
        ({"max_steps": 10**10}, "max_steps is 10000000000; it must be at most 2147483647"),
        ({"warmup_steps": 10**10}, "warmup_steps is 10000000000; it must be at most"),
    ],
)
def test_more_steps_than_fit_into_int32_are_refused(sources, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train(run_config(sources, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
