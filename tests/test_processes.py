"""Runs of several processes give the results of a run of one process, and end together."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers import tiny_checkpoint
from pabee_jax import InputError
from pabee_jax.distributed import processes
from runs import WORDS, free_port, kept_steps, metrics_of, outputs, start_all, steps_logged

# 24 steps.
SETTINGS = ["--config.batch_size=8", "--config.num_epochs=3"]


def running_for_ten_steps(program, workdir, count, devices, **options):
    """Start a run, wait until ten steps are logged, and return its processes."""
    running = start_all(program, workdir, count, devices, *SETTINGS, **options)
    while steps_logged(workdir) < 10:
        assert all(process.poll() is None for process in running), outputs(workdir)
        time.sleep(0.01)
    return running


def run_to_the_end(program, workdir, count, devices, *arguments, **options):
    for process in start_all(program, workdir, count, devices, *SETTINGS, *arguments, **options):
        assert process.wait() == 0, outputs(workdir)


def losses_of(workdir):
    return [line["exit_losses"] for line in metrics_of(workdir) if "loss" in line]


def assert_same_run(workdir, expected):
    np.testing.assert_allclose(losses_of(workdir), losses_of(expected), rtol=1e-5)
    evaluations, expected_evaluations = (
        [line for line in metrics_of(run) if "dev" in line] for run in (workdir, expected)
    )
    assert evaluations == expected_evaluations


@pytest.fixture(scope="module")
def alone(program, tmp_path_factory):
    """The directory of the same run with one process and one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert program(workdir, *SETTINGS).wait() == 0, outputs(workdir)
    return workdir


@pytest.mark.slow
def test_four_processes_with_two_devices_each_equal_one_process(program, alone, tmp_path):
    """The run has dropout, partly filled batches, and 23 dev rows, which no mesh size divides."""
    workdir = tmp_path / "run"
    run_to_the_end(program, workdir, 4, 2)
    assert_same_run(workdir, alone)
    assert kept_steps(workdir) == kept_steps(alone)
    # Only process 0 prints, logs and writes.
    assert "the parameters of step" in workdir.with_suffix(".0.log").read_text()
    for index in (1, 2, 3):
        assert "step" not in workdir.with_suffix(f".{index}.log").read_text()


