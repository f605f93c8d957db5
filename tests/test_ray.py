"""The Ray integration, on a real cluster of this machine."""

import concurrent.futures
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import film_texts, tiny_classifier
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.integrations.ray import Predictor

TEXTS = film_texts(100)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("checkpoint"), 2)


@pytest.mark.slow
def test_the_actor_adds_the_columns_of_the_predictions(checkpoint):
    predictor = Predictor(checkpoint, text="sentence", criterion=Patience(1))
    batch = {"sentence": np.array(TEXTS, object), "id": np.arange(len(TEXTS))}
    columns = predictor(batch)
    expected = EarlyExitClassifier.from_pretrained(checkpoint, criterion=Patience(1))
    predictions = expected.predict(TEXTS)
    assert columns["label"].tolist() == predictions.label_strings
    assert columns["exit_layer"].tolist() == predictions.exit_layers.tolist()
    assert columns["id"].tolist() == list(range(len(TEXTS)))
    with pytest.raises(InputError, match="there is no column 'sentence': there are text"):
        predictor({"text": batch["sentence"]})
    with pytest.raises(InputError, match="has a column 'label', which the predictions have too"):
        predictor(batch | {"label": batch["id"]})


@pytest.fixture(scope="module")
def ray():
    """A cluster of two workers on this machine."""
    ray = pytest.importorskip("ray")
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": environment})
    yield ray
    ray.shutdown()


def predicted(ray, checkpoint, num_rows, **options):
    rows = ray.data.from_items(
        [{"id": row, "text": TEXTS[row % len(TEXTS)]} for row in range(num_rows)]
    ).repartition(20)
    return rows.map_batches(
        Predictor,
        fn_constructor_kwargs={"checkpoint": checkpoint, "criterion": Patience(1)},
        concurrency=2,
        batch_size=500,
        **options,
    )


@pytest.mark.slow
def test_two_actors_predict_20_000_rows(ray, checkpoint, capsys):
    start = time.monotonic()
    rows = predicted(ray, checkpoint, 20_000).take_all()
    seconds = time.monotonic() - start
    with capsys.disabled():
        print(f"\n20,000 rows in {seconds:.1f} s, with the start of the actors")
    expected = EarlyExitClassifier.from_pretrained(checkpoint, criterion=Patience(1)).predict(TEXTS)
    by_id = sorted(rows, key=lambda row: row["id"])
    assert [row["id"] for row in by_id] == list(range(20_000))
    for row in by_id:
        index = row["id"] % len(TEXTS)
        assert row["exit_layer"] == expected.exit_layers[index]
        assert row["label"] == expected.label_strings[index]


def actor_processes():
    """Return the processes of actors; Ray sets the title of a process to the name of its work."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:  # The process has ended.
            continue
        if title.startswith(b"ray::") and b"Predictor" in title:
            processes.append(int(folder.name))
    return processes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the actors in /proc")
def test_the_job_completes_when_an_actor_is_killed(ray, checkpoint):
    killed = []

    def kill():
        while not killed:
            if processes := actor_processes():
                time.sleep(1)  # So that the actor works on a batch.
                os.kill(processes[0], signal.SIGKILL)
                killed.append(processes[0])
            time.sleep(0.1)

    thread = threading.Thread(target=kill)
    thread.start()
    rows = predicted(ray, checkpoint, 20_000).take_all()
    was_killed = bool(killed)
    killed.append(0)  # Ends the thread.
    thread.join()
    assert was_killed, "the job ended before an actor was killed"
    assert sorted(row["id"] for row in rows) == list(range(20_000))


@pytest.mark.slow
def test_two_replicas_of_ray_serve_answer_as_predict(ray, checkpoint, capsys):
    pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    from ray import serve

    from pabee_jax.integrations.ray_serve import application

    replicas = application(
        checkpoint,
        deployment={"num_replicas": 2, "max_ongoing_requests": 64},
        criterion=Patience(1),
    )
    serve.run(replicas)
    url, rows = "http://127.0.0.1:8000", 2_000
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health").status_code == 200

        def answer(row):
            text = TEXTS[row % len(TEXTS)]
            response = client.post("/predict", json={"inputs": text, "raw_scores": True})
            assert response.status_code == 200, response.text
            scores = {entry["label"]: entry["score"] for entry in response.json()}
            return scores, int(response.headers["x-exit-layers"])

        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            start = time.monotonic()
            answers = list(threads.map(answer, range(rows)))
            seconds = time.monotonic() - start
        assert client.post("/predict", json={"inputs": 3}).status_code == 422
    with capsys.disabled():
        print(f"\n{rows} requests of 16 clients in {seconds:.1f} s, two replicas of Ray Serve")
    classifier = EarlyExitClassifier.from_pretrained(checkpoint, criterion=Patience(1))
    expected = classifier.predict(TEXTS)
    names = classifier.pretrained.label_names
    for row, (scores, exit_layer) in enumerate(answers):
        index = row % len(TEXTS)
        assert exit_layer == expected.exit_layers[index]
        for label, logit in zip(names, expected.logits[index], strict=True):
            assert abs(scores[label] - logit) < 1e-5
    serve.shutdown()
