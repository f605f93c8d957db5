"""A run that cannot work is refused before it allocates memory or changes a file."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from helpers import tiny_model
from pabee_jax.configs import demo, files, glue
from pabee_jax.data.config import FilesConfig
from pabee_jax.distributed import sharding
from pabee_jax.errors import InputError
from pabee_jax.io import host_memory
from pabee_jax.models.parameters import split, stacked
from pabee_jax.training import digests, memory, run, run_directory
from pabee_jax.training.checkpoint import Checkpoints
from pabee_jax.training.config import (
    DistillConfig,
    LossConfig,
    MeshConfig,
    ScratchConfig,
    TrainConfig,
    check,
)
from pabee_jax.training.effects import refuse_settings_without_effect
from pabee_jax.training.run import train
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.steps import refuse_short_run
from pabee_jax.training.strategy import phase_of
from runs import (
    REPOSITORY,
    contents,
    kept_steps,
    metrics_of,
    run_config,
    train_until_killed,
    weights_of,
)

HUGE = 10**9
NAN, INFINITY = float("nan"), float("inf")


def demo_config(**fields):
    values = {"max_seq_length": 32, "batch_size": 8, "warmup_steps": 0, "mesh": MeshConfig(1)}
    return dataclasses.replace(demo.get_config(), **values | fields)


def scratch(**sizes):
    return {"model": "", "task": "demo", "data_dir": "", "files": FilesConfig()} | {
        "scratch": ScratchConfig(**sizes)
    }


# The fields that replace those of `run_config`, and a part of the message.
REFUSED = {
    "sequence": (scratch() | dict(max_seq_length=HUGE), "needs at least .* GiB"),
    "batch": (dict(batch_size=HUGE), "1,000,000,000 rows .* smaller config.batch_size"),
    "hidden": (scratch(hidden_size=10**7), "parameters .* a smaller model"),
    "intermediate": (scratch(intermediate_size=HUGE), "parameters .* a smaller model"),
    "embedding": (scratch(embedding_size=HUGE), "parameters .* a smaller model"),
    "layers": (scratch(num_hidden_layers=10**5), "num_hidden_layers is 100000; .* at most 1000"),
    "accumulation": (dict(gradient_accumulation=HUGE), "not a multiple"),
    "devices": (dict(mesh=MeshConfig(data=HUGE)), "mesh.data is 1000000000"),
    "larger than int32": (dict(batch_size=10**400), "must be at most 2147483647"),
    "epochs": (dict(num_epochs=1e308), "makes more than 2147483647 steps"),
    "epochs, 1e9": (dict(num_epochs=1e9), "makes more than 2147483647 steps"),
    "no epochs": (dict(num_epochs=NAN), "num_epochs is nan; it must be a positive number"),
    "endless": (dict(num_epochs=INFINITY), "num_epochs is inf"),
    "steps": (dict(max_steps=10**10), "at most 2147483647"),
    "warm-up": (dict(warmup_steps=10**10), "at most 2147483647"),
    "infinite decay": (dict(weight_decay=INFINITY), "weight_decay is inf; .* finite number"),
    "infinite norm": (dict(max_grad_norm=INFINITY), "max_grad_norm is inf"),
    "infinite distillation": (dict(distill=DistillConfig(INFINITY)), "distill.weight is inf"),
    "initializer": (scratch(initializer_range=NAN), "initializer_range is nan; .* positive"),
    "a text for a number": (dict(batch_size="8"), "batch_size is '8'; it must be of type int"),
    "a switch for a number": (dict(batch_size=True), "batch_size is True; .* type int"),
    "a number for a path": (dict(data_dir=1), "data_dir is 1; it must be of type str"),
    "numpy": (dict(batch_size=np.int64(8)), "batch_size is .*8.*; it must be of type int"),
    "a value for a group": (dict(loss="last"), "config.loss does not exist as a single setting"),
    "another group": (
        dict(loss=MeshConfig()),
        "config.loss.data does not exist as a single setting",
    ),
    "NUL": (dict(data_dir="a\0b"), "data_dir is 'a.x00b', which contains a NUL character"),
    "not UTF-8": (dict(model=os.fsdecode(b"run\xff")), "config.model is .* which is not UTF-8"),
    "a long path": (dict(data_dir="x" * 5000), "data_dir is 'x.*, which has more than 4096"),
    "no warm-up of all steps": (
        dict(warmup_steps=12),
        "warmup_steps is 12, but the run has 12 steps",
    ),
    "no warm-up above max_steps": (dict(max_steps=3, warmup_steps=4), "the run has 3 steps"),
    "scratch": (
        dict(scratch=ScratchConfig(num_hidden_layers=3)),
        "scratch.num_hidden_layers is 3, but the sizes .* are those of the model",
    ),
    "files of a GLUE task": (
        dict(task="mrpc"),
        "config.files.train is 'train.csv', but config.task is 'mrpc'",
    ),
    "files of the demo": (
        scratch() | dict(files=FilesConfig(regression=True)),
        "config.files.regression is True, but config.task is 'demo'",
    ),
    "folder of the demo": (
        scratch() | dict(data_dir="data"),
        "config.data_dir is 'data', but the demo generates its rows",
    ),
    "best of one": (
        dict(export="best", max_steps=4),
        "export is 'best', but the run evaluates .* exits only once, .* smaller eval_every",
    ),
    "best of the second phase": (
        dict(export="best", strategy="last_first", eval_every=6),
        "export is 'best', but the run evaluates its trained exits only once",
    ),
    "two phases in one step": (
        dict(strategy="two_stage", max_steps=1),
        "strategy is 'two_stage', which needs at least 2 steps, but the run has 1",
    ),
    "one batch": (
        dict(order="length_grouped", batch_size=30),
        "the 58 training rows make fewer than two batches of 30 rows",
    ),
    "last": (dict(loss=LossConfig("last"), pooler="per_exit"), "no early exit is trained"),
}


def state(step):
    kernels = {
        name: jnp.full((2, 3), step, jnp.float32) for name in ("a.kernel", "classifiers.kernel")
    }
    return initial_state(kernels, TrainConfig())._replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def started(sources, tmp_path_factory):
    """The directory of an unfinished run with a log and the checkpoints 2 and 4."""
    workdir = epath.Path(tmp_path_factory.mktemp("started") / "run")
    run_directory.prepare(workdir, run_config(sources), {}, overwrite=False)
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step in (2, 4):
        checkpoints.save(state(step), None)
    checkpoints.close()
    assert kept_steps(workdir) == [2, 4]
    return Path(workdir)


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_start_changes_no_file(case, sources, started, tmp_path):
    fields, message = REFUSED[case]
    config, before = run_config(sources, **fields), contents(started)
    with pytest.raises(InputError, match=message):
        train(config, started, overwrite=True)
    assert contents(started) == before
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "new")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a path is empty"),
        ("x" * 300, "too long: its longest name has 300 bytes"),
        ("x/" * 3000, "too long: .* at most 255 and 3500"),
        ("run\0", "contains a NUL"),
        (os.fsdecode(b"run\xff"), "is not UTF-8"),
    ],
)
def test_a_path_that_no_file_system_can_hold_is_refused(
    name, message, sources, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        train(run_config(sources), name)
    assert not any(tmp_path.iterdir())


def test_a_run_that_an_earlier_version_has_started_is_resumed_with_its_settings(
    sources, tmp_path, monkeypatch
):
    config, workdir = run_config(sources, warmup_steps=12), tmp_path / "run"
    run_directory.prepare(epath.Path(workdir), config, {}, overwrite=False)
    (workdir / "train_inputs.json").unlink()  # Earlier versions did not write this file.
    checkpoints = Checkpoints(epath.Path(workdir / "checkpoints"))
    checkpoints.save(state(2), None)
    checkpoints.close()
    monkeypatch.setattr(run, "_Run", lambda *_: pytest.fail("the run resumes"))
    with pytest.raises(pytest.fail.Exception, match="the run resumes"):
        train(config, workdir)
    with pytest.raises(InputError, match="warmup_steps is 12"):
        train(config, workdir, overwrite=True)


def test_overwrite_refuses_a_linked_folder_before_it_removes_a_file(sources, started, tmp_path):
    workdir = shutil.copytree(started, tmp_path / "run")
    (workdir / "checkpoints").rename(tmp_path / "elsewhere")
    (workdir / "checkpoints").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="checkpoints is a link to a folder"):
        train(run_config(sources), workdir, overwrite=True)
    assert contents(tmp_path) == before and (workdir / "checkpoints").is_symlink()


def test_the_configurations_of_the_package_have_no_setting_without_effect():
    arguments = [(task, preset) for task in ("mrpc", "stsb") for preset in ("", ",recommended")]
    configs = [glue.get_config(task + preset) for task, preset in arguments]
    configs += [demo.get_config(), files.get_config(), files.get_config("paper")]
    for config in configs:
        check(config)
        refuse_settings_without_effect(config)
        refuse_short_run(config, 10_000)


@pytest.mark.parametrize("pooler", ["shared", "per_exit"])
@pytest.mark.parametrize("family", ["albert", "bert"])
def test_the_number_of_parameters_is_that_of_the_model(family, pooler):
    model = tiny_model(family, exit_pooler=pooler, hidden_size=32, embedding_size=32)
    sizes = [value.size for value in split(model)[1].values()]
    assert memory.parameter_count(model.config) == sum(sizes)


@pytest.mark.parametrize(
    ("fields", "closeness"),
    [
        (dict(), 0.4),
        pytest.param(dict(rematerialize=True, dtype="bfloat16"), 0.0, marks=pytest.mark.slow),
        pytest.param(dict(gradient_accumulation=4), 0.4, marks=pytest.mark.slow),
        pytest.param(dict(loss=LossConfig("last")), 0.4, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_of_the_memory_is_a_lower_bound(fields, closeness):
    """The compiler reports the memory that a step needs."""
    rows, length = 128, 24
    config = demo_config(batch_size=rows, **fields)
    model, mesh = tiny_model("bert"), sharding.make_mesh(1)
    structure, parameters = split(stacked(model))
    batch = {
        name: jnp.ones((rows, length), jnp.int32)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    } | {"valid": jnp.ones(rows, bool), "labels": jnp.zeros(rows, jnp.int32)}
    step = make_train_step(structure, config, 10).func
    lowered = step.lower(
        initial_state(parameters, config), batch, phase_of(config, 0, 10, 6), seed=np.int32(0)
    )
    measured = lowered.compile().memory_analysis()
    needed = measured.temp_size_in_bytes + measured.argument_size_in_bytes
    estimate = memory.state_bytes(config, model.config, mesh)[1]
    estimate += memory.activation_bytes(config, model.config, mesh, length)[1]
    assert closeness * needed < estimate < needed


def test_the_smallest_limit_of_the_memory_counts(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 64 kB\nMemAvailable:  8192 kB\nSwapFree: 1024 kB\n")
    assert host_memory.limit_bytes(tmp_path) == 9216 * 1024
    write("proc/self/cgroup", "5:devices:/a\n4:memory:/a\n0::/b\n")
    write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    write("sys/fs/cgroup/b/memory.max", "max\n")
    assert host_memory.limit_bytes(tmp_path) == 9216 * 1024
    write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "5000\n")
    assert host_memory.limit_bytes(tmp_path) == 5000
    write("sys/fs/cgroup/memory.max", "4000\n")
    assert host_memory.limit_bytes(tmp_path) == 4000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 1.0 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes\nmore"),
    ],
)
def test_memory_that_runs_out_is_reported_in_one_sentence(error):
    message = "too small for this run .*allocat.*; give a smaller config.batch_size"
    with pytest.raises(InputError, match=message), memory.exhaustion_as_input_error():
        raise error


def test_a_run_is_refused_by_the_memory_that_is_available(sources, started, tmp_path, monkeypatch):
    config, before = run_config(sources), contents(started)
    monkeypatch.setattr(host_memory, "limit_bytes", lambda: 100_000)
    with pytest.raises(InputError, match="at least 0.0 GiB of memory, most of it for"):
        train(config, started, overwrite=True)
    assert contents(started) == before
    monkeypatch.setattr(host_memory, "limit_bytes", lambda: None)
    monkeypatch.setattr(run, "_Run", lambda *_: pytest.fail("the run starts"))
    with pytest.raises(pytest.fail.Exception):  # Unknown memory refuses no run.
        train(config, tmp_path / "run")


DAMAGES = {
    "a stray folder": lambda folder: (folder.parent / "999").mkdir(),
    "a truncated file": lambda folder: largest_file(folder).write_bytes(b"short"),
    "no metadata": lambda folder: (folder / "parameters" / "_METADATA").unlink(),
    "no optimizer": lambda folder: shutil.rmtree(folder / "optimizer"),
    "another step": lambda folder: shutil.copytree(folder, folder.parent / "999"),
}


def largest_file(folder):
    return max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_checkpoint_that_can_be_restored_is_restored(damage, started, tmp_path, caplog):
    """The damaged checkpoint has no digests: an older version wrote it, or a run was killed."""
    folder = epath.Path(shutil.copytree(started / "checkpoints", tmp_path / "checkpoints"))
    (tmp_path / "checkpoints" / "4" / "digests.json").unlink()
    DAMAGES[damage](tmp_path / "checkpoints" / "4")
    damaged, expected = ("999", 4) if (folder / "999").exists() else ("4", 2)
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore_latest(state(0))
    checkpoints.close()
    assert restored is not None and int(restored.step) == expected
    assert restored.parameters["a.kernel"].tolist() == [[expected] * 3] * 2
    (warning,) = (record.message for record in caplog.records if "is damaged" in record.message)
    assert f"{folder / damaged} is damaged" in warning and f"damaged-{damaged}-1" in warning
    assert (folder / f"damaged-{damaged}-1").is_dir() and not (folder / damaged).exists()


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_ends_like_an_undisturbed_run(
    sources, finished, recording, tmp_path, capsys
):
    train_until_killed(run_config(sources), tmp_path, recording, 6)
    newest = tmp_path / "checkpoints" / "4"
    (newest / "digests.json").unlink()
    largest_file(newest).write_bytes(b"short")
    (newest.parent / "999").mkdir()
    train(run_config(sources), tmp_path)
    assert "resumed from step 2 of 12" in capsys.readouterr().out
    assert weights_of(tmp_path) == weights_of(finished)
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(started, tmp_path, monkeypatch):
    shutil.copytree(started / "checkpoints", tmp_path / "checkpoints")
    before = contents(tmp_path)

    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(digests, "_sha256", refuse)
    with pytest.raises(InputError, match="cannot be read: Input/output error: .*left as it is"):
        Checkpoints(epath.Path(tmp_path / "checkpoints"))
    assert contents(tmp_path) == before


def test_checkpoints_of_another_model_are_not_renamed(started, tmp_path):
    folder = epath.Path(shutil.copytree(started / "checkpoints", tmp_path / "checkpoints"))
    checkpoints = Checkpoints(folder)
    other = initial_state({"layer.kernel": jnp.zeros(3)}, TrainConfig())
    with pytest.raises(InputError, match="step 4 .* does not hold .* start again with --overwrite"):
        checkpoints.restore_latest(other)
    checkpoints.close()
    assert kept_steps(tmp_path) == [2, 4]
    # `pabee-jax evaluate` has no flag --overwrite.
    evaluated = Checkpoints(folder, read_only=True)
    with pytest.raises(InputError, match="use the version that wrote the checkpoint$"):
        evaluated.parameters(4, other.parameters)
    evaluated.close()


def test_writes_of_a_failed_save_print_no_stack_traces(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    for _ in range(2):
        Checkpoints(epath.Path(tmp_path)).close()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
        unraisable = type("unraisable", (), {"exc_type": type(error), "exc_value": error})
        sys.unraisablehook(unraisable)
    assert [str(unraisable.exc_value) for unraisable in printed] == ["another"]


def test_every_field_of_a_config_has_a_type_that_is_checked():
    values = traverse_util.flatten_dict(dataclasses.asdict(demo_config()), sep=".")
    assert {type(value) for value in values.values()} == {int, float, str, bool}


# A shell starts background jobs with SIGINT ignored, which their children inherit.
WITH_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def test_ctrl_c_during_the_imports_ends_in_one_line():
    code = f"{WITH_SIGINT}import runpy; runpy.run_path('train.py', run_name='__main__')"
    process = subprocess.Popen(
        # Python prints the name of every module after its import.
        [sys.executable, "-X", "importtime", "-c", code, "--config=demo", "--workdir=absent"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    next(line for line in process.stderr if line.endswith(" numpy.version\n"))
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    lines = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert lines == ["interrupted"]
    assert not (REPOSITORY / "absent").exists()


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    code = WITH_SIGINT + (
        "import gc, sys, time, types\n"
        "from pabee_jax.commands import interrupt as imports, main\n"
        "def interrupt(*_):\n"
        "    gc.callbacks.clear()\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "def command(argv):\n"
        "    gc.callbacks.append(interrupt)\n"
        "    gc.collect()\n"
        "    time.sleep(10)\n"
        "    print('not interrupted')\n"
        "imports.import_module = lambda name: types.SimpleNamespace(main=command)\n"
        "main.main(['pabee-jax', 'train'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