@pytest.mark.slow
def test_sharded_parameters_over_two_processes_do_not_change_the_run(program, alone, tmp_path):
    workdir = tmp_path / "run"
    mesh = ["--config.mesh.model=2", "--config.mesh.shard_parameters=True"]
    run_to_the_end(program, workdir, 2, 2, *mesh)
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_fewer_processes_resume(program, alone, tmp_path):
    workdir = tmp_path / "run"
    running = running_for_ten_steps(program, workdir, 4, 2)
    running[2].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for process in running:
        assert process.wait(timeout=60) != 0
    assert time.monotonic() - killed < 60
    assert re.search("terminat|heartbeat|unhealthy|closed|reset", outputs(workdir), re.I)
    run_to_the_end(program, workdir, 2, 2)
    assert "resumed from step" in outputs(workdir)
    assert_same_run(workdir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_in_one_process_ends_all_processes(program, tmp_path, interrupted):
    workdir = tmp_path / "run"
    running = running_for_ten_steps(program, workdir, 2, 1)
    running[interrupted].send_signal(signal.SIGINT)
    assert running[interrupted].wait(timeout=60) == 130, outputs(workdir)
    assert running[1 - interrupted].wait(timeout=60) != 0
    assert "Traceback" not in workdir.with_suffix(f".{interrupted}.log").read_text()


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_processes_after_the_same_step(program, alone, tmp_path):
    workdir = tmp_path / "run"
    running = running_for_ten_steps(program, workdir, 2, 1)
    running[1].terminate()
    assert [process.wait(timeout=60) for process in running] == [143, 143], outputs(workdir)
    last = kept_steps(workdir)[-1]
    assert f"stopped by SIGTERM; step {last} of" in outputs(workdir)
    run_to_the_end(program, workdir, 2, 1)
    assert f"resumed from step {last} " in outputs(workdir)
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_an_unreachable_coordinator_is_an_error_after_the_timeout(program, tmp_path):
    workdir = tmp_path / "run"
    log = workdir.with_suffix(".log")
    together = ["--multihost", f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    process = program(workdir, *together, "--process_id=1", "--start_timeout=5", log=log)
    assert process.wait(timeout=60) == 2, log.read_text()
    assert "process 1 of 2 did not connect to the other processes at localhost" in log.read_text()
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "--num_processes and --process_id is missing"),
        (("localhost", 2, 0), "--coordinator is 'localhost'; it must be HOST:PORT"),
        (("localhost:1", 2, 2), "--process_id is 2 and --num_processes is 2"),
        (("localhost:1", 0, 0), "--num_processes is 0"),
    ],
)
def test_incomplete_or_invalid_process_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        processes.start(*arguments)


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_processes(program, tmp_path):
    workdir = tmp_path / "run"
    running = start_all(program, workdir, 2, 1, *SETTINGS, only={1: ["--config.data_dir=/nowhere"]})
    assert running[1].wait(timeout=60) == 2
    assert "error: " in workdir.with_suffix(".1.log").read_text()
    assert running[0].wait(timeout=60) != 0
    assert not (workdir / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("--config.learning_rate=0.1", "learning_rate is 0.003 on process 0 and 0.1 on process 1"),
        ("--config.data_dir={other}", "the hash of the dev rows is "),
        ("--config.model={other}/wide", "the hash of the pretrained parameters is "),
    ],
)
def test_processes_with_different_settings_rows_or_parameters_are_refused(
    program, sources, tmp_path, other, message
):
    workdir, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(sources, copy)
    with (copy / "dev.csv").open("a") as file:
        file.write("fine,no\n")
    tiny_checkpoint(copy / "wide", WORDS, initializer_range=0.2)
    only = {1: [other.format(other=copy)]}
    running = start_all(program, workdir, 2, 1, *SETTINGS, only=only)
    for index, process in enumerate(running):
        assert process.wait(timeout=60) == 2
        assert message in workdir.with_suffix(f".{index}.log").read_text()
    assert not workdir.exists()


@pytest.mark.slow
def test_processes_may_read_copies_of_the_files_at_different_paths(
    program, sources, alone, tmp_path
):
    """Both when the run starts and when it is resumed."""
    workdir, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(sources, copy)
    own = {1: [f"--config.data_dir={copy}", f"--config.model={copy / 'model'}"]}
    running = running_for_ten_steps(program, workdir, 2, 1, only=own)
    running[0].terminate()
    assert [process.wait(timeout=60) for process in running] == [143, 143], outputs(workdir)
    run_to_the_end(program, workdir, 2, 1, only=own)
    assert_same_run(workdir, alone)
    assert not (workdir / ".started").exists()


@pytest.mark.slow
def test_a_workdir_that_the_processes_do_not_share_is_refused(program, tmp_path):
    workdir = tmp_path / "run"
    elsewhere = {1: [f"--workdir={tmp_path / 'elsewhere'}"]}
    for process in start_all(program, workdir, 2, 1, *SETTINGS, only=elsewhere):
        assert process.wait(timeout=120) == 2
    assert "process 1 cannot read the file that process 0 wrote" in outputs(workdir)


@pytest.mark.slow
def test_a_classifier_runs_on_a_device_of_its_own_process(tmp_path):
    """Two processes of one run predict different texts, without waiting for each other."""
    checkpoint = tiny_checkpoint(tmp_path / "model", WORDS, initializer_range=0.3)
    code = (
        "import sys, jax\n"
        "jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n"
        "from pabee_jax import EarlyExitClassifier, Patience\n"
        "classifier = EarlyExitClassifier.from_pretrained(\n"
        "    sys.argv[3], num_labels=2, criterion=Patience(1))\n"
        "texts = ['good', 'bad fine', 'dull'][int(sys.argv[2]):]\n"
        "print(classifier.predict(texts).logits.tolist())\n"
    )
    address = f"localhost:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(index), str(checkpoint)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in running)
    np.testing.assert_allclose(first[1:], second, atol=1e-6)
