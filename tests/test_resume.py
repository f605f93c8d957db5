"""Killing a run, stopping it, or damaging what it saved changes nothing of how it ends."""

import errno
import resource
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest

from pabee_jax.errors import InputError
from pabee_jax.training import digests, log, loop
from pabee_jax.training.checkpoint import Checkpoints, SaveFailed
from pabee_jax.training.config import DistillConfig, MeshConfig, TrainConfig
from pabee_jax.training.loop import train
from pabee_jax.training.step import initial_state
from runs import (
    TOTAL_STEPS,
    Killed,
    contents,
    kept_steps,
    metrics_of,
    run_config,
    steps_logged,
    weights_of,
)

STEPS_TO_KILL = 90


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


@pytest.mark.slow
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


def test_a_line_that_a_kill_cut_short_is_not_in_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [line["step"] for line in log.read(tmp_path)] == [1, 2, 3]
    metrics = log.MetricsLog(tmp_path, step=2)
    metrics.write(3, {"loss": 0.5})
    metrics.close()
    assert log.read(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


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


def test_sigterm_saves_the_step_and_the_run_goes_on_from_it(
    finished, sources, tmp_path, monkeypatch
):
    training_batch, before = loop.training_batch, signal.getsignal(signal.SIGTERM)

    def batch_and_signal(*arguments, **options):
        if arguments[-1] + 1 == 7:  # Asked for while step 6 is under way.
            signal.raise_signal(signal.SIGTERM)
        return training_batch(*arguments, **options)

    monkeypatch.setattr(loop, "training_batch", batch_and_signal)
    with pytest.raises(SystemExit) as stopped:
        train(run_config(sources, save_every=4), tmp_path)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    (_, last) = kept_steps(tmp_path)
    assert last in (5, 6, 7), "the step that was under way, or the next one"
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    train(run_config(sources, save_every=4), tmp_path)
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    finished, sources, recording, tmp_path, caplog
):
    recording.kill_in_step = 7
    with pytest.raises(Killed):
        train(run_config(sources), tmp_path)
    recording.kill_in_step = None
    assert kept_steps(tmp_path) == [4, 6]
    folder = tmp_path / "checkpoints" / "6"
    largest = max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    train(run_config(sources), tmp_path)
    (warning,) = (record.message for record in caplog.records if "damaged" in record.message)
    assert f"{largest.relative_to(folder)} has other contents than were written" in warning
    assert str(folder) in warning and "damaged-6-1" in warning
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_digests_tell_every_damage(tmp_path):
    def folder(name):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "array").write_bytes(b"0123456789")
        digests.write(tmp_path / name)
        assert digests.problem(tmp_path / name) is None
        return tmp_path / name

    (folder("short") / "inner" / "array").write_bytes(b"01234567")
    assert digests.problem(tmp_path / "short") == "inner/array has 8 bytes instead of 10"
    (folder("flipped") / "inner" / "array").write_bytes(b"0123456788")
    assert "inner/array has other contents" in digests.problem(tmp_path / "flipped")
    (folder("gone") / "inner" / "array").unlink()
    assert digests.problem(tmp_path / "gone") == "inner/array is missing"
    for text in ("{", "[]", '{"inner/array": 1}', '{"inner/array": {}}'):
        (tmp_path / "gone" / "digests.json").write_text(text)
        assert digests.problem(tmp_path / "gone") == "digests.json cannot be read"


def test_a_checkpoint_without_digests_is_taken_to_be_good(finished, sources, recording, tmp_path):
    recording.kill_in_step = 7
    with pytest.raises(Killed):
        train(run_config(sources), tmp_path)
    recording.kill_in_step = None
    (tmp_path / "checkpoints" / "6" / "digests.json").unlink()
    train(run_config(sources), tmp_path)
    assert metrics_of(tmp_path) == metrics_of(finished)
    assert weights_of(tmp_path) == weights_of(finished)


def test_a_save_that_fails_ends_the_run_and_the_last_one_stays(sources, tmp_path, monkeypatch):
    write, calls = digests.write, []

    def full(folder):
        calls.append(folder)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder)

    monkeypatch.setattr(digests, "write", full)
    with pytest.raises(SaveFailed, match="No space left on device"):
        train(run_config(sources), tmp_path)
    assert {2, 4} & set(kept_steps(tmp_path))


def test_files_that_can_grow_no_more(finished, sources, tmp_path, monkeypatch):
    """The operating system refuses a real write of the third save, somewhere below orbax."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    def limited(self, state, score):
        if state.step != 6:
            return save(self, state, score)
        assert self.steps == [2, 4]
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        try:
            save(self, state, score)
            assert self.steps  # Waits for what is being saved.
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    monkeypatch.setattr(Checkpoints, "save", limited)
    with pytest.raises(SaveFailed, match="step 6 cannot .* too large; .* of step 4"):
        train(run_config(sources), tmp_path)
    monkeypatch.undo()
    train(run_config(sources), tmp_path)
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)


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


def kill_when(process, workdir, moment):
    """Kills the process as soon as `moment()` is true."""
    while not moment():
        assert process.poll() is None, workdir.with_suffix(".log").read_text()
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (workdir / "model.safetensors").exists()


def is_saving(workdir):
    return any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))


def assert_ends_like(undisturbed, program, workdir):
    process = program(workdir)
    assert process.wait() == 0, workdir.with_suffix(".log").read_text()
    assert weights_of(workdir) == weights_of(undisturbed)
    assert metrics_of(workdir) == metrics_of(undisturbed)
    assert kept_steps(workdir) == kept_steps(undisturbed)


@pytest.mark.slow
def test_a_real_sigterm(program, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = program(workdir)
    while steps_logged(workdir) < 22:
        assert process.poll() is None, workdir.with_suffix(".log").read_text()
        time.sleep(0.001)
    process.terminate()
    assert process.wait() == 143
    message = workdir.with_suffix(".log").read_text()
    assert f"stopped by SIGTERM; step {kept_steps(workdir)[-1]} of 90 is saved" in message
    assert_ends_like(undisturbed, program, workdir)


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
