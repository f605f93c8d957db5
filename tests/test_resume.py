"""A run that was killed, stopped or damaged resumes and ends with the same results."""

import errno
import resource
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from pabee_jax import Patience
from pabee_jax.checkpoints.saving import save_criterion
from pabee_jax.errors import InputError
from pabee_jax.training import digests, log, run, run_directory
from pabee_jax.training.checkpoint import Checkpoints, SaveFailed
from pabee_jax.training.config import DistillConfig, MeshConfig, TrainConfig
from pabee_jax.training.run import train
from pabee_jax.training.step import initial_state
from runs import (
    TOTAL_STEPS,
    Killed,
    contents,
    kept_steps,
    metrics_of,
    run_config,
    steps_logged,
    train_until_killed,
    weights_of,
)

STEPS_TO_KILL = 90


def test_a_killed_run_resumes_and_ends_like_an_undisturbed_run(
    finished, sources, recording, tmp_path
):
    # Before the first checkpoint, between two checkpoints, and in the last step.
    for step in (2, 6, 12):
        recording.kill_in_step = step
        with pytest.raises(Killed):
            train(run_config(sources), tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        logged_steps = [line["step"] for line in metrics_of(tmp_path) if "loss" in line]
        assert logged_steps == list(range(1, len(logged_steps) + 1))
    recording.kill_in_step = None
    train(run_config(sources), tmp_path)
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)
    assert kept_steps(tmp_path) == kept_steps(finished)
    assert (tmp_path / "config.json").read_bytes() == (finished / "config.json").read_bytes()


@pytest.mark.slow
def test_a_two_stage_run_resumes_in_either_stage(sources, recording, tmp_path):
    """The run also has most other settings of training that are not the default."""
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
    second_stage_start, end = recording.saved[6], recording.saved[TOTAL_STEPS]
    for name, value in second_stage_start.items():
        belongs_to_exits = name.startswith(("classifiers.", "pooler."))
        same = value == end[name]
        assert same[-1:].all(), f"the second stage must not change {name} of the last exit"
        if belongs_to_exits:
            assert not same[:-1].all(), f"the second stage must train {name} of the early exits"
        else:
            assert same.all(), f"the second stage must not change {name}"
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "undisturbed")


def test_an_incomplete_last_line_is_not_in_the_log(tmp_path):
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


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_devices(finished, sources, recording, tmp_path):
    train_until_killed(run_config(sources), tmp_path, recording, 7)
    train(run_config(sources, mesh=MeshConfig(data=2)), tmp_path)
    lines, expected_lines = metrics_of(tmp_path), metrics_of(finished)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    losses = [line["loss"] for line in lines if "loss" in line]
    expected = [line["loss"] for line in expected_lines if "loss" in line]
    assert losses[:6] == expected[:6]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_sigterm_saves_the_step_and_the_run_resumes_from_the_step(
    finished, sources, tmp_path, monkeypatch
):
    training_batch, previous_handler = run.training_batch, signal.getsignal(signal.SIGTERM)

    def batch_and_signal(*arguments, **options):
        if arguments[-1] + 1 == 7:  # Batch 7 is assembled while step 6 runs.
            signal.raise_signal(signal.SIGTERM)
        return training_batch(*arguments, **options)

    monkeypatch.setattr(run, "training_batch", batch_and_signal)
    with pytest.raises(SystemExit) as stopped:
        train(run_config(sources, save_every=4), tmp_path)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == previous_handler
    (_, last) = kept_steps(tmp_path)
    assert last in (5, 6, 7), "the run must save the running step or the next step"
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    train(run_config(sources, save_every=4), tmp_path)
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_damaged_checkpoint_is_renamed_and_the_previous_one_is_restored(
    finished, sources, recording, tmp_path, caplog
):
    train_until_killed(run_config(sources), tmp_path, recording, 7)
    assert kept_steps(tmp_path) == [4, 6]
    folder = tmp_path / "checkpoints" / "6"
    largest = max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    train(run_config(sources), tmp_path)
    (warning,) = (record.message for record in caplog.records if "damaged" in record.message)
    assert f"{largest.relative_to(folder)} changed after it was written" in warning
    assert str(folder) in warning and "damaged-6-1" in warning
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_digests_detect_truncated_changed_and_missing_files(tmp_path):
    def written_folder(name):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "array").write_bytes(b"0123456789")
        digests.write(tmp_path / name)
        assert digests.problem(tmp_path / name) is None
        return tmp_path / name

    (written_folder("short") / "inner" / "array").write_bytes(b"01234567")
    assert digests.problem(tmp_path / "short") == "inner/array has 8 bytes instead of 10"
    (written_folder("flipped") / "inner" / "array").write_bytes(b"0123456788")
    assert digests.problem(tmp_path / "flipped") == "inner/array changed after it was written"
    (written_folder("gone") / "inner" / "array").unlink()
    assert digests.problem(tmp_path / "gone") == "inner/array is missing"
    for text in ("{", "[]", '{"inner/array": 1}', '{"inner/array": {}}'):
        (tmp_path / "gone" / "digests.json").write_text(text)
        assert digests.problem(tmp_path / "gone") == "digests.json cannot be read"


