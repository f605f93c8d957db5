"""Paths, and runs in a bucket of a local server that emulates Cloud Storage."""

import importlib.util
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath

from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.io import storage
from pabee_jax.io.atomic import remove_temporaries, write_atomically
from pabee_jax.training import digests, run_directory
from runs import REPOSITORY, metrics_of, outputs, run_config, start_all, weights_of


def test_paths_expand_the_home_folder_and_other_addresses_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.path_of("~/run") == tmp_path / "run"
    assert storage.local_path_of("~/run") == tmp_path / "run"
    assert not storage.is_remote(storage.path_of("runs/demo"))
    # pathlib merges the two slashes of the address.
    with pytest.raises(InputError, match="^gs://bucket/run is an address; a local path"):
        storage.local_path_of(Path("gs://bucket/run"))
    with pytest.raises(InputError, match="s3:// is not supported"):
        storage.path_of("s3://bucket/run")
    with pytest.raises(InputError, match="a local path is required"):
        storage.local_path_of("gs://bucket/run")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut, the name then refers to the whole file."""
    events, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        mode = os.fstat(descriptor).st_mode
        events.append("store the names" if stat.S_ISDIR(mode) else "store the contents")
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    write_atomically(tmp_path / "file", lambda path: path.write_text("1"))
    assert events == ["store the contents", "rename", "store the names"]
    assert (tmp_path / "file").read_text() == "1"


def test_two_writers_of_a_file_share_no_temporary_file(tmp_path):
    def write_beside_another_writer(temporary):
        temporary.write_text("first")
        write_atomically(tmp_path / "file", lambda path: path.write_text("second"))
        assert (tmp_path / "file").read_text() == "second"
        assert temporary.read_text() == "first"

    write_atomically(tmp_path / "file", write_beside_another_writer)
    assert (tmp_path / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path):
    (tmp_path / "file").write_text("old")

    def write_and_fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", write_and_fail)
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_temporary_files_of_killed_processes_are_removed_and_no_others(tmp_path):
    stays = {".other.tmp", "log.jsonl.tmp", "log.jsonl"}
    for name in (*stays, ".log.jsonl.tmp", ".log.jsonl.0a1b2c3d.tmp"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, ["log.jsonl"])
    assert {path.name for path in tmp_path.iterdir()} == stays


def test_without_gcsfs_the_message_names_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install pabee_jax\[gcs\]"):
        storage.path_of("gs://bucket/run")


def test_a_bucket_that_cannot_be_reached_is_reported_in_one_line(monkeypatch):
    def no_network(self):
        raise ConnectionError("Cannot connect to host\nand much more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", no_network)
    message = "gs://bucket/run cannot be reached: ConnectionError: Cannot connect to host$"
    with pytest.raises(InputError, match=message):
        storage.path_of("gs://bucket/run")


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(variable, f"http://127.0.0.1:{port}")
        # gcsfs reads this variable at import. With its default, every call would query Google's
        # servers for the kind of the bucket.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield storage.path_of("gs://bucket")
        server.stop()


@pytest.mark.slow
def test_files_are_uploaded_at_the_end_and_digests_detect_changed_objects(bucket, tmp_path):
    folder = bucket / "files"
    with storage.local_folder(folder) as local:
        (local / "inner").mkdir()
        (local / "inner" / "file").write_text("1")
        assert not folder.exists()
    assert (folder / "inner" / "file").read_text() == "1"
    assert digests.problem(folder) is None
    digests.write(folder)
    assert list(json.loads((folder / "digests.json").read_text())) == ["inner/file"]
    assert digests.problem(folder) is None
    (folder / "inner" / "file").write_text("2")
    assert digests.problem(folder) == "inner/file changed after it was written"
    (folder / "inner" / "file").write_text("12")
    assert digests.problem(folder) == "inner/file has 2 bytes instead of 1"
    (folder / "inner" / "file").unlink()
    assert digests.problem(folder) == "inner/file is missing"


@pytest.mark.slow
def test_a_run_in_a_bucket_is_resumed_evaluated_and_loaded(bucket, program, undisturbed, tmp_path):
    """The run is stopped and its last checkpoint is corrupted before it is resumed."""
    run, log = bucket / "run", tmp_path / "log"
    process = program(run, log=log)
    while "step 24:" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143, log.read_text()
    checkpoints = run / "checkpoints"
    last = max(int(path.name) for path in checkpoints.iterdir())
    assert f"step {last} of 90 is saved" in log.read_text()
    (array, *_) = (
        name
        for name, metadata in storage.objects(checkpoints / str(last)).items()
        if metadata["size"] > 10_000
    )
    content = bytearray((checkpoints / str(last) / array).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoints / str(last) / array).write_bytes(bytes(content))

    assert program(run, log=log).wait() == 0, log.read_text()
    assert f"{array} changed after it was written" in log.read_text()
    assert (checkpoints / f"damaged-{last}-1" / "digests.json").exists()
    assert weights_of(run) == weights_of(undisturbed)
    assert metrics_of(run) == metrics_of(undisturbed)

    texts = ["good fine", "bad"]
    for checkpoint in (str(run), str(undisturbed)):
        subprocess.run(
            [sys.executable, "evaluate.py", "--checkpoint", checkpoint, "--report", "--sweep"],
            check=True,
            cwd=REPOSITORY,
        )
    assert (run / "report.html").exists()
    all_exit_logits = [
        np.load((epath.Path(folder) / "all_exit_logits.npz").open("rb"))["logits"]
        for folder in (run, undisturbed)
    ]
    np.testing.assert_array_equal(*all_exit_logits)
    predicted_logits = [
        EarlyExitClassifier.from_pretrained(str(folder)).predict(texts).logits
        for folder in (run, undisturbed)
    ]
    np.testing.assert_array_equal(*predicted_logits)
    loaded = EarlyExitClassifier.from_pretrained(str(run))
    loaded.save_pretrained(bucket / "saved")
    assert weights_of(bucket / "saved") == weights_of(run)


@pytest.mark.slow
def test_files_that_cannot_be_uploaded_remain_in_the_local_folder(bucket):
    folder = storage.local_folder(epath.Path("gs://absent/run"))
    with (
        pytest.raises(InputError, match="gs://absent/run cannot be written") as error,
        folder as local,
    ):
        (local / "results").write_text("7")
    named_folder = Path(str(error.value).rpartition(" in ")[2])
    assert (named_folder / "results").read_text() == "7"
    shutil.rmtree(named_folder)


@pytest.mark.slow
def test_an_empty_folder_is_accepted_and_a_folder_with_other_files_is_refused(bucket, sources):
    gcs = fsspec.filesystem("gcs")
    gcs.pipe("bucket/made/", b"")
    run_directory.check(bucket / "made", run_config(sources), overwrite=False)
    (bucket / "made" / "notes").write_text("mine")
    with pytest.raises(InputError, match="not a run directory"):
        run_directory.check(bucket / "made", run_config(sources), overwrite=False)


@pytest.mark.slow
def test_a_bucket_that_does_not_exist_is_an_error(bucket, program, tmp_path):
    log = tmp_path / "log"
    assert program(epath.Path("gs://absent/run"), log=log).wait() == 2
    (message,) = (line for line in log.read_text().splitlines() if "cannot be written" in line)
    assert "--workdir gs://absent/run cannot be written: FileNotFoundError" in message
    with pytest.raises(InputError, match="there is no directory gs://bucket/nothing"):
        EarlyExitClassifier.from_pretrained("gs://bucket/nothing")
    assert not Path("gs:").exists()


@pytest.mark.slow
def test_two_processes_train_with_a_run_in_a_bucket(bucket, program, tmp_path):
    run, logs = bucket / "together", tmp_path / "run"
    processes = start_all(program, run, 2, 1, "--config.num_epochs=1", logs=logs)
    assert [process.wait() for process in processes] == [0, 0], outputs(logs)
    steps = [line["step"] for line in metrics_of(run) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (run / "model.safetensors").exists()
