"""Confidence criteria: exit after one confident layer, or after several consecutive layers.

All of these criteria are for classification only. In the formulas, p is the softmax of a layer's
logits, H(p) is the entropy of p in nats, and C is the number of classes.
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


def normalized_entropy(logits: Logits) -> Float[Array, " rows"]:
    """Return H(p) / ln C: from 0 (one class has probability 1) to 1 (uniform)."""
    log_p = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_p) * log_p).sum(axis=1) / jnp.log(logits.shape[1])
    return jnp.clip(entropy, 0, 1)  # Rounding can move the value slightly outside the range.


def highest_probability(logits: Logits) -> Float[Array, " rows"]:
    """Return max p."""
    return jax.nn.softmax(logits).max(axis=1)


def probability_margin(logits: Logits) -> Float[Array, " rows"]:
    """Return the difference between the two highest probabilities."""
    highest = jax.lax.top_k(jax.nn.softmax(logits), 2)[0]
    return highest[:, 0] - highest[:, 1]


@dataclasses.dataclass(frozen=True)
class _Threshold(Criterion):
    """Exit at the first layer whose measure is above or below the threshold.

    Attributes:
        measure: the measure of confidence, from 0 to 1.
        confident_if_low: whether a low measure means confidence.
        threshold: from 0 to 1.

    Raises:
        InputError: `threshold` is not a number from 0 to 1.
    """

    measure: ClassVar[Callable[[Logits], Array]]
    confident_if_low: ClassVar[bool] = False

    threshold: float

    def __post_init__(self):
        set_number(self, "threshold", 0, 1)

    def init(self, logits, row):
        del logits, row
        return ()

    def update(self, state, logits, layer):
        del layer
        value = type(self).measure(logits)
        return state, value < self.threshold if self.confident_if_low else value > self.threshold

    @classmethod
    def families(cls, logits, count):
        thresholds = quantiles(jax.vmap(cls.measure)(jnp.asarray(logits)), count)
        slow_to_fast = thresholds[:: 1 if cls.confident_if_low else -1]
        return {"": [cls(threshold) for threshold in slow_to_fast]}


@registered("entropy")
@dataclasses.dataclass(frozen=True)
class Entropy(_Threshold):
    """Exit at the first layer with H(p) / ln C < `threshold`.

    From BranchyNet, section III-B; FastBERT, section 3.4; DeeBERT, where the entropy is not
    normalized.
    """

    measure = staticmethod(normalized_entropy)
    confident_if_low = True


@registered("max_probability")
@dataclasses.dataclass(frozen=True)
class MaxProbability(_Threshold):
    """Exit at the first layer with max p > `threshold`.

    From Shallow-Deep Networks, section 4.2; RightTool.
    """

    measure = staticmethod(highest_probability)


@registered("margin")
@dataclasses.dataclass(frozen=True)
class Margin(_Threshold):
    """Exit at the first layer whose two highest probabilities differ by more than `threshold`.

    From CALM, section 3.5, "softmax response".
    """

    measure = staticmethod(probability_margin)


@registered("patient_confidence")
@dataclasses.dataclass(frozen=True)
class PatientConfidence(Criterion):
    """Exit once H(p) / ln C < `threshold` at `patience` consecutive layers.

    From PCEE-BERT, section 3.2. The earliest exit layer is `patience`.

    Attributes:
        patience: the number of consecutive layers, at least 1.
        threshold: from 0 to 1.

    Raises:
        InputError: `patience` is below 1, or `threshold` is not a number from 0 to 1.
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
        counter = jnp.where(normalized_entropy(logits) < self.threshold, state + 1, 0)
        return counter, counter == self.patience

    @classmethod
    def families(cls, logits, count):
        thresholds = quantiles(jax.vmap(normalized_entropy)(jnp.asarray(logits)), count)
        return {
            f"patience {patience}": [cls(patience, threshold) for threshold in thresholds]
            for patience in SWEPT_PATIENCES[: len(logits) - 1]
            if patience > 1  # With patience 1, the criterion is the same as `Entropy`.
        }

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.patience < num_layers:
            return []
        return [f"patience {self.patience} on {num_layers} layers allows no early exit"]