@pytest.mark.slow
def test_a_checkpoint_without_digests_is_restored(finished, sources, recording, tmp_path):
    train_until_killed(run_config(sources), tmp_path, recording, 7)
    (tmp_path / "checkpoints" / "6" / "digests.json").unlink()
    train(run_config(sources), tmp_path)
    assert metrics_of(tmp_path) == metrics_of(finished)
    assert weights_of(tmp_path) == weights_of(finished)


def test_a_failed_save_ends_the_run_and_the_previous_checkpoint_stays(
    sources, tmp_path, monkeypatch
):
    write, calls = digests.write, []

    def write_until_the_disk_is_full(folder):
        calls.append(folder)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder)

    monkeypatch.setattr(digests, "write", write_until_the_disk_is_full)
    with pytest.raises(SaveFailed, match="No space left on device"):
        train(run_config(sources), tmp_path)
    assert {2, 4} & set(kept_steps(tmp_path))


@pytest.mark.slow
def test_a_refused_write_ends_the_run_and_the_run_can_be_resumed(
    finished, sources, tmp_path, monkeypatch
):
    """The operating system refuses a write of the third save, in the libraries below orbax."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = Checkpoints.save

    def save_with_size_limit(self, state, score):
        if state.step != 6:
            return save(self, state, score)
        assert self.steps == [2, 4]
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        try:
            save(self, state, score)
            assert self.steps  # `steps` waits for the pending save.
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    monkeypatch.setattr(Checkpoints, "save", save_with_size_limit)
    with pytest.raises(SaveFailed, match="step 6 cannot .* too large; .* is step 4"):
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
    # Of two equal scores, the later step is the best. NaN (a correlation of constant predictions)
    # is never the best.
    scores = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: None, 6: 0.7, 7: 0.8}
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [3, 4, 5], 6: [3, 5, 6], 7: [3, 6, 7]}
    for step, score in scores.items():
        checkpoints.save(state(step), score)
        assert checkpoints.latest == step
        assert kept_steps(tmp_path) == checkpoints.steps == kept[step]
    checkpoints.close()
    reopened = Checkpoints(tmp_path / "checkpoints")
    assert reopened.best == 3 and reopened.latest == 7
    assert reopened.parameters(3, state(0).parameters)["layer.kernel"].tolist() == [3, 3, 3]
    restored = reopened.restore(7, state(0))
    assert int(restored.step) == 7
    assert restored.parameters["layer.kernel"].tolist() == [7, 7, 7]
    with pytest.raises(InputError, match="step 7 in .* does not hold the arrays"):
        reopened.parameters(7, {"other.kernel": jnp.zeros(3)})
    with pytest.raises(InputError, match="start again with --overwrite"):
        reopened.parameters(7, {"layer.kernel": jnp.zeros(4)})
    reopened.close()


def kill_when(process, workdir, moment):
    """Kill the process as soon as `moment()` is true."""
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
def test_a_process_stopped_by_sigterm_exits_with_143_and_resumes(program, undisturbed, tmp_path):
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
def test_a_process_killed_by_sigkill_resumes(program, undisturbed, moment, tmp_path):
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
def test_a_process_killed_repeatedly_while_saving_resumes(program, undisturbed, tmp_path):
    """The delays cover the phases of a save: writing, renaming and removing old checkpoints."""
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


def test_a_finished_run_is_left_as_it_is(sources, finished, tmp_path, capsys):
    """Also with the criterion that was chosen for it, and if its data changed meanwhile."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    save_criterion(workdir, Patience(1), {"max_drop": 0.1})
    before = contents(workdir)
    config = run_config(sources)
    train(config, workdir)
    assert "is finished and was left as it is" in capsys.readouterr().out
    assert contents(workdir) == before


