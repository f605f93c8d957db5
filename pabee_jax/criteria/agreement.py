"""Agreement between exits, beyond patience: of whole distributions, and by majority."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pabee_jax.criteria.base import SWEPT_PATIENCES, Criterion, Logits, predictions, quantiles
from pabee_jax.criteria.registry import registered
from pabee_jax.criteria.validation import set_count, set_number


class DivergenceState(NamedTuple):
    """Attributes:
    counter: (rows,) int32, how many times in a row the exits' distributions were close.
    log_p: (rows, classes) the previous exit's log-probabilities.
    """

    counter: Array
    log_p: Array


def jensen_shannon(log_p: Logits, log_q: Logits) -> Float[Array, " rows"]:
    """KL(p, m) / 2 + KL(q, m) / 2 with m = (p + q) / 2, in nats: from 0 to ln 2."""
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    halves = jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)
    return jnp.maximum(halves.sum(axis=1) / 2, 0)  # Rounding may leave it a little below.


@registered("divergence")
@dataclasses.dataclass(frozen=True)
class Divergence(Criterion):
    """Exit once JS(p_i, p_{i-1}) < `threshold`, `patience` times running (F-PABEE, section 3.2).

    For classification. The earliest exit is layer `patience + 1`.

    Attributes:
        patience: times running, at least 1.
        threshold: in nats, from 0 to 1 (the divergence is at most ln 2).

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
        return DivergenceState(jnp.zeros_like(logits[:, 0], jnp.int32), logits)

    def update(self, state, logits, layer):
        log_p = jax.nn.log_softmax(logits)
        close = jensen_shannon(log_p, state.log_p) < self.threshold
        counter = jnp.where(close & (layer > 1), state.counter + 1, 0)
        return DivergenceState(counter, log_p), counter == self.patience

    @classmethod
    def families(cls, logits, count):
        log_p = jax.nn.log_softmax(logits)
        thresholds = quantiles(jax.vmap(jensen_shannon)(log_p[1:], log_p[:-1]), count)
        return {
            f"patience {patience}": [cls(patience, threshold) for threshold in thresholds]
            for patience in SWEPT_PATIENCES[: len(logits) - 1]
        }

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.patience < num_layers - 1:
            return []
        return [f"patience {self.patience} saves nothing on {num_layers} layers"]


class VoteState(NamedTuple):
    """Attributes:
    votes: (rows, classes) int32, how many exits predicted each class.
    logits: (rows, classes, classes) for each class, the sum of the logits of those exits.
    """

    votes: Array
    logits: Array


@registered("vote")
@dataclasses.dataclass(frozen=True)
class Vote(Criterion):
    """Exit once a class has `votes` predictions among the exits so far.

    For classification; voting is common in the literature on ensembles and multi-exit networks. The
    answer is the mean of the logits of the exits that voted for the class. A row that reaches the
    last layer without such a class answers with that layer's logits.

    Attributes:
        votes: at least 1; 1 leaves at layer 1.

    Raises:
        InputError: fewer than 1 vote.
    """

    votes: int

    def __post_init__(self):
        set_count(self, "votes", least=1)

    def init(self, logits, row):
        del row
        return VoteState(jnp.zeros_like(logits, jnp.int32), logits[:, :, None] * logits[:, None])

    def update(self, state, logits, layer):
        del layer
        voted = jax.nn.one_hot(predictions(logits), logits.shape[1], dtype=jnp.int32)
        votes = state.votes + voted
        # Not a product: infinite logits times 0 would be no number.
        sums = state.logits + jnp.where(voted[:, :, None] > 0, logits[:, None], 0)
        return VoteState(votes, sums), votes.max(axis=1) >= self.votes

    def answer(self, state, logits):
        chosen = jnp.argmax(state.votes, axis=1)[:, None]
        votes = jnp.take_along_axis(state.votes, chosen, axis=1)
        total = jnp.take_along_axis(state.logits, chosen[:, :, None], axis=1)[:, 0]
        return jnp.where(votes >= self.votes, total / jnp.maximum(votes, 1), logits)

    @classmethod
    def families(cls, logits, count):
        del count
        return {"": [cls(votes) for votes in range(len(logits), 0, -1)]}

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.votes < num_layers:
            return []
        return [f"{self.votes} votes save nothing on {num_layers} layers"]
