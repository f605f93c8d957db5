"""The engine answers every row as `predict` does, in any mix of arrivals, and loses no row."""

import asyncio
import concurrent.futures
import threading
import time

import numpy as np
import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from helpers import film_texts, tiny_classifier
from pabee_jax import Consistency, EarlyExitClassifier, InputError, MaxProbability, Patience
from pabee_jax.analysis.operating_points import within_rounding_margin
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import CRITERIA
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.tokenization import TooManyTokens
from pabee_jax.inference import engine as engine_module
from pabee_jax.inference.engine import Closed, Engine, EngineConfig, Overloaded
from pabee_jax.inference.programs import run_full_pool

TEXTS = film_texts(60)
SIZES = EngineConfig(max_tokens=96, max_rows=12)
# As in the comparisons with transformers. Programs of other sizes round otherwise, and the random
# layers amplify that: by up to 2.6e-5, on some CPUs.
TOLERANCE = 1e-4


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
        np.testing.assert_allclose(answer.logits, logits, atol=TOLERANCE)
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


@pytest.fixture
def encoded(monkeypatch):
    """The texts of every call of the tokenizer, each of which takes 50 ms."""
    calls, encode = [], Pretrained.encode

    def slow(self, texts, *arguments, **settings):
        calls.append(texts)
        time.sleep(0.05)
        return encode(self, texts, *arguments, **settings)

    monkeypatch.setattr(Pretrained, "encode", slow)
    return calls


def outcomes(engine, calls, **settings):
    """Return the answers or the error of calls that are made at the same time."""

    async def run():
        predictions = [engine.predict(texts, **settings) for texts in calls]
        return await asyncio.gather(*predictions, return_exceptions=True)

    return asyncio.run(run())


def test_rows_that_are_too_many_are_refused_before_they_are_tokenized(classifier, encoded):
    with Engine(classifier, EngineConfig(96, 12, max_waiting=1)) as engine:
        engine.warmup()
        results = outcomes(engine, [["good " * 100_000]] * 60)
        assert engine.num_waiting == 0
    assert [len(texts) for texts in encoded] == [1]
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert len(refused) == 59 and len(results[0]) == 1


def test_a_call_is_accepted_as_a_whole_or_not_at_all(classifier, encoded):
    """32 rows when 31 may still wait, and then 31."""
    with Engine(classifier, EngineConfig(max_waiting=40)) as engine:
        first, large, small = outcomes(engine, [TEXTS[:9], TEXTS[:32], TEXTS[:31]])
        assert engine.num_waiting == 0
    assert isinstance(large, Overloaded) and "9 rows wait, and at most 40 may" in str(large)
    assert [len(first), len(small)] == [9, 31]
    assert sorted(map(len, encoded)) == [9, 31]


@pytest.mark.parametrize(
    ("texts", "accepted"),
    [
        (["g" * 600, "g" * 400, "g"], [True, True, False]),
        (["g" * 5000, "g"], [True, False]),  # A text alone is always accepted.
        (["é" * 300, "g" * 401], [True, False]),
        ([("g" * 500, "g" * 500), "g"], [True, False]),
        (["", "g" * 1000, ""], [True, True, True]),
    ],
)
def test_the_bytes_of_the_texts_that_wait_are_limited(classifier, encoded, texts, accepted):
    with Engine(classifier, EngineConfig(96, 12, max_waiting_bytes=1000)) as engine:
        results = outcomes(engine, [[text] for text in texts])
        assert [not isinstance(result, Overloaded) for result in results] == accepted
        (answer,) = outcomes(engine, [["g" * 1000]])  # All bytes are released.
        assert not isinstance(answer, Exception)


@pytest.mark.parametrize("fault", ["a text", "tokens", "the criterion", "the device", "the exits"])
def test_a_call_that_fails_no_longer_counts(classifier, monkeypatch, fault):
    def fail(*_, **__):
        raise RuntimeError("the device failed")

    program = {"the device": "_advance", "the exits": "run_full_pool"}.get(fault)
    if program:
        monkeypatch.setattr(engine_module, program, fail)
    texts = ["\ud800"] if fault == "a text" else ["good " * 100]
    criterion = MaxProbability([0.5]) if fault == "the criterion" else None
    settings = {"truncate": fault != "tokens", "all_exits": fault == "the exits"}
    with Engine(classifier, SIZES) as engine:
        (error,) = outcomes(engine, [texts], criterion=criterion, **settings)
        assert isinstance(error, RuntimeError if program else InputError)
        assert isinstance(error, TooManyTokens) == (fault == "tokens")
        if fault == "the criterion":
            with pytest.raises(InputError):
                engine.submit(classifier.tokenize(TEXTS[:2]), criterion)
        assert engine.num_waiting == engine._waiting_bytes == 0


