"""The HTTP service: text-embeddings-inference's contract, the answers of `predict`, and faults."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import transformers

from helpers import film_texts, one_device_environment, tiny_classifier
from pabee_jax import EarlyExitClassifier, InputError, MaxProbability, Patience
from pabee_jax.commands.serve_options import ServeOptions

pytest.importorskip("fastapi", reason="needs pabee_jax[serve]")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from benchmarks.service_process import Server  # noqa: E402

TEXTS = film_texts(60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    fields = {"model_type": "albert", "embedding_size": 8, "num_hidden_groups": 1}
    return tiny_classifier(tmp_path_factory.mktemp("checkpoint"), 3, **fields)


def start(checkpoint, *arguments, stdout=None):
    environment = one_device_environment()
    server = Server(checkpoint, *arguments, environment=environment, stdout=stdout)
    return server.wait_until_ready()


@pytest.fixture(scope="module")
def server(checkpoint):
    server = start(checkpoint, "--max_client_batch_size=40")
    yield server
    assert server.stop() in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return EarlyExitClassifier.from_pretrained(checkpoint)


def check_row(scores, exit_layer, predictions, row):
    probabilities = predictions.probabilities[row]
    assert [score["label"] for score in scores] == [
        predictions.label_names[index] for index in np.argsort(-probabilities, kind="stable")
    ]
    np.testing.assert_allclose(
        [score["score"] for score in scores], sorted(probabilities, reverse=True), atol=1e-5
    )
    assert exit_layer == predictions.exit_layers[row]


def exit_layers(response):
    return [int(layer) for layer in response.headers["x-exit-layers"].split(",")]


def test_a_text_a_pair_and_a_batch(server, classifier):
    for inputs, texts in (
        (TEXTS[3], [TEXTS[3]]),
        ([TEXTS[3]], [TEXTS[3]]),
        ([TEXTS[3], TEXTS[4]], [(TEXTS[3], TEXTS[4])]),
        ([[TEXTS[5]], [TEXTS[6], TEXTS[7]]], [TEXTS[5], (TEXTS[6], TEXTS[7])]),
    ):
        response = server.post({"inputs": inputs})
        assert response.status_code == 200, response.text
        rows = response.json() if isinstance(inputs[0], list) else [response.json()]
        predictions = classifier.predict(texts)
        for row, scores in enumerate(rows):
            check_row(scores, exit_layers(response)[row], predictions, row)
        for name in ("total", "tokenization", "queue", "inference"):
            assert float(response.headers[f"x-{name}-time"]) >= 0


def test_64_clients_get_the_answers_of_predict(server, classifier):
    """Mixed lengths, pairs, and settings of two criteria."""
    settings = [
        ({}, Patience(1)),
        ({"patience": 3}, Patience(3)),
        ({"criterion": {"criterion": "max_probability", "threshold": 0.4}}, MaxProbability(0.4)),
        ({"patience": 0}, Patience(0)),
    ]
    requests = []
    for index in range(256):
        text, other = TEXTS[index % 60], TEXTS[(7 * index) % 60]
        fields, criterion = settings[index % 4]
        inputs = [text, other] if index % 3 == 0 else text
        requests.append(({"inputs": inputs} | fields, criterion))
    with ThreadPoolExecutor(64) as pool:
        responses = list(pool.map(lambda request: server.post(request[0]), requests))
    for (body, criterion), response in zip(requests, responses, strict=True):
        assert response.status_code == 200, response.text
        inputs = body["inputs"]
        classifier.criterion = criterion
        predictions = classifier.predict([inputs if isinstance(inputs, str) else tuple(inputs)])
        check_row(response.json(), exit_layers(response)[0], predictions, 0)
    classifier.criterion = Patience(1)


def test_raw_scores_and_explanations(server, classifier):
    response = server.post({"inputs": TEXTS[8], "raw_scores": True, "explain": True})
    answer = response.json()
    logits = classifier.all_exit_logits([TEXTS[8]])[:, 0]
    assert [exit["layer"] for exit in answer["exits"]] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([exit["logits"] for exit in answer["exits"]], logits, atol=2e-5)
    of_exit = sorted(logits[answer["exit_layer"] - 1], reverse=True)
    np.testing.assert_allclose([p["score"] for p in answer["predictions"]], of_exit, atol=2e-5)


def test_the_inference_client_of_the_hub(server, classifier):
    hub = pytest.importorskip("huggingface_hub")
    answer = hub.InferenceClient(model=server.url).text_classification(TEXTS[9], top_k=2)
    (prediction,) = classifier.predict([TEXTS[9]])
    assert len(answer) == 2 and answer[0].label == prediction.label
    assert answer[0].score == pytest.approx(prediction.probability, abs=1e-5)


def test_info_has_the_fields_of_text_embeddings_inference(server):
    info = httpx.get(f"{server.url}/info").json()
    required = {"model_id", "model_dtype", "model_type", "max_concurrent_requests", "version"}
    required |= {"max_input_length", "max_batch_tokens", "max_client_batch_size", "auto_truncate"}
    assert required | {"tokenization_workers", "criterion", "num_layers"} <= info.keys()
    labels = info["model_type"]["classifier"]
    assert labels["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert labels["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert info["criterion"]["criterion"] == "patience" and info["num_layers"] == 5


def test_metrics_count_rows_and_layers(server):
    def value(name):
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ("te_request_count", "te_request_success", "pabee_exit_layer_count")
    before = [value(name) for name in names]
    saved = value("pabee_layers_saved")
    response = server.post({"inputs": [[TEXTS[1]], [TEXTS[2]]]})
    assert [value(name) for name in names] == [before[0] + 1, before[1] + 1, before[2] + 2]
    assert value("pabee_layers_saved") == saved + sum(5 - n for n in exit_layers(response))
    assert value("pabee_rows_in_flight") == value("te_queue_size") == 0


LONG = " ".join(["good"] * 100)
REFUSED = {
    "no inputs": ({}, 422, "Validation"),
    "an empty batch": ({"inputs": []}, 422, "Validation"),
    "three texts": ({"inputs": ["a", "b", "c"]}, 422, "Validation"),
    "a number": ({"inputs": 3}, 422, "Validation"),
    "a mixed list": ({"inputs": ["a", ["b"]]}, 422, "Validation"),
    "an unknown direction": ({"inputs": "a", "truncation_direction": "Up"}, 422, "Validation"),
    "negative patience": ({"inputs": "a", "patience": -1}, 422, "Validation"),
    "two criteria": (
        {"inputs": "a", "patience": 1, "criterion": {"criterion": "vote", "votes": 1}},
        422,
        "Validation",
    ),
    "an unknown criterion": (
        {"inputs": "a", "criterion": {"criterion": "hunch"}},
        422,
        "Validation",
    ),
    "another criterion": (
        {"inputs": "a", "criterion": {"criterion": "vote", "votes": 1}},
        422,
        "Validation",
    ),
    "too many rows": ({"inputs": [["a"]] * 41}, 413, "Validation"),
    "too many tokens": ({"inputs": LONG}, 413, "Validation"),
    "too many tokens, not truncated": ({"inputs": LONG, "truncate": False}, 413, "Validation"),
    "a megabyte": ({"inputs": "good " * 200_000}, 413, "Validation"),
    "a megabyte, truncated to the left": (
        {"inputs": "x" * 2_100_000, "truncate": True, "truncation_direction": "Left"},
        413,
        "Validation",
    ),
    "10,000 rows": ({"inputs": [["a"]] * 10_000}, 413, "Validation"),
    "three megabytes": ({"inputs": "x" * 3_000_000}, 413, "Validation"),
    "half a surrogate pair": ('{"inputs": "\\ud800"}', 422, "Tokenizer"),
    "half a surrogate pair as a key": (
        '{"inputs": "a", "criterion": {"criterion": "patience", "\\ud800": 1}}',
        422,
        "Validation",
    ),
    "a threshold of lists of unequal lengths": (
        '{"inputs": "a", "criterion": {"criterion": "entropy", "threshold": [[1], [1, 2]]}}',
        422,
        "Validation",
    ),
    "a deep threshold": (
        '{"inputs": "a", "criterion": {"criterion": "max_probability", "threshold": '
        + "[" * 500
        + "]" * 500
        + "}}",
        422,
        "Validation",
    ),
    "deep inputs": ('{"inputs": ' + "[" * 900 + "]" * 900 + "}", 422, "Validation"),
    "a deep body": ("[" * 100_000 + "]" * 100_000, 422, "Validation"),
    "not a number": ('{"inputs": NaN}', 422, "Validation"),
    "a patience that is not a number": ('{"inputs": "a", "patience": NaN}', 422, "Validation"),
    "a threshold that is not a number": (
        '{"inputs": "a", "criterion": {"criterion": "max_probability", "threshold": NaN}}',
        422,
        "Validation",
    ),
    "a patience of 5000 digits": (
        '{"inputs": "a", "patience": ' + "9" * 5000 + "}",
        422,
        "Validation",
    ),
    "malformed JSON": ('{"inputs": ', 422, "Validation"),
    "not UTF-8": (b'{"inputs": "\xff"}', 422, "Validation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_and_hurts_no_other(server, name):
    body, status, error_type = REFUSED[name]
    if isinstance(body, dict):
        response = server.post(body)
    else:
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{server.url}/predict", content=body, headers=headers)
    assert (response.status_code, response.json()["error_type"]) == (status, error_type)
    assert response.json()["error"]
    assert server.post({"inputs": TEXTS[0]}).status_code == 200


MISTAKES = {
    '{"inputs": ["one", "two", "three"]}': "it is one list of 3 texts, but .* for a batch, give",
    '{"inputs": []}': "the list is empty; it must be a text, a pair .*, or a batch",
    '{"inputs": [[]]}': "item 0 of the batch has 0 texts, but it must have one or two",
    '{"inputs": [["a"], ["a", "b", "c"]]}': "item 1 of the batch has 3 texts",
    '{"inputs": ["a", ["b"]]}': "the list has both texts and other values",
    '{"inputs": [["a"], "b"]}': "the list has both texts and other values",
    '{"inputs": [[["a"]]]}': r"item 0 is \[\['a'\]\]; it must be",
    '{"inputs": [["a", null]]}': r"item 0 is \['a', None\]; it must be",
    '{"inputs": [7592, 2088]}': "item 0 is 7592; it must be",
    '{"inputs": {"text": "a"}}': r"it is {'text': 'a'}; it must be a text",
    '{"inputs": 3}': "it is 3; it must be a text",
    '{"input": "a"}': "Field required",
}


@pytest.mark.parametrize("path", ["/predict", "/"])
@pytest.mark.parametrize("body", MISTAKES)
def test_an_error_names_the_mistake(server, body, path):
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}{path}", content=body, headers=headers)
    assert response.status_code == 422
    assert re.match(f"body.inputs: {MISTAKES[body]}", response.json()["error"]), response.text


def test_a_body_that_is_not_declared_as_json_is_told_the_header(server):
    response = httpx.post(f"{server.url}/predict", content='{"inputs": "a"}')
    assert response.status_code == 422
    assert "content-type: application/json" in response.json()["error"]


@pytest.mark.parametrize("path", ["/predict", "/"])
def test_fields_that_the_service_does_not_know_have_no_effect(server, path):
    """As in text-embeddings-inference; clients of Hugging Face and of OpenAI send some."""
    others = {"model": "m", "options": {"wait_for_model": True}, "user": "u", "patence": [None]}
    others |= {"parameters": {"unknown": 1}} if path == "/" else {"parameters": 3}
    plain, full = (server.post({"inputs": TEXTS[5]} | more, path) for more in ({}, others))
    assert plain.status_code == full.status_code == 200, full.text
    assert plain.json() == full.json()


@pytest.mark.parametrize("path", ["/predict", "/"])
@pytest.mark.parametrize("direction", ["Left", "Right", "left", None])
def test_the_end_that_is_cut_is_that_of_the_request(
    server, classifier, checkpoint, direction, path
):
    text = "bad plot " + "good " * 60 + "film"
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        checkpoint, truncation_side=(direction or "right").lower()
    )
    row = tokenizer(text, truncation=True, max_length=32)
    tokens = {name: [row[name]] for name in ("input_ids", "token_type_ids")}
    body = {"inputs": [[text]], "truncate": True, "truncation_direction": direction}
    response = server.post(body, path)
    check_row(response.json()[0], exit_layers(response)[0], classifier.predict(tokens), 0)


@pytest.mark.parametrize("inputs", ["", "a\0b", [["", ""]], "good\n\nfilm"])
def test_unusual_texts_are_answered_as_predict_does(server, classifier, inputs):
    response = server.post({"inputs": inputs})
    text = tuple(inputs[0]) if isinstance(inputs, list) else inputs
    scores = response.json()[0] if isinstance(inputs, list) else response.json()
    check_row(scores, exit_layers(response)[0], classifier.predict([text]), 0)


def test_a_long_text_can_be_truncated(server, classifier):
    response = server.post({"inputs": LONG, "truncate": True})
    check_row(response.json(), exit_layers(response)[0], classifier.predict([LONG]), 0)


def test_texts_that_are_tokenized_at_the_same_time_are_truncated_each_as_it_asks(server):
    """A tokenizer keeps the truncation of its last call, also for calls of other threads."""

    def send(row):
        truncate = row % 2 == 0
        body = {"inputs": "good " * 3000, "truncate": truncate}
        return truncate, server.post(body).status_code

    with ThreadPoolExecutor(8) as threads:
        for truncate, status in threads.map(send, range(120)):
            assert status == (200 if truncate else 413)


def test_a_client_that_goes_away_leaves_nothing_behind(server):
    for _ in range(5):
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
            body = json.dumps({"inputs": [[text] for text in TEXTS[:40]]}).encode()
            head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            client.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
    assert server.post({"inputs": TEXTS[0]}).status_code == 200
    for _ in range(50):
        text = httpx.get(f"{server.url}/metrics").text
        if "pabee_rows_in_flight 0.0" in text and "te_queue_size 0.0" in text:
            return
        time.sleep(0.1)
    raise AssertionError("rows of clients that have gone remain")


@pytest.fixture
def service(checkpoint, request):
    """A service in this process that is not warmed up, with the limits that the test gives."""
    from pabee_jax.inference.engine import EngineConfig
    from pabee_jax.serving.service import Limits, Service

    limits, sizes = getattr(request, "param", ({}, {}))
    service = Service.open(checkpoint, limits=Limits(**limits), config=EngineConfig(**sizes))
    service.is_ready = True
    yield service
    service.engine.close()


def send(service, requests):
    """Return the responses of (method, path, options) that are sent at the same time."""
    from pabee_jax.serving.app import make_app

    transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)

    async def run():
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await asyncio.gather(
                *(client.request(method, path, **options) for method, path, options in requests)
            )

    return asyncio.run(run())


@pytest.mark.parametrize("service", [({}, {"max_waiting": 1})], indirect=True)
@pytest.mark.parametrize(
    "fields",
    [
        {"truncate": True, "explain": True},
        pytest.param({"truncate": True}, marks=pytest.mark.slow),
    ],
)
def test_requests_that_are_too_many_are_refused_before_they_are_tokenized(
    service, fields, monkeypatch
):
    from pabee_jax.checkpoints.pretrained import Pretrained

    encode, rows = Pretrained.encode, []

    def counted(self, texts, *arguments, **settings):
        rows.extend(texts)
        return encode(self, texts, *arguments, **settings)

    monkeypatch.setattr(Pretrained, "encode", counted)
    body = {"inputs": "good " * 100_000} | fields
    responses = send(service, [("POST", "/predict", {"json": body})] * 60)
    statuses = [response.status_code for response in responses]
    assert statuses.count(200) == len(rows) < 60
    assert statuses.count(429) == 60 - len(rows)
    refused = responses[statuses.index(429)].json()
    assert refused["error_type"] == "Overloaded"
    assert "1 rows wait, and at most 1 may" in refused["error"]
    again = [send(service, [("POST", "/predict", {"json": body})])[0] for _ in range(3)]
    assert [response.status_code for response in again] == [200] * 3
    assert service.engine.num_waiting == 0


ORIGIN = "https://pages.example"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.mark.parametrize(
    ("service", "allowed"),
    [
        (({"api_key": "key", "cors_allow_origin": (ORIGIN, "https://b.example")}, {}), ORIGIN),
        (({"api_key": "key", "cors_allow_origin": ("*",)}, {}), "*"),
        (({"api_key": "key", "cors_allow_origin": ("https://b.example",)}, {}), None),
        (({"api_key": "key"}, {}), None),
    ],
    indirect=["service"],
)
def test_pages_of_allowed_origins_may_use_the_service(service, allowed, monkeypatch):
    """The preflight has no key. Errors have the header too, or a page could not read them."""
    from pabee_jax.inference import engine

    key = {"origin": ORIGIN, "authorization": "Bearer key"}
    preflight, answer, no_key, wrong, large = send(
        service,
        [
            ("OPTIONS", "/predict", {"headers": PREFLIGHT}),
            ("POST", "/predict", {"json": {"inputs": "good"}, "headers": key}),
            ("POST", "/predict", {"json": {"inputs": "good"}, "headers": {"origin": ORIGIN}}),
            ("POST", "/predict", {"json": {"inputs": 3}, "headers": key}),
            ("POST", "/predict", {"content": b"x" * 3_000_000, "headers": key}),
        ],
    )

    def fail(*_, **__):
        raise RuntimeError("the device failed")

    monkeypatch.setattr(engine, "_advance", fail)
    (failed,) = send(service, [("POST", "/predict", {"json": {"inputs": "good"}, "headers": key})])
    answers = [answer, no_key, wrong, large, failed]
    assert [response.status_code for response in answers] == [200, 401, 422, 413, 424]
    for response in answers + [preflight] * (allowed is not None):
        assert response.headers.get("access-control-allow-origin") == allowed
    if allowed:
        assert preflight.status_code == 200
        headers = preflight.headers["access-control-allow-headers"].lower()
        assert "authorization" in headers and "content-type" in headers
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "x-exit-layers" in answer.headers["access-control-expose-headers"]
    elif service.limits.cors_allow_origin:
        assert preflight.status_code == 400
    else:
        assert preflight.status_code == 405 and preflight.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "a.example", "https://a.example/page", "https://*.example"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(InputError, match="--cors_allow_origin is .* without a path or a slash"):
        ServeOptions(checkpoint="c", cors_allow_origin=(origin,))


def test_scores_that_are_not_finite_are_an_error(service, monkeypatch):
    """JSON has no NaN; a client would read null."""
    from pabee_jax.inference import engine

    advance = engine._advance

    def broken(*arguments, **sizes):
        rows = advance(*arguments, **sizes)
        exits = rows.exits._replace(logits=rows.exits.logits * np.nan)
        return rows._replace(exits=exits)

    monkeypatch.setattr(engine, "_advance", broken)
    (response,) = send(service, [("POST", "/predict", {"json": {"inputs": "good"}})])
    assert (response.status_code, response.json()["error_type"]) == (424, "Backend")
    assert "not finite" in response.json()["error"]


def test_the_warmup_compiles_the_programs_of_all_requests(service):
    from pabee_jax.inference import engine, programs

    service.warmup()
    compiled = [
        program for name in ("_empty", "_admit", "_advance") for program in [getattr(engine, name)]
    ] + [programs.run_full_pool]
    sizes = [program._cache_size() for program in compiled]
    criterion = {"criterion": "max_probability", "threshold": 0.6}
    for fields in ({}, {"patience": 2}, {"criterion": criterion}, {"explain": True}):
        for inputs in (TEXTS[0], [TEXTS[8], TEXTS[7]], [[text] for text in TEXTS[:32]]):
            (response,) = send(
                service, [("POST", "/predict", {"json": {"inputs": inputs} | fields})]
            )
            assert response.status_code == 200, response.text
    assert [program._cache_size() for program in compiled] == sizes


@pytest.mark.slow
def test_a_key_a_full_queue_and_sigterm_under_load(checkpoint, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    arguments = [f"--api_key_file={tmp_path / 'key'}", "--max_waiting=64"]
    output = (tmp_path / "output").open("w")
    server = start(checkpoint, *arguments, stdout=output)
    key = {"headers": {"authorization": "Bearer secret"}}
    assert server.post({"inputs": "good"}).status_code == 401
    wrong = server.post({"inputs": "good"}, headers={"authorization": "Bearer Secret"})
    assert (wrong.status_code, wrong.json()["error_type"]) == (401, "Unauthorized")
    assert server.post({"inputs": "good"}, **key).status_code == 200
    results, stopping = [], threading.Event()

    def client(index):
        body = {"inputs": [[TEXTS[(index + row) % 60]] for row in range(30)]}
        while not stopping.is_set():
            try:
                results.append(server.post(body, **key).status_code)
            except httpx.TransportError as error:
                # The service no longer accepts connections, or resets those that it has not
                # accepted. Its last line says whether the accepted requests were answered.
                assert isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError), error
                return

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, index) for index in range(8)]
        time.sleep(3)
        status = server.stop()
        stopping.set()
        for future in clients:
            future.result()
    assert status in (0, -signal.SIGTERM)
    assert results.count(200) > 10 and set(results) <= {200, 429}
    assert 429 in results, "the queue was never full"
    output.close()
    last = (tmp_path / "output").read_text().splitlines()[-1]
    answered, accepted = re.fullmatch(
        r"stopped: (\d+) of (\d+) accepted requests were answered", last
    ).groups()
    assert answered == accepted and int(answered) >= len(results)


def test_the_page_is_one_file_without_external_requests(server):
    text = httpx.get(server.url).text
    assert text.startswith("<!doctype html>") and "Early exit" in text
    assert "http://" not in text and "https://" not in text and "src=" not in text


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_lines_of_the_documentation(server, classifier):
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = re.findall(r"^curl (?:.*\\\n)*.*$", "\n".join(blocks), re.MULTILINE)
    answers = []
    for command in commands:
        command = command.replace("localhost:8000", server.url)
        done = subprocess.run(
            f"{command} --silent --fail-with-body", shell=True, capture_output=True, text=True
        )
        assert done.returncode == 0, command + done.stdout + done.stderr
        answers.append(done.stdout)
    single, two, pair, batch, explained = map(json.loads, answers[:5])
    predictions = classifier.predict(["a text", ("a text", "and its pair")])
    layers = predictions.exit_layers.tolist()
    check_row(single, layers[0], predictions, 0)
    check_row(pair, layers[1], predictions, 1)
    for row, scores in enumerate(batch):
        check_row(scores, layers[row], predictions, row)
    assert len(explained["exits"]) == classifier.num_layers
    assert two[0] == single and len(two) == 2
    health, info, metrics = answers[5:]
    assert health == "" and json.loads(info)["num_layers"] == classifier.num_layers
    assert "te_request_count" in metrics


@pytest.mark.slow
def test_schemathesis_finds_nothing_unhandled(server, tmp_path):
    """Requests that the OpenAPI description allows, and requests that it does not allow.

    It may refuse requests that the description allows: a patience beside a criterion, for example.
    """
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--max-examples=200", "--seed=1", "--exclude-checks=positive_data_acceptance"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_the_memory_does_not_grow_over_many_requests(checkpoint, capsys):
    requests, threads = 100_000, 8
    server = start(checkpoint, "--auto_truncate")

    def resident_mb():
        pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def send(count):
        with httpx.Client(timeout=60) as client:
            for row in range(count):
                body = {"inputs": TEXTS[row % 60], "explain": row % 100 == 0}
                assert client.post(f"{server.url}/predict", json=body).status_code == 200
                if row % 1000 == 0:  # Errors must not keep memory either.
                    client.post(f"{server.url}/predict", json={"inputs": "good " * 50_000})

    sizes = []
    for _ in range(10):
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(send, [requests // 10 // threads] * threads))
        sizes.append(resident_mb())
    server.stop()
    with capsys.disabled():
        print(f"\nresident MB after each of ten times {requests // 10} requests: {sizes}")
    # The first requests fill the buffers of the allocator and of JAX.
    assert sizes[-1] - sizes[2] < 0.03 * sizes[2]
