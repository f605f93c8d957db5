"""The playground page of the service, in headless Chromium."""

import re
import shutil

import numpy as np
import pytest

from helpers import film_texts, one_device_environment, tiny_classifier
from pabee_jax import EarlyExitClassifier, MaxProbability, Patience

pytest.importorskip("fastapi", reason="needs pabee_jax[serve]")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
from benchmarks.service_process import Server  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
TEXT = film_texts(9)[-1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("checkpoint"), 3)


@pytest.fixture(scope="module")
def server(checkpoint):
    server = Server(checkpoint, environment=one_device_environment()).wait_until_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[400, 1400], ids="{}px".format)
def page(request, browser, server):
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    requests, problems = [], []
    page.on("request", lambda sent: requests.append(sent.url))
    page.on("pageerror", lambda problem: problems.append(problem))
    page.goto(server.url)
    yield page
    assert not problems
    assert all(url.startswith(server.url) for url in requests), "the page asks other servers"
    page.close()


def classify(page, text, pair=""):
    page.fill("#text", text)
    page.fill("#pair", pair)
    page.click("#submit")


def shown_exit(page):
    """Return the label and the exit layer that the page shows."""
    found = re.match(r"(.+), after layer (\d+) of 5", page.inner_text("#summary"))
    return found[1], int(found[2])


def test_the_slider_moves_the_exit_as_predict_does(page, checkpoint):
    classify(page, TEXT)
    page.wait_for_selector("#answer:not([hidden])")
    assert page.locator("#rows .row").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    settings = {
        "patience": [Patience(patience) for patience in range(5)],
        "max_probability": [MaxProbability(value) for value in (0.5, 0.6, 0.99)],
    }
    for kind, criteria in settings.items():
        page.select_option("#kind", kind)
        for criterion in criteria:
            value = criterion.patience if kind == "patience" else criterion.threshold
            page.evaluate(
                "value => { const slider = document.getElementById('slider'); slider.value = value;"
                " slider.dispatchEvent(new Event('input')); }",
                float(value),
            )
            classifier = EarlyExitClassifier.from_pretrained(checkpoint, criterion=criterion)
            expected = classifier.predict([TEXT])
            assert shown_exit(page) == (expected.label_strings[0], int(expected.exit_layers[0]))
            row = page.locator("#rows .row.exit")
            assert row.count() == 1
            assert int(row.get_attribute("data-layer")) == expected.exit_layers[0]


def test_each_bar_shows_the_prediction_of_its_layer(page, checkpoint):
    classify(page, TEXT, "a film")
    page.wait_for_selector("#answer:not([hidden])")
    classifier = EarlyExitClassifier.from_pretrained(checkpoint)
    logits = np.asarray(classifier.all_exit_logits([(TEXT, "a film")]))[:, 0]
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = powers / powers.sum(axis=-1, keepdims=True)
    shown = page.locator("#rows .name").all_inner_texts()
    names = classifier.pretrained.label_names
    for text, row in zip(shown, probabilities, strict=True):
        assert text == f"{names[row.argmax()]} {row.max():.2f}"


def test_an_error_is_shown_and_the_page_goes_on(page):
    classify(page, "good " * 200)
    page.wait_for_selector("#error:not([hidden])")
    assert "tokens" in page.inner_text("#error")
    assert page.is_hidden("#answer")
    classify(page, TEXT)
    page.wait_for_selector("#answer:not([hidden])")
    assert page.is_hidden("#error")