@pytest.mark.parametrize("place", ["encode", "_advance", "run_full_pool"])
def test_a_call_that_is_cancelled_no_longer_counts(classifier, monkeypatch, place):
    """In tokenization, in the pool and in an explanation."""
    owner = Pretrained if place == "encode" else engine_module
    entered, goes_on, function = threading.Event(), threading.Event(), getattr(owner, place)

    def blocked(*arguments, **settings):
        entered.set()
        assert goes_on.wait(60)
        return function(*arguments, **settings)

    async def run(engine):
        task = asyncio.create_task(engine.predict(TEXTS[:2], all_exits=True))
        assert await asyncio.to_thread(entered.wait, 60)
        assert engine.num_waiting == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_waiting == engine._waiting_bytes == 0
        goes_on.set()
        return await engine.predict(TEXTS[:3])

    monkeypatch.setattr(owner, place, blocked)
    with Engine(classifier, EngineConfig(96, 12, max_waiting=3)) as engine:
        check_answers(asyncio.run(run(engine)), expected(classifier, TEXTS[:3], Patience(1)))


def test_answered_rows_make_room_at_once(classifier):
    """Whoever has an answer may submit the next row: nothing is released only later."""
    tokens = classifier.tokenize(TEXTS[:1])
    with Engine(classifier, EngineConfig(96, 12, max_waiting=1)) as engine:
        for _ in range(50):
            engine.submit(tokens)[0].result()
        (future,) = engine.submit(tokens)
        future.cancel()
        deadline = time.monotonic() + 10
        while engine.num_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.num_waiting == 0


def test_a_compilation_does_not_block_callers(classifier, monkeypatch):
    """Callers submit on the event loop, while the first row of a criterion compiles programs."""
    compiling, compiled, empty = threading.Event(), threading.Event(), engine_module._empty

    def slow(*arguments, **sizes):
        compiling.set()
        assert compiled.wait(60)
        return empty(*arguments, **sizes)

    tokens = classifier.tokenize(TEXTS[:2])
    with Engine(classifier, SIZES) as engine:
        engine.warmup()
        monkeypatch.setattr(engine_module, "_empty", slow)
        first = engine.submit(tokens, MaxProbability(0.4))
        assert compiling.wait(60)
        threads = concurrent.futures.ThreadPoolExecutor(2)
        submitted = [threads.submit(engine.submit, tokens, each) for each in (None, Patience(2))]
        try:
            done, _ = concurrent.futures.wait(submitted, timeout=10)
        finally:
            compiled.set()
        assert len(done) == 2, "submit waits for the compilation of another criterion"
        answers = [future.result() for future in first]
        check_answers(answers, expected(classifier, TEXTS[:2], MaxProbability(0.4)))
        for future, setting in zip(submitted, (Patience(1), Patience(2)), strict=True):
            answers = [answer.result() for answer in future.result()]
            check_answers(answers, expected(classifier, TEXTS[:2], setting))


