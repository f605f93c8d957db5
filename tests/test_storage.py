"""Runs in a bucket: of a server on this machine that speaks Cloud Storage's protocol."""

import importlib.util
import json
import shutil
import socket
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
from pabee_jax.training import digests, run_directory
from runs import REPOSITORY, metrics_of, outputs, run_config, start_all, weights_of


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.path_of("~/run") == tmp_path / "run"
    assert storage.local_path_of("~/run") == tmp_path / "run"
    assert not storage.is_remote(storage.path_of("runs/demo"))
    # pathlib takes a slash away.
    with pytest.raises(InputError, match="^gs://bucket/run: a local path"):
        storage.local_path_of(Path("gs://bucket/run"))
    with pytest.raises(InputError, match="s3:// is not known"):
        storage.path_of("s3://bucket/run")
    with pytest.raises(InputError, match="a local path is needed here"):
        storage.local_path_of("gs://bucket/run")


def test_what_a_bucket_needs_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"install pabee_jax\[gcs\]"):
        storage.path_of("gs://bucket/run")


def test_a_bucket_out_of_reach(monkeypatch):
    def no_network(self):
        raise ConnectionError("Cannot connect to host\nand much more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", no_network)
    told = "gs://bucket/run cannot be reached: ConnectionError: Cannot connect to host$"
    with pytest.raises(InputError, match=told):
        storage.path_of("gs://bucket/run")


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for client in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(client, f"http://127.0.0.1:{port}")
        # Read at import: it would ask Google itself what kind of bucket this is, at every call.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield storage.path_of("gs://bucket")
        server.stop()


@pytest.mark.slow
def test_files_of_a_bucket(bucket, tmp_path):
    folder = bucket / "files"
    with storage.local_folder(folder) as here:
        (here / "inner").mkdir()
        (here / "inner" / "one").write_text("1")
        assert not folder.exists()
    assert (folder / "inner" / "one").read_text() == "1"
    assert digests.problem(folder) is None
    digests.write(folder)
    assert list(json.loads((folder / "digests.json").read_text())) == ["inner/one"]
    assert digests.problem(folder) is None
    (folder / "inner" / "one").write_text("2")
    assert digests.problem(folder) == "inner/one has other contents than were written"
    (folder / "inner" / "one").write_text("12")
    assert digests.problem(folder) == "inner/one has 2 bytes instead of 1"
    (folder / "inner" / "one").unlink()
    assert digests.problem(folder) == "inner/one is missing"


@pytest.mark.slow
def test_a_run_in_a_bucket(bucket, program, undisturbed, tmp_path):
    """Stopped, damaged, gone on with, evaluated and loaded."""
    run, log = bucket / "run", tmp_path / "log"
    first = program(run, log=log)
    while "step 24:" not in log.read_text():
        assert first.poll() is None, log.read_text()
        time.sleep(0.01)
    first.terminate()
    assert first.wait() == 143, log.read_text()
    checkpoints = run / "checkpoints"
    last = max(int(path.name) for path in checkpoints.iterdir())
    assert f"step {last} of 90 is saved" in log.read_text()
    (array, *_) = (
        name
        for name, about in storage.objects(checkpoints / str(last)).items()
        if about["size"] > 10_000
    )
    content = bytearray((checkpoints / str(last) / array).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoints / str(last) / array).write_bytes(bytes(content))

    assert program(run, log=log).wait() == 0, log.read_text()
    assert f"{array} has other contents than were written" in log.read_text()
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
    results = [
        np.load((epath.Path(folder) / "all_exit_logits.npz").open("rb"))["logits"]
        for folder in (run, undisturbed)
    ]
    np.testing.assert_array_equal(*results)
    answers = [
        EarlyExitClassifier.from_pretrained(str(folder)).predict(texts).logits
        for folder in (run, undisturbed)
    ]
    np.testing.assert_array_equal(*answers)
    loaded = EarlyExitClassifier.from_pretrained(str(run))
    loaded.save_pretrained(bucket / "saved")
    assert weights_of(bucket / "saved") == weights_of(run)


@pytest.mark.slow
def test_results_that_cannot_be_copied_are_kept(bucket):
    results = storage.local_folder(epath.Path("gs://absent/run"))
    with (
        pytest.raises(InputError, match="gs://absent/run cannot be written") as told,
        results as at,
    ):
        (at / "results").write_text("7")
    kept = Path(str(told.value).rpartition(" in ")[2])
    assert (kept / "results").read_text() == "7"
    shutil.rmtree(kept)


@pytest.mark.slow
def test_a_folder_that_was_made_by_hand(bucket, sources):
    gcs = fsspec.filesystem("gcs")
    gcs.pipe("bucket/made/", b"")
    run_directory.check(bucket / "made", run_config(sources), overwrite=False)
    (bucket / "made" / "notes").write_text("mine")
    with pytest.raises(InputError, match="files that are not a run's"):
        run_directory.check(bucket / "made", run_config(sources), overwrite=False)


@pytest.mark.slow
def test_a_bucket_that_is_not_there(bucket, program, tmp_path):
    log = tmp_path / "log"
    assert program(epath.Path("gs://absent/run"), log=log).wait() == 2
    (message,) = (line for line in log.read_text().splitlines() if "cannot be written" in line)
    assert "--workdir gs://absent/run cannot be written: FileNotFoundError" in message
    with pytest.raises(InputError, match="there is no directory gs://bucket/nothing"):
        EarlyExitClassifier.from_pretrained("gs://bucket/nothing")
    assert not Path("gs:").exists()


@pytest.mark.slow
def test_two_processes_in_a_bucket(bucket, program, tmp_path):
    run, logs = bucket / "together", tmp_path / "run"
    running = start_all(program, run, 2, 1, "--config.num_epochs=1", logs=logs)
    assert [process.wait() for process in running] == [0, 0], outputs(logs)
    steps = [line["step"] for line in metrics_of(run) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (run / "model.safetensors").exists()
