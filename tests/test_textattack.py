"""The TextAttack wrapper keeps TextAttack's interface; a stand-in plays TextAttack's part."""

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
    """The module, imported where only the base class of TextAttack 0.3's wrappers exists."""

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
    shape = {"num_hidden_layers": 4, "initializer_range": 0.5}
    plain = tiny_checkpoint(tmp_path_factory.mktemp("plain") / "plain", WORDS, **shape)
    return EarlyExitClassifier.from_pretrained(str(plain), num_labels=3, criterion=Patience(1))


def result(original, perturbed, truth, queries):
    """What TextAttack's AttackResult has; `tokenizer_input` is a tuple for pairs of texts."""
    texts = (SimpleNamespace(tokenizer_input=text) for text in (original, perturbed))
    before, after = (SimpleNamespace(attacked_text=t, ground_truth_output=truth) for t in texts)
    return SimpleNamespace(original_result=before, perturbed_result=after, num_queries=queries)


@pytest.mark.parametrize("texts", [["a film", "was bad", ""], [("a film", "good"), ("bad", "a")]])
def test_answers_with_probabilities_of_the_exits(integration, classifier, texts):
    wrapper = integration.EarlyExitModelWrapper(classifier)
    probabilities = wrapper(texts)
    assert isinstance(probabilities, np.ndarray) and probabilities.shape == (len(texts), 3)
    # TextAttack takes a softmax of anything that misses this.
    assert (np.abs(probabilities.sum(axis=1) - 1) < 1e-6).all()
    answers = classifier.predict(texts)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), answers.labels)
    ratios = np.log(probabilities[:, 0] / probabilities[:, 1])
    np.testing.assert_allclose(ratios, answers.logits[:, 0] - answers.logits[:, 1], atol=1e-4)


def test_sums_up_an_attack(integration, classifier):
    originals = ["a film", "was good", "not bad", "film film"]
    perturbed = ["a bad film", "good was", "not bad", "film not film"]
    before, after = classifier.predict(originals), classifier.predict(perturbed)
    # Right before: the first three. The last one was wrong from the start.
    truth = [*before.labels[:3], (before.labels[3] + 1) % 3]
    results = [result(*each, 10) for each in zip(originals, perturbed, truth, strict=True)]
    found = integration.under_attack(integration.EarlyExitModelWrapper(classifier), results)
    lost = sum(int(a != t) for a, t in zip(after.labels[:3], truth[:3], strict=True))
    last = int(after.labels[3] == truth[3])
    assert found.accuracy_original == 0.75
    assert found.accuracy_perturbed == (3 - lost + last) / 4
    assert found.misled == pytest.approx(lost / 3)
    assert found.mean_exit_layer_original == before.exit_layers.mean()
    assert found.slowdown == pytest.approx(after.exit_layers.sum() / before.exit_layers.sum())
    assert found.queries == 10 and "4 texts: accuracy 75.00 -> " in str(found)


def test_says_what_cannot_be_attacked(integration, classifier, tmp_path):
    with pytest.raises(InputError, match="no attack results"):
        integration.under_attack(integration.EarlyExitModelWrapper(classifier), [])
    plain = tiny_checkpoint(tmp_path / "scores", WORDS)
    scores = EarlyExitClassifier.from_pretrained(str(plain), num_labels=1)
    with pytest.raises(InputError, match="this checkpoint predicts scores"):
        integration.EarlyExitModelWrapper(scores)


def test_says_that_textattack_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "textattack", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(InputError, match="TextAttack cannot be imported .* pip install textattack"):
        importlib.import_module(NAME)
