"""Whole training runs: what they leave behind, and that killing one changes nothing."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_batch, tiny_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file

from pabee_jax import weights
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.errors import InputError
from pabee_jax.parameters import merge, split, stacked, unstacked
from pabee_jax.pretrained import load_pretrained
from pabee_jax.training import log, loop, run_directory
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import DistillConfig, FilesConfig, MeshConfig, TrainConfig
from pabee_jax.training.loop import TrainingDiverged, train
from pabee_jax.training.step import initial_state

REPOSITORY = Path(__file__).parents[1]
WORDS = ["good", "fine", "great", "fair", "bright", "poor", "bad", "dull", "weak", "bleak"]
TOTAL_STEPS = 12


class Killed(BaseException):
    """Not an Exception: like a signal, nothing in the program may catch it."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A pretrained encoder and data files, 6 batches of 10: the first five words say "yes"."""
    folder = tmp_path_factory.mktemp("sources")
    # A wide initialisation, so that twelve steps suffice to learn something.
    tiny_checkpoint(folder / "model", WORDS, initializer_range=0.3)
    random = np.random.default_rng(0)
    for name, rows in (("train", 58), ("dev", 23)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in range(rows):
                label = row % 2
                words = random.choice(WORDS[:5] if label else WORDS[5:], random.integers(1, 6))
                writer.writerow([" ".join(words), ["no", "yes"][label]])
    return folder


def run_config(sources, **overrides):
    values = {
        "task": "files",
        "model": str(sources / "model"),
        "data_dir": str(sources),
        "files": FilesConfig(train="train.csv", dev="dev.csv"),
        "max_seq_length": 8,
        "batch_size": 10,
        "learning_rate": 3e-3,
        "num_epochs": 2,
        "eval_every": 4,
        "save_every": 2,
        "seed": 3,
        "mesh": MeshConfig(data=1),
    }
    return TrainConfig(**values | overrides)


@dataclasses.dataclass
class Recording:
    """What happens in a run, seen from outside.

    Attributes:
        saved: the parameters in each checkpoint by step, copied when they were saved.
        kill_in_step: the number of the step in which the run dies.
    """

    saved: dict = dataclasses.field(default_factory=dict)
    kill_in_step: int | None = None


@pytest.fixture
def recording(monkeypatch):
    recording = Recording()
    save, training_batch = Checkpoints.save, loop.training_batch

    def recorded_save(self, state, score):
        recording.saved[int(state.step)] = jax.device_get(state.parameters)
        save(self, state, score)

    def deadly_batch(*arguments, **options):
        if arguments[-1] + 1 == recording.kill_in_step:
            raise Killed
        return training_batch(*arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", recorded_save)
    monkeypatch.setattr(loop, "training_batch", deadly_batch)
    return recording


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(run_config(sources), workdir)
    return workdir


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights_of(workdir):
    return (workdir / "model.safetensors").read_bytes()


def kept_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def contents(workdir):
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file()
    }


def tensors_from(sources, parameters):
    """A recorded state's parameters as a checkpoint would name them."""
    start = load_pretrained(str(sources / "model"), num_labels=2).model
    return weights.to_tensors(unstacked(merge(split(stacked(start))[0], parameters)))


def assert_same_weights(workdir, tensors):
    ours = load_file(workdir / "model.safetensors")
    assert ours.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_a_finished_run_directory_is_a_checkpoint(finished, sources):
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
    assert evaluations[-1]["dev"]["accuracy"][-1] > 0.8, "the run learns nothing"


def test_the_finished_run_gives_the_logits_of_the_trained_parameters(
    finished, sources, recording, tmp_path
):
    """Also: the same run elsewhere ends with the same bytes."""
    train(run_config(sources), tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(finished)
    assert_same_weights(finished, tensors_from(sources, recording.saved[TOTAL_STEPS]))
    batch = random_batch(4, 8)
    batch["input_ids"] %= len(WORDS)
    start = load_pretrained(str(sources / "model"), num_labels=2).model
    parameters = jax.device_put(recording.saved[TOTAL_STEPS])
    trained = merge(split(stacked(start))[0], parameters)
    ours = all_exit_logits(load_pretrained(str(finished)).model, batch)
    np.testing.assert_allclose(ours, all_exit_logits(trained, batch), atol=1e-5)
    assert jnp.abs(ours - all_exit_logits(start, batch)).max() > 0.1


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    finished, sources, recording, tmp_path
):
    # Before the first checkpoint, between two, and in the last step.
    for step in (2, 6, 12):
        recording.kill_in_step = step
        with pytest.raises(Killed):
            train(run_config(sources), tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        logged = [line["step"] for line in metrics_of(tmp_path) if "loss" in line]
        assert logged == list(range(1, len(logged) + 1))
    recording.kill_in_step = None
    train(run_config(sources), tmp_path)
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)
    assert kept_steps(tmp_path) == kept_steps(finished)
    assert (tmp_path / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def test_a_run_of_two_stages_goes_on_in_either(sources, recording, tmp_path):
    """The phase is a function of the step; with all else that a run can be told."""
    config = run_config(
        sources,
        strategy="two_stage",
        pooler="per_exit",
        pooling="mean",
        classifier_bias="prior",
        order="length_grouped",
        distill=DistillConfig(weight=0.5, temperature=2.0),
    )
    train(config, tmp_path / "undisturbed")
    for step in (4, 10):
        recording.kill_in_step = step
        with pytest.raises(Killed):
            train(config, tmp_path / "killed")
    recording.kill_in_step = None
    train(config, tmp_path / "killed")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "undisturbed")
    first, last = recording.saved[6], recording.saved[TOTAL_STEPS]
    for name, value in first.items():
        own = name.startswith(("classifiers.", "pooler."))
        same = value == last[name]
        assert same[-1:].all(), f"{name} of the last exit changed in the second stage"
        assert not same[:-1].all() if own else same.all(), f"{name} in the second stage"
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(strategy="two_stage"), "'two_stage', but the model has one layer"),
        (dict(pooling="max"), "config.pooling is 'max'; it must be one of cls, mean"),
    ],
)
def test_ways_of_training_that_a_model_cannot_be_trained_in(sources, tmp_path, fields, message):
    tiny_checkpoint(tmp_path / "model", WORDS, num_hidden_layers=1)
    config = run_config(sources, model=str(tmp_path / "model"), **fields)
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_layer(sources, tmp_path):
    """Its early exits are none at all."""
    tiny_checkpoint(tmp_path / "model", WORDS, num_hidden_layers=1)
    train(run_config(sources, model=str(tmp_path / "model"), max_steps=2), tmp_path / "run")
    assert load_pretrained(str(tmp_path / "run")).model.config.num_hidden_layers == 1


