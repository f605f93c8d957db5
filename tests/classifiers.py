"""A small random classifier whose exits disagree, for tests of `EarlyExitClassifier`."""

import pytest

from helpers import tiny_checkpoint
from pabee_jax import EarlyExitClassifier, Patience

TEXTS = ["a film", ("a film", "was good"), "", "the film was not good at all " * 9, "good", "bad"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A plain encoder checkpoint without internal classifiers."""
    words = ["a", "film", "was", "good", "the", "not", "at", "all", "bad"]
    # The initializer is wide enough that exits disagree.
    config = {"num_hidden_layers": 5, "initializer_range": 0.5}
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain", words, **config)


@pytest.fixture(scope="module")
def classifier(directory):
    return EarlyExitClassifier.from_pretrained(
        str(directory), criterion=Patience(1), driver="loop", num_labels=3
    )


def with_driver(classifier, driver, **settings):
    criterion = settings.pop("criterion", classifier.criterion)
    return EarlyExitClassifier(
        classifier.pretrained, criterion=criterion, driver=driver, **settings
    )
