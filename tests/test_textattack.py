"""The TextAttack wrapper, tested with a stand-in for TextAttack's base class and results."""

import abc
import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier, InputError, Patience

NAME = "pabee_jax.integrations.textattack"
WORDS = ["a", "film", "was", "good", "not", "bad"]


@pytest.fixture
def integration(monkeypatch):
    """The module, imported with a stand-in for the wrappers' base class of TextAttack 0.3."""

    class ModelWrapper(abc.ABC):
        @abc.abstractmethod
        def __call__(self, text_input_list, **kwargs): ...

    for name in ("textattack", "textattack.models", "textattack.models.wrappers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["textattack.models.wrappers"].ModelWrapper = ModelWrapper
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return importlib.import_module(NAME)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    config = {"num_hidden_layers": 4, "initializer_range": 0.5}
    plain = tiny_checkpoint(tmp_path_factory.mktemp("plain") / "plain", WORDS, **config)
    return EarlyExitClassifier.from_pretrained(str(plain), num_labels=3, criterion=Patience(1))


def attack_result(original, perturbed, truth, queries):
    """A stand-in for TextAttack's AttackResult; `tokenizer_input` is a tuple for pairs of texts."""
    texts = (SimpleNamespace(tokenizer_input=text) for text in (original, perturbed))
    before, after = (
        SimpleNamespace(attacked_text=text, ground_truth_output=truth) for text in texts
    )
    return SimpleNamespace(original_result=before, perturbed_result=after, num_queries=queries)


@pytest.mark.parametrize("texts", [["a film", "was bad", ""], [("a film", "good"), ("bad", "a")]])
def test_the_wrapper_returns_the_probabilities_of_the_exits(integration, classifier, texts):
    wrapper = integration.EarlyExitModelWrapper(classifier)
    probabilities = wrapper(texts)
    assert isinstance(probabilities, np.ndarray) and probabilities.shape == (len(texts), 3)
    # TextAttack applies another softmax to probabilities whose sum differs more from 1.
    assert (np.abs(probabilities.sum(axis=1) - 1) < 1e-6).all()
    predictions = classifier.predict(texts)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), predictions.labels)
    log_ratios = np.log(probabilities[:, 0] / probabilities[:, 1])
    logit_differences = predictions.logits[:, 0] - predictions.logits[:, 1]
    np.testing.assert_allclose(log_ratios, logit_differences, atol=1e-4)


def test_under_attack_compares_accuracy_and_exit_layers_before_and_after(integration, classifier):
    originals = ["a film", "was good", "not bad", "film film"]
    perturbed = ["a bad film", "good was", "not bad", "film not film"]
    before, after = classifier.predict(originals), classifier.predict(perturbed)
    # Before the attack, the first three texts are classified correctly and the last one is not.
    truth = [*before.labels[:3], (before.labels[3] + 1) % 3]
    results = [
        attack_result(*texts_and_truth, 10)
        for texts_and_truth in zip(originals, perturbed, truth, strict=True)
    ]
    effect = integration.under_attack(integration.EarlyExitModelWrapper(classifier), results)
    misled = sum(int(a != t) for a, t in zip(after.labels[:3], truth[:3], strict=True))
    last_is_correct = int(after.labels[3] == truth[3])
    assert effect.accuracy_original == 0.75
    assert effect.accuracy_perturbed == (3 - misled + last_is_correct) / 4
    assert effect.misled == pytest.approx(misled / 3)
    assert effect.mean_exit_layer_original == before.exit_layers.mean()
    assert effect.slowdown == pytest.approx(after.exit_layers.sum() / before.exit_layers.sum())
    assert effect.queries == 10 and "4 texts: accuracy 75.00 -> " in str(effect)


def test_no_results_and_a_regression_model_are_input_errors(integration, classifier, tmp_path):
    with pytest.raises(InputError, match="no attack results"):
        integration.under_attack(integration.EarlyExitModelWrapper(classifier), [])
    plain = tiny_checkpoint(tmp_path / "scores", WORDS)
    regression = EarlyExitClassifier.from_pretrained(str(plain), num_labels=1)
    with pytest.raises(InputError, match="this checkpoint predicts scores"):
        integration.EarlyExitModelWrapper(regression)


def test_without_textattack_the_import_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "textattack", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(InputError, match="TextAttack cannot be imported .* pip install textattack"):
        importlib.import_module(NAME)