def test_a_temperature_softens_no_score(sources, tmp_path):
    (tmp_path / "scores.csv").write_text("text,label\ngood,1.5\nbad,0.5\n")
    files = FilesConfig(train="scores.csv", dev="scores.csv", regression=True)
    distill = DistillConfig(weight=1.0, temperature=2.0)
    config = run_config(sources, data_dir=str(tmp_path), files=files, distill=distill)
    with pytest.raises(InputError, match="a regression: there is nothing to soften"):
        train(config, tmp_path / "run")


def test_new_classifiers_start_at_the_mean_score(sources, tmp_path):
    (tmp_path / "scores.csv").write_text("text,label\ngood,4.5\nbad,0.5\nfair,4\n")
    files = FilesConfig(train="scores.csv", dev="scores.csv", regression=True)
    config = run_config(
        sources, data_dir=str(tmp_path), files=files, classifier_bias="prior", max_steps=1
    )
    train(dataclasses.replace(config, learning_rate=1e-12), tmp_path / "run")
    biases = load_pretrained(str(tmp_path / "run")).model.classifiers.bias[...]
    np.testing.assert_allclose(biases, 3.0, atol=1e-6)


def test_a_line_that_a_kill_cut_short_is_not_in_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [line["step"] for line in log.read(path)] == [1, 2, 3]
    metrics = log.MetricsLog(path, tmp_path / "tensorboard", step=2)
    metrics.write(3, {"loss": 0.5})
    metrics.close()
    assert log.read(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_starting_a_finished_run_again_changes_nothing(finished, sources):
    before = contents(finished)
    train(run_config(sources), finished)
    after = contents(finished)
    for name in ("model.safetensors", "config.json", "train_config.json", "metrics.jsonl"):
        assert after[name] == before[name], name


def test_a_run_goes_on_with_another_number_of_devices(finished, sources, recording, tmp_path):
    recording.kill_in_step = 7
    with pytest.raises(Killed):
        train(run_config(sources), tmp_path)
    recording.kill_in_step = None
    train(run_config(sources, mesh=MeshConfig(data=2)), tmp_path)
    one, two = metrics_of(finished), metrics_of(tmp_path)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    losses, expected = ([line["loss"] for line in lines if "loss" in line] for lines in (two, one))
    assert losses[:6] == expected[:6]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_another_config_is_refused_and_nothing_changes(finished, sources):
    before = contents(finished)
    with pytest.raises(InputError, match="learning_rate is 0.003 there and 0.5 here"):
        train(run_config(sources, learning_rate=0.5), finished)
    assert contents(finished) == before


def test_files_that_are_not_a_runs_are_left_alone(sources, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=str(tmp_path)):
            train(run_config(sources), tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_run_killed_in_its_first_moment_or_while_clearing_may_start_again(sources, tmp_path):
    config = run_config(sources)
    (tmp_path / ".train_config.json.tmp").write_text("{")
    run_directory.check(tmp_path, config, overwrite=False)
    run_directory.prepare(tmp_path, config, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {"train_config.json"}
    # The removal takes this file last, so one that was cut short is still a run's folder.
    assert run_directory._OWN_FILES[-1] == "train_config.json"
    run_directory.check(tmp_path, config, overwrite=True)


def test_overwrite_replaces_the_run(sources, finished, recording, tmp_path):
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
    training_batch = loop.training_batch

    def without_rows(*arguments, **options):
        batch = training_batch(*arguments, **options)
        if arguments[-1] + 1 == 6:
            batch["valid"] = np.zeros_like(batch["valid"])  # The mean of no rows is 0 / 0.
        return batch

    monkeypatch.setattr(loop, "training_batch", without_rows)
    good = tmp_path / "checkpoints" / "4"
    with pytest.raises(TrainingDiverged, match=rf"step 6 .*last good checkpoint is {good}\b"):
        train(run_config(sources), tmp_path)
    assert kept_steps(tmp_path) == [2, 4]
    assert not (tmp_path / "model.safetensors").exists()
    assert [line["step"] for line in metrics_of(tmp_path) if "loss" in line] == [1, 2, 3, 4, 5]


def test_export_best_leaves_the_best_steps_parameters(sources, recording, tmp_path):
    # On dev the words say the opposite: the more the run learns, the worse it gets.
    text = (sources / "dev.csv").read_text()
    swapped = text.replace(",no", ",?").replace(",yes", ",no").replace(",?", ",yes")
    (sources / "swapped.csv").write_text(swapped)
    files = FilesConfig(train="train.csv", dev="swapped.csv")
    train(run_config(sources, files=files, export="best", save_every=4), tmp_path)
    scores = {
        line["step"]: line["dev"]["accuracy"][-1] for line in metrics_of(tmp_path) if "dev" in line
    }
    best = max(scores, key=lambda step: (scores[step], step))
    assert best < TOTAL_STEPS, "the test's own data no longer do what they should"
    assert_same_weights(tmp_path, tensors_from(sources, recording.saved[best]))


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    def state(step):
        kernel = jnp.full((2, 3), step, jnp.float32)
        parameters = {"layer.kernel": jnp.full(3, step, jnp.float32), "classifiers.kernel": kernel}
        return initial_state(parameters, TrainConfig())._replace(step=jnp.int32(step))

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest is None and checkpoints.best is None
    # The later of two equals is the best; NaN (a correlation of constants) never is.
    scores = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: None, 6: 0.7, 7: 0.8}
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [3, 4, 5], 6: [3, 5, 6], 7: [3, 6, 7]}
    for step, score in scores.items():
        checkpoints.save(state(step), score)
        assert checkpoints.latest == step
        assert kept_steps(tmp_path) == checkpoints.steps == kept[step]
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.best == 3 and again.latest == 7
    assert again.parameters(3, state(0).parameters)["layer.kernel"].tolist() == [3, 3, 3]
    restored = again.restore(7, state(0))
    assert int(restored.step) == 7
    assert restored.parameters["layer.kernel"].tolist() == [7, 7, 7]
    with pytest.raises(InputError, match="step 7 in .* does not hold the arrays"):
        again.parameters(7, {"other.kernel": jnp.zeros(3)})
    with pytest.raises(InputError, match="begin again with --overwrite"):
        again.parameters(7, {"layer.kernel": jnp.zeros(4)})
    again.close()


# Real processes and SIGKILL from here on.

STEPS_TO_KILL = 90


@pytest.fixture(scope="module")
def program(sources, compilation_cache, tmp_path_factory):
    """Starts `train.py` in a directory; the run saves often and uses two sequence buckets."""
    config = run_config(sources, max_seq_length=16, num_epochs=15, eval_every=6, save_every=3)
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(
        "from pabee_jax.training.config import *\n\n\n"
        f"def get_config() -> TrainConfig:\n    return {config!r}\n"
    )
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": compilation_cache}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(workdir):
        command = [sys.executable, "train.py", "--config", str(path), "--workdir", str(workdir)]
        with workdir.with_suffix(".log").open("a") as output:
            return subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    return start


@pytest.fixture(scope="module")
def undisturbed(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert program(workdir).wait() == 0, workdir.with_suffix(".log").read_text()
    return workdir


def kill_when(process, workdir, moment):
    """Kills the process as soon as `moment()` is true."""
    while not moment():
        assert process.poll() is None, workdir.with_suffix(".log").read_text()
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (workdir / "model.safetensors").exists()


def steps_logged(workdir):
    try:
        return sum('"loss"' in line for line in (workdir / "metrics.jsonl").open())
    except FileNotFoundError:
        return 0


def is_saving(workdir):
    return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))