def test_each_call_truncates_as_it_asks(classifier, request):
    """A tokenizer keeps the truncation of its last call, also for calls of other threads."""
    texts = ["bad plot " + "good " * 60 + "film", ("film " * 9 + "plot", "a bad " + "good " * 70)]
    limit = classifier.pretrained.max_length
    directory = classifier.pretrained.tokenizer.name_or_path
    answers_of_side = {}
    for side in ("left", "right"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, truncation_side=side)
        rows = [
            tokenizer(*([t] if isinstance(t, str) else t), truncation=True, max_length=limit)
            for t in texts
        ]
        assert [len(row["input_ids"]) for row in rows] == [limit, limit]
        names = ("input_ids", "token_type_ids")
        tokens = {name: np.array([row[name] for row in rows]) for name in names}
        answers_of_side[side] = classifier.predict(tokens)
    layers = {side: of_side.logits for side, of_side in answers_of_side.items()}
    assert np.abs(layers["left"] - layers["right"]).max() > 1e-2

    async def run(engine):
        settings = [
            {"truncation_side": "left"},
            {"truncate": False},
            {},
            {"truncation_side": "right"},
        ]
        calls = [engine.predict(texts, **settings[call % 4]) for call in range(80)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with Engine(classifier, EngineConfig(tokenizer_threads=4)) as engine:
        results = asyncio.run(run(engine))
    for call, result in enumerate(results):
        if call % 4 == 1:
            assert isinstance(result, TooManyTokens)
            assert "input 0 has more tokens than the 32" in str(result)
        else:
            check_answers(result, answers_of_side["right" if call % 4 else "left"])
    check_answers(results[0], answers_of_side["left"])
    assert classifier.predict(texts).exit_layers.tolist() == (
        answers_of_side["right"].exit_layers.tolist()
    )


def test_all_exits_are_answered_with_one_program(classifier):
    texts = TEXTS[:40]  # More than one pool.
    with Engine(classifier, SIZES) as engine:
        engine.warmup(all_exits=True)
        compiled = run_full_pool._cache_size()
        answers = asyncio.run(engine.predict(texts, all_exits=True))
        (single,) = asyncio.run(engine.predict(TEXTS[3:4], all_exits=True))
        assert run_full_pool._cache_size() == compiled
        assert asyncio.run(engine.predict(texts))[0].exit_logits is None
    check_answers(answers, expected(classifier, texts, Patience(1)))
    logits = np.stack([answer.exit_logits for answer in answers], axis=1)
    np.testing.assert_allclose(logits, classifier.all_exit_logits(texts), atol=TOLERANCE)
    np.testing.assert_allclose(single.exit_logits, logits[:, 3], atol=TOLERANCE)
    for answer in answers:
        np.testing.assert_allclose(
            answer.logits, answer.exit_logits[answer.exit_layer - 1], atol=TOLERANCE
        )


def test_closing_answers_the_rows_that_wait_and_refuses_new_ones(classifier):
    engine = Engine(classifier, SIZES)
    futures = engine.submit(classifier.tokenize(TEXTS))
    engine.close()
    answers = [future.result(timeout=0) for future in futures]
    check_answers(answers, expected(classifier, TEXTS, Patience(1)))
    with pytest.raises(Closed, match="the engine is closed"):
        engine.submit(classifier.tokenize(TEXTS[:1]))
    with pytest.raises(Closed, match="the engine is closed"):
        asyncio.run(engine.predict(TEXTS[:1]))


def test_rows_that_are_tokenized_while_the_engine_closes_are_refused(classifier, encoded):
    async def run(engine):
        task = asyncio.create_task(engine.predict(TEXTS[:2]))
        while not encoded:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(task, return_exceptions=True)

    engine = Engine(classifier, SIZES)
    (error,) = asyncio.run(run(engine))
    assert isinstance(error, Closed) and engine.num_waiting == 0


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
    with Engine(classifier, SIZES) as engine:
        engine.warmup()
        with monkeypatch.context() as patch:

            def fail(*arguments, **sizes):
                raise RuntimeError("the device failed")

            patch.setattr(engine_module, "_advance", fail)
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


def test_the_engine_refuses_the_tokens_that_predict_refuses(tmp_path):
    """A compiled program gives NaN for a token id outside the vocabulary."""
    classifier = EarlyExitClassifier.from_pretrained(
        tiny_classifier(tmp_path, 2, model_type="bert")
    )
    size = classifier.config.vocab_size

    def tokens(token_id, token_type, mask=1):
        arrays = ([[2, token_id, 3]], [[1, mask, 1]], [[0, token_type, 0]])
        return Dataset(*(np.array(values, np.int32) for values in arrays))

    with Engine(classifier, SIZES) as engine:
        for wrong in (tokens(size, 0), tokens(-1, 0), tokens(5, 2), tokens(5, -1), tokens(5, 0, 2)):
            with pytest.raises(InputError) as of_predict:
                classifier.predict(wrong)
            with pytest.raises(InputError) as of_engine:
                engine.submit(wrong)
            assert str(of_engine.value) == str(of_predict.value)
        assert np.isfinite(engine.submit(tokens(size - 1, 1))[0].result().logits).all()
    tokenizer = classifier.pretrained.tokenizer
    tokenizer.add_tokens(["zebra"])  # Its id is the size of the vocabulary.
    check_refusal(classifier, ["a zebra"], "the model's vocabulary has")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:2 [SEP]:0", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    check_refusal(classifier, ["a film"], "gives token type 2, but the model has 2 types")


def check_refusal(classifier, texts, message):
    with pytest.raises(InputError, match=message):
        classifier.predict(texts)
    with Engine(classifier, SIZES) as engine, pytest.raises(InputError, match=message):
        asyncio.run(engine.predict(texts))


def test_no_program_is_compiled_after_the_warmup(classifier):
    with Engine(classifier, SIZES) as engine:
        engine.warmup()
        compiled = engine_module._admit._cache_size(), engine_module._advance._cache_size()
        for rows in (1, 2, 12, 30):
            concurrent.futures.wait(engine.submit(classifier.tokenize(TEXTS[:rows])))
        assert (
            engine_module._admit._cache_size(),
            engine_module._advance._cache_size(),
        ) == compiled


def test_a_row_that_would_never_fit_is_refused(classifier):
    ids = np.ones((1, 5000), np.int32)
    tokens = Dataset(ids, ids.astype(np.int8), np.zeros_like(ids, np.int8))
    with Engine(classifier, SIZES) as engine:
        with pytest.raises(InputError, match="a row has 5000 tokens, and at most 32 are allowed"):
            engine.submit(tokens)
        assert engine.submit(tokens.take(slice(0, 0))) == []
        assert engine.submit(classifier.tokenize(TEXTS[:1]))[0].result().exit_layer >= 1