def test_a_run_is_not_resumed_with_other_rows_or_parameters(sources, recording, tmp_path):
    copy = shutil.copytree(sources, tmp_path / "sources")
    config, workdir = run_config(copy), tmp_path / "run"
    train_until_killed(config, workdir, recording, 6)
    rows = (copy / "train.csv").read_text()
    (copy / "train.csv").write_text(
        rows.replace(",yes", ",?").replace(",no", ",yes").replace(",?", ",no")
    )
    before = contents(workdir)
    with pytest.raises(InputError, match="started from other train rows"):
        train(config, workdir)
    (copy / "train.csv").write_text(rows)
    tensors = load_file(copy / "model" / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    save_file(tensors | {name: 2 * tensors[name]}, copy / "model" / "model.safetensors")
    with pytest.raises(InputError, match="started from other pretrained parameters"):
        train(config, workdir)
    assert contents(workdir) == before


def test_a_second_process_in_the_same_directory_is_refused(sources, tmp_path):
    workdir = tmp_path / "run"
    with run_directory.locked(epath.Path(workdir)):
        before = contents(workdir)
        for overwrite in (False, True):
            with pytest.raises(InputError, match="another process trains in --workdir"):
                train(run_config(sources), workdir, overwrite=overwrite)
        assert contents(workdir) == before
        run_directory.prepare(epath.Path(workdir), run_config(sources), {}, overwrite=False)
        run_directory.prepare(epath.Path(workdir), run_config(sources), {}, overwrite=True)
        with (
            pytest.raises(InputError, match="another process trains"),
            run_directory.locked(epath.Path(workdir)),
        ):
            pass
    train(run_config(sources, max_steps=1), workdir)


@pytest.mark.slow
def test_a_run_without_parameters_may_be_started_with_another_config(sources, tmp_path):
    workdir = tmp_path / "run"
    run_directory.prepare(epath.Path(workdir), run_config(sources, seed=1), {}, overwrite=False)
    train(run_config(sources, seed=2, max_steps=1), workdir)
    assert run_directory.read_config(epath.Path(workdir)).seed == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        b"garbage\n\n[1]\n",
        b'{"loss": 1}\n',
        b"\0\xff\n",
    ],
)
def test_a_damaged_log_does_not_keep_a_run_from_being_resumed(
    sources, finished, recording, tmp_path, damage
):
    train_until_killed(run_config(sources), tmp_path, recording, 6)
    path = tmp_path / "metrics.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + damage + rest)
    assert [line["step"] for line in log.read(epath.Path(tmp_path))][:2] == [1, 2]
    train(run_config(sources), tmp_path)
    assert metrics_of(tmp_path) == metrics_of(finished)


def random_moment(random, workdir):
    """Return a function that is true at a random moment, from the start to the last step."""
    kind = random.integers(4)
    if kind == 0:  # While the program starts, restores or compiles.
        end = time.monotonic() + random.uniform(0, 8)
        return lambda: time.monotonic() > end
    steps = steps_logged(workdir) + int(random.integers(1, 9))
    delay = random.uniform(0, 0.03)
    if kind == 1:
        return lambda: steps_logged(workdir) >= steps and is_saving(workdir)
    return lambda: steps_logged(workdir) >= steps and time.sleep(delay) is None


@pytest.mark.slow
def test_ten_kills_at_random_moments_and_two_resumes_at_once_change_nothing(
    program, undisturbed, tmp_path
):
    workdir, random = tmp_path / "run", np.random.default_rng(11)
    for _ in range(10):
        kill_when(program(workdir), workdir, random_moment(random, workdir))
    process, before = program(workdir), steps_logged(workdir)
    while steps_logged(workdir) == before:
        assert process.poll() is None, workdir.with_suffix(".log").read_text()
        time.sleep(0.001)
    # The first process may end before the second process has imported its libraries.
    process.send_signal(signal.SIGSTOP)
    refused = tmp_path / "refused.log"
    assert program(workdir, log=refused).wait() == 2, refused.read_text()
    assert "another process trains in --workdir" in refused.read_text()
    process.send_signal(signal.SIGCONT)
    kill_when(process, workdir, lambda: True)
    assert_ends_like(undisturbed, program, workdir)
    assert "Traceback" not in workdir.with_suffix(".log").read_text()