def assert_ends_like(undisturbed, program, workdir):
    process = program(workdir)
    assert process.wait() == 0, workdir.with_suffix(".log").read_text()
    assert weights_of(workdir) == weights_of(undisturbed)
    assert metrics_of(workdir) == metrics_of(undisturbed)
    assert kept_steps(workdir) == kept_steps(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first step", "middle of an epoch", "while saving"])
def test_sigkill_and_restart(program, undisturbed, moment, tmp_path):
    workdir = tmp_path / "run"
    process = program(workdir)
    moments = {
        "first step": lambda: steps_logged(workdir) >= 1,
        "middle of an epoch": lambda: steps_logged(workdir) >= 22,
        "while saving": lambda: steps_logged(workdir) >= 12 and is_saving(workdir),
    }
    kill_when(process, workdir, moments[moment])
    assert 1 <= steps_logged(workdir) < STEPS_TO_KILL
    assert_ends_like(undisturbed, program, workdir)


@pytest.mark.slow
def test_sigkill_again_and_again_while_saving(program, undisturbed, tmp_path):
    """Each time a little later after a save began: in its writing, its rename, its clean-up."""
    workdir = tmp_path / "run"
    for delay in (0.0, 0.01, 0.02, 0.04, 0.06, 0.1):
        process = program(workdir)
        before = steps_logged(workdir)

        def moment(before=before):
            return steps_logged(workdir) > before + 3 and is_saving(workdir)

        def late_moment(moment=moment, delay=delay):
            return moment() and time.sleep(delay) is None

        kill_when(process, workdir, late_moment)
    assert_ends_like(undisturbed, program, workdir)
