"""Confidence: exit at the first layer, or after several layers running, that is sure enough.

All are for classification; p is the softmax of a layer's logits, H its entropy in nats, C the
number of classes.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pabee_jax.criteria.base import SWEPT_PATIENCES, Criterion, Logits, quantiles
from pabee_jax.criteria.registry import registered
from pabee_jax.criteria.validation import set_count, set_number


def normalised_entropy(logits: Logits) -> Float[Array, " rows"]:
    """H(p) / ln C: from 0 (sure) to 1 (no idea)."""
    log_p = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_p) * log_p).sum(axis=1) / jnp.log(logits.shape[1])
    return jnp.clip(entropy, 0, 1)  # Rounding may leave it a little outside.


def highest_probability(logits: Logits) -> Float[Array, " rows"]:
    """max p."""
    return jax.nn.softmax(logits).max(axis=1)


def probability_margin(logits: Logits) -> Float[Array, " rows"]:
    """The difference between the two highest probabilities."""
    highest = jax.lax.top_k(jax.nn.softmax(logits), 2)[0]
    return highest[:, 0] - highest[:, 1]


@dataclasses.dataclass(frozen=True)
class _Threshold(Criterion):
    """Exit at the first layer whose measure is beyond the threshold.

    Attributes:
        threshold: from 0 to 1.

    Raises:
        InputError: a threshold that is no number from 0 to 1.
    """

    measure: ClassVar[Callable[[Logits], Array]]
    sure_when_low: ClassVar[bool] = False

    threshold: float

    def __post_init__(self):
        set_number(self, "threshold", 0, 1)

    def init(self, logits, row):
        del logits, row
        return ()

    def update(self, state, logits, layer):
        del layer
        value = type(self).measure(logits)
        return state, value < self.threshold if self.sure_when_low else value > self.threshold

    @classmethod
    def families(cls, logits, count):
        thresholds = quantiles(jax.vmap(cls.measure)(jnp.asarray(logits)), count)
        return {"": [cls(each) for each in thresholds[:: 1 if cls.sure_when_low else -1]]}


@registered("entropy")
@dataclasses.dataclass(frozen=True)
class Entropy(_Threshold):
    """Exit at the first layer with H(p) / ln C < `threshold` (BranchyNet, section III-B; DeeBERT,
    where it is not normalised; FastBERT, section 3.4)."""

    measure = staticmethod(normalised_entropy)
    sure_when_low = True


@registered("max_probability")
@dataclasses.dataclass(frozen=True)
class MaxProbability(_Threshold):
    """Exit at the first layer with max p > `threshold` (Shallow-Deep Networks, section 4.2;
    RightTool)."""

    measure = staticmethod(highest_probability)


@registered("margin")
@dataclasses.dataclass(frozen=True)
class Margin(_Threshold):
    """Exit at the first layer whose two highest probabilities differ by more than `threshold`
    (CALM, section 3.5, "softmax response")."""

    measure = staticmethod(probability_margin)


@registered("patient_confidence")
@dataclasses.dataclass(frozen=True)
class PatientConfidence(Criterion):
    """Exit once H(p) / ln C < `threshold` for `patience` layers running (PCEE-BERT, section 3.2).

    The earliest exit is layer `patience`.

    Attributes:
        patience: layers running, at least 1.
        threshold: from 0 to 1.

    Raises:
        InputError: a patience below 1, or a threshold that is no number from 0 to 1.
    """

    patience: int
    threshold: float

    def __post_init__(self):
        set_count(self, "patience", least=1)
        set_number(self, "threshold", 0, 1)

    def init(self, logits, row):
        del row
        return jnp.zeros_like(logits[:, 0], jnp.int32)

    def update(self, state, logits, layer):
        del layer
        counter = jnp.where(normalised_entropy(logits) < self.threshold, state + 1, 0)
        return counter, counter == self.patience

    @classmethod
    def families(cls, logits, count):
        thresholds = quantiles(jax.vmap(normalised_entropy)(jnp.asarray(logits)), count)
        return {
            f"patience {patience}": [cls(patience, threshold) for threshold in thresholds]
            for patience in SWEPT_PATIENCES[: len(logits) - 1]
            if patience > 1  # 1 is the entropy's own criterion.
        }

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.patience < num_layers:
            return []
        return [f"patience {self.patience} saves nothing on {num_layers} layers"]
