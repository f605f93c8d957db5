"""Confidence criteria: of one layer, or of several consecutive layers.

All of these criteria are for classification only. In the formulas, p is the softmax of a layer's
logits, H(p) is the entropy of p in nats, and C is the number of classes.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pabee_jax.criteria.base import SWEPT_PATIENCES, Criterion, Logits, predictions, quantiles
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


def energy(logits: Logits, temperature: Float[Array, ""] | float) -> Float[Array, " rows"]:
    """Return -T logsumexp(z / T), the free energy of the logits z at the temperature T."""
    return -temperature * jax.nn.logsumexp(logits / temperature, axis=1)


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

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        is_possible = self.threshold > 0 if self.confident_if_low else self.threshold < 1
        return num_layers > 1 and is_possible


@registered("entropy")
@dataclasses.dataclass(frozen=True)
class Entropy(_Threshold):
    """Exit at the first layer with H(p) / ln C < `threshold`.

    p is the softmax of the exit's logits, H(p) is its entropy in nats, and C is the number of
    classes. From BranchyNet, section III-B; FastBERT, section 3.4; DeeBERT, where the entropy is
    not normalized. For classification only.

    Attributes:
        threshold: from 0 to 1.

    Raises:
        InputError: `threshold` is not a number from 0 to 1.
    """

    measure = staticmethod(normalized_entropy)
    confident_if_low = True


@registered("max_probability")
@dataclasses.dataclass(frozen=True)
class MaxProbability(_Threshold):
    """Exit at the first layer with max p > `threshold`.

    p is the softmax of the exit's logits. From Shallow-Deep Networks, section 4.2; RightTool. For
    classification only.

    Attributes:
        threshold: a probability, from 0 to 1.

    Raises:
        InputError: `threshold` is not a number from 0 to 1.
    """

    measure = staticmethod(highest_probability)


@registered("margin")
@dataclasses.dataclass(frozen=True)
class Margin(_Threshold):
    """Exit at the first layer whose two highest probabilities differ by more than `threshold`.

    The probabilities are the softmax of the exit's logits. From CALM, section 3.5, "softmax
    response". For classification only.

    Attributes:
        threshold: a difference of probabilities, from 0 to 1.

    Raises:
        InputError: `threshold` is not a number from 0 to 1.
    """

    measure = staticmethod(probability_margin)


@registered("energy")
@dataclasses.dataclass(frozen=True)
class Energy(Criterion):
    """Exit at the first layer with -T logsumexp(z / T) < `threshold`, for the logits z.

    From E-LANG, and COSEE (arXiv 2412.13236), section 3.5, which compares the sigmoid of the
    energy with the sigmoid of the threshold.

    Attributes:
        threshold: in units of the logits, usually below 0.
        temperature: T, from 0.01 to 100.

    Raises:
        InputError: `threshold` is not a number, or `temperature` is out of range.
    """

    threshold: float
    temperature: float = 1.0

    def __post_init__(self):
        set_number(self, "threshold")
        set_number(self, "temperature", 0.01, 100)

    def init(self, logits, row):
        del logits, row
        return ()

    def update(self, state, logits, layer):
        del layer
        return state, energy(logits, self.temperature) < self.threshold

    @classmethod
    def families(cls, logits, count):
        energies = jax.vmap(lambda of_exit: energy(of_exit, 1.0))(jnp.asarray(logits))
        return {"": [cls(threshold) for threshold in quantiles(energies, count)]}


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

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        return self.patience < num_layers and self.threshold > 0

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.patience < num_layers:
            return []
        return [f"patience {self.patience} on {num_layers} layers allows no early exit"]


class EnsembleState(NamedTuple):
    """The state of `Ensemble`.

    Attributes:
        confidence: (rows,), the sum of the weighted confidences of the exits that agree.
        prediction: (rows,) int32, the class that the previous exit predicted; -1 before layer 1.
    """

    confidence: Array
    prediction: Array


@registered("ensemble")
@dataclasses.dataclass(frozen=True)
class Ensemble(Criterion):
    """Exit once the summed confidence of consecutive exits that agree is above `threshold`.

    From BEEM (arXiv 2502.00745), equation 2, with the weights of its figure 1: S_i = S_{i-1} + w_i
    max p_i if exit i predicts the class of exit i - 1, and S_i = w_i max p_i otherwise, where w_i =
    i / 10. For classification only. The answer is the exit's own.

    Attributes:
        threshold: at least 0. For L layers, S_i is at most L (L + 1) / 20.

    Raises:
        InputError: `threshold` is not a number, or below 0.
    """

    threshold: float

    def __post_init__(self):
        set_number(self, "threshold", 0)

    def init(self, logits, row):
        del row
        zeros = jnp.zeros_like(logits[:, 0])
        return EnsembleState(zeros, zeros.astype(jnp.int32) - 1)

    def update(self, state, logits, layer):
        prediction = predictions(logits)
        weighted = layer / 10 * highest_probability(logits)
        sums = jnp.where(prediction == state.prediction, state.confidence + weighted, weighted)
        return EnsembleState(sums, prediction), sums > self.threshold

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        return self.threshold < num_layers * (num_layers - 1) / 20  # The largest S before layer L.

    @classmethod
    def families(cls, logits, count):
        state = cls(0.0).init(jnp.asarray(logits[0]), None)
        sums = []
        for layer, of_exit in enumerate(logits, start=1):
            state, _ = cls(0.0).update(state, jnp.asarray(of_exit), layer)
            sums.append(state.confidence)
        return {"": [cls(threshold) for threshold in quantiles(np.array(sums), count)[::-1]]}
