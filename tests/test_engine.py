"""The engine answers every row as `predict` does, in any mix of arrivals, and loses no row."""

import asyncio
import concurrent.futures

import numpy as np
import pytest

from helpers import film_texts, tiny_classifier
from pabee_jax import Consistency, EarlyExitClassifier, InputError, Patience
from pabee_jax.analysis.operating_points import within_rounding_margin
from pabee_jax.criteria import CRITERIA
from pabee_jax.data.dataset import Dataset
from pabee_jax.inference.engine import Engine, EngineConfig, Overloaded

TEXTS = film_texts(60)
SIZES = EngineConfig(max_tokens=96, max_rows=12)


@pytest.fixture(scope="module", params=["albert", pytest.param("bert", marks=pytest.mark.slow)])
def classifier(request, tmp_path_factory):
    """A random classifier, with and without layers that share their parameters."""
    fields = {"embedding_size": 8, "num_hidden_groups": 1} if request.param == "albert" else {}
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny_classifier(folder, 3, model_type=request.param, **fields)
    return EarlyExitClassifier.from_pretrained(checkpoint)


def expected(classifier, texts, criterion):
    classifier.criterion = criterion
    predictions = classifier.predict(texts)
    classifier.criterion = Patience(1)
    return predictions


def check_answers(answers, predictions):
    assert [answer.exit_layer for answer in answers] == predictions.exit_layers.tolist()
    for answer, logits in zip(answers, predictions.logits, strict=True):
        np.testing.assert_allclose(answer.logits, logits, atol=2e-5)
        assert answer.queue_seconds >= 0 and answer.inference_seconds > 0


@pytest.mark.parametrize("layers_per_look", [1, 3])
def test_many_callers_get_the_answers_of_predict(classifier, layers_per_look):
    """64 callers with 1 to 5 texts each, with criteria and patience of their own."""
    shape = classifier.num_layers, classifier.config.num_labels + 2
    coefficients = 4 * np.random.default_rng(0).normal(size=shape)
    criteria = [Patience(1), Patience(2), None]
    criteria += [Consistency(threshold, coefficients.tolist()) for threshold in (0.5, 0.9)]
    calls = [(TEXTS[row : row + 1 + row % 5], criteria[row % 5]) for row in range(50)]
    config = EngineConfig(96, 12, layers_per_look)

    async def run():
        with Engine(classifier, config) as engine:
            tasks = [engine.predict(texts, criterion) for texts, criterion in calls]
            return await asyncio.gather(*tasks)

    for (texts, criterion), answers in zip(calls, asyncio.run(run()), strict=True):
        check_answers(answers, expected(classifier, texts, criterion or Patience(1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_the_engine_runs_every_criterion(classifier, name):
    logits = classifier.all_exit_logits(TEXTS)
    for settings in CRITERIA[name].families(logits, 5).values():
        setting = settings[len(settings) // 2]
        clear = ~within_rounding_margin(setting, logits)
        with Engine(classifier, SIZES) as engine:
            answers = asyncio.run(engine.predict(TEXTS, setting))
        exit_layers = np.array([answer.exit_layer for answer in answers])
        expected_layers = expected(classifier, TEXTS, setting).exit_layers
        np.testing.assert_array_equal(exit_layers[clear], expected_layers[clear])


def test_a_queue_that_is_full_refuses_all_rows_of_a_call(classifier):
    config = EngineConfig(96, 12, max_waiting=8)
    with Engine(classifier, config) as engine:
        tokens = classifier.tokenize(TEXTS[:9])
        with pytest.raises(Overloaded, match="rows wait, and at most 8 may"):
            engine.submit(tokens)
        futures = engine.submit(tokens.take(slice(0, 8)))
        answers = [future.result() for future in futures]
    check_answers(answers, expected(classifier, TEXTS[:8], Patience(1)))


def test_closing_answers_the_rows_that_wait_and_refuses_new_ones(classifier):
    engine = Engine(classifier, SIZES)
    futures = engine.submit(classifier.tokenize(TEXTS))
    engine.close()
    answers = [future.result(timeout=0) for future in futures]
    check_answers(answers, expected(classifier, TEXTS, Patience(1)))
    with pytest.raises(InputError, match="the engine is closed"):
        engine.submit(classifier.tokenize(TEXTS[:1]))


def test_a_row_whose_caller_has_gone_is_dropped(classifier):
    async def run(engine):
        gone = [asyncio.create_task(engine.predict(TEXTS[:20])) for _ in range(3)]
        stays = asyncio.create_task(engine.predict(TEXTS[20:30]))
        await asyncio.sleep(0.05)
        for task in gone:
            task.cancel()
        return await stays

    with Engine(classifier, SIZES) as engine:
        engine.warmup()
        answers = asyncio.run(run(engine))
        check_answers(answers, expected(classifier, TEXTS[20:30], Patience(1)))
    assert engine.num_waiting == engine.num_active == 0


def test_a_failure_of_the_device_reaches_the_callers_and_the_engine_goes_on(
    classifier, monkeypatch
):
    from pabee_jax.inference import engine as module

    with Engine(classifier, SIZES) as engine:
        engine.warmup()
        with monkeypatch.context() as patch:

            def fail(*arguments, **sizes):
                raise RuntimeError("the device failed")

            patch.setattr(module, "_advance", fail)
            futures = engine.submit(classifier.tokenize(TEXTS[:3]))
            concurrent.futures.wait(futures)
            for future in futures:
                with pytest.raises(RuntimeError, match="the device failed"):
                    future.result()
        (future, *_) = engine.submit(classifier.tokenize(TEXTS[:2]))
        assert future.result().exit_layer >= 1


def test_a_criterion_that_does_not_fit_is_refused(classifier):
    with Engine(classifier, SIZES) as engine:
        with pytest.raises(InputError, match="must be an exit criterion"):
            engine.submit(classifier.tokenize(TEXTS[:1]), criterion="patience")
        with pytest.raises(InputError, match="the list of texts is empty"):
            asyncio.run(engine.predict([]))


def test_no_program_is_compiled_after_the_warmup(classifier):
    from pabee_jax.inference import engine as module

    with Engine(classifier, SIZES) as engine:
        engine.warmup()
        compiled = module._admit._cache_size(), module._advance._cache_size()
        for rows in (1, 2, 12, 30):
            concurrent.futures.wait(engine.submit(classifier.tokenize(TEXTS[:rows])))
        assert (module._admit._cache_size(), module._advance._cache_size()) == compiled


def test_a_row_that_would_never_fit_is_refused(classifier):
    ids = np.ones((1, 5000), np.int32)
    tokens = Dataset(ids, ids.astype(np.int8), np.zeros_like(ids, np.int8))
    with Engine(classifier, SIZES) as engine:
        with pytest.raises(InputError, match="a row has 5000 tokens, and at most 32 are allowed"):
            engine.submit(tokens)
        assert engine.submit(tokens.take(slice(0, 0))) == []
        assert engine.submit(classifier.tokenize(TEXTS[:1]))[0].result().exit_layer >= 1
