"""Criteria for agreement between exits: of their distributions, and by voting."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pabee_jax.criteria.base import SWEPT_PATIENCES, Criterion, Logits, predictions, quantiles
from pabee_jax.criteria.registry import registered
from pabee_jax.criteria.validation import set_count, set_number


class DivergenceState(NamedTuple):
    """The state of `Divergence`.

    Attributes:
        counter: (rows,) int32, the number of consecutive exits whose divergence from the previous
            exit was below the threshold.
        log_p: (rows, classes), the log-probabilities of the previous exit.
    """

    counter: Array
    log_p: Array


def jensen_shannon(log_p: Logits, log_q: Logits) -> Float[Array, " rows"]:
    """Return the Jensen-Shannon divergence in nats, from 0 to ln 2.

    The divergence is KL(p, m) / 2 + KL(q, m) / 2 with m = (p + q) / 2.
    """
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    halves = jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)
    return jnp.maximum(halves.sum(axis=1) / 2, 0)  # Rounding can make the sum slightly negative.


@registered("divergence")
@dataclasses.dataclass(frozen=True)
class Divergence(Criterion):
    """Exit once JS(p_i, p_{i-1}) < `threshold` at `patience` consecutive exits.

    JS is the Jensen-Shannon divergence (F-PABEE, section 3.2). For classification only. The
    earliest exit layer is `patience + 1`.

    Attributes:
        patience: the number of consecutive exits, at least 1.
        threshold: in nats, from 0 to 1 (the divergence is at most ln 2).

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

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        return self.patience < num_layers - 1 and self.threshold > 0

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.patience < num_layers - 1:
            return []
        return [f"patience {self.patience} on {num_layers} layers allows no early exit"]


class VoteState(NamedTuple):
    """The state of `Vote`.

    Attributes:
        votes: (rows, classes) int32, the number of exits that predicted each class.
        predicted: (rows, slots) int32, the classes that exits have predicted, in the order of their
            first prediction; -1 for a slot that is not used.
        logits: (rows, slots, classes), for each class in `predicted` the sum of the logits of the
            exits that predicted this class.
    """

    votes: Array
    predicted: Array
    logits: Array


# The number of slots of a `VoteState`. A sum for every class would take classes x classes values
# per row. A row has at most as many different predictions as the model has exits.
_SLOTS = 64


@registered("vote")
@dataclasses.dataclass(frozen=True)
class Vote(Criterion):
    """Exit once `votes` of the exits so far have predicted the same class.

    For classification only. Voting is common in the literature on ensembles and multi-exit
    networks. A row's answer is the mean of the logits of the exits that predicted the class. If no
    class has `votes` predictions at the last layer, the answer is the last layer's logits. (So it
    is if the class was first predicted after 64 other classes.)

    Attributes:
        votes: the number of predictions, at least 1; with 1, every row exits at layer 1.

    Raises:
        InputError: `votes` is below 1.
    """

    votes: int

    def __post_init__(self):
        set_count(self, "votes", least=1)

    def init(self, logits, row):
        del row
        slots = logits[:, :_SLOTS]
        return VoteState(
            votes=jnp.zeros_like(logits, jnp.int32),
            predicted=jnp.full_like(slots, -1, jnp.int32),
            logits=slots[:, :, None] * logits[:, None],
        )

    def update(self, state, logits, layer):
        del layer
        prediction = predictions(logits)[:, None]
        votes = state.votes + jax.nn.one_hot(prediction[:, 0], logits.shape[1], dtype=jnp.int32)
        is_new = (state.predicted != prediction).all(axis=1, keepdims=True)
        unused = state.predicted < 0
        first_unused = unused & (jnp.cumsum(unused, axis=1) == 1)
        predicted = jnp.where(is_new & first_unused, prediction, state.predicted)
        # `where` instead of a product, because an infinite logit times 0 is NaN.
        addends = jnp.where((predicted == prediction)[:, :, None], logits[:, None], 0)
        new_state = VoteState(votes, predicted, state.logits + addends)
        return new_state, votes.max(axis=1) >= self.votes

    def answer(self, state, logits):
        winner = jnp.argmax(state.votes, axis=1)[:, None]
        votes = jnp.take_along_axis(state.votes, winner, axis=1)
        is_winner = state.predicted == winner
        slot = jnp.argmax(is_winner, axis=1)[:, None]
        total = jnp.take_along_axis(state.logits, slot[:, :, None], axis=1)[:, 0]
        known = is_winner.any(axis=1, keepdims=True)
        return jnp.where(known & (votes >= self.votes), total / jnp.maximum(votes, 1), logits)

    @classmethod
    def families(cls, logits, count):
        del count
        return {"": [cls(votes) for votes in range(len(logits), 0, -1)]}

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        # With as many votes as layers, the answer is the mean of all exits.
        return num_layers > 1 and self.votes <= num_layers

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.votes < num_layers:
            return []
        return [f"{self.votes} votes on {num_layers} layers allow no early exit"]


# A window is the lowest bits of an int32.
_LONGEST_WINDOW = 31
_SWEPT_WINDOWS = (3, 5, 7)


@registered("window")
@dataclasses.dataclass(frozen=True)
class Window(Criterion):
    """Exit once `votes` of the last `window` exits have predicted the same class.

    For classification only. `Vote` counts all exits so far. `Patience(p)` is the case in which all
    of the last p + 1 exits agree.

    Attributes:
        votes: the number of predictions, at least 1; with 1, every row exits at layer 1.
        window: the number of exits that count, from 1 to 31.

    Raises:
        InputError: `votes` is below 1, or `window` is not a whole number from 1 to 31.
    """

    votes: int
    window: int

    def __post_init__(self):
        set_count(self, "votes", least=1)
        set_count(self, "window", least=1, most=_LONGEST_WINDOW)

    def init(self, logits, row):
        del row
        return jnp.zeros_like(logits, jnp.int32)

    def update(self, state, logits, layer):
        del layer
        # Bit b of a class is set if exit i - b predicted the class.
        is_predicted = jax.nn.one_hot(predictions(logits), logits.shape[1], dtype=jnp.int32)
        in_window = jnp.left_shift(jnp.int32(1), self.window - 1)
        history = (state << 1 | is_predicted) & (in_window - 1 | in_window)
        return history, jax.lax.population_count(history).max(axis=1) >= self.votes

    @classmethod
    def families(cls, logits, count):
        del count
        return {
            f"window {window}": [cls(votes, window) for votes in range(window, 0, -1)]
            for window in _SWEPT_WINDOWS
            if window <= min(len(logits), _LONGEST_WINDOW)
        }

    def uses_early_exits(self, num_layers: int, is_regression: bool) -> bool:
        del is_regression
        return self.votes <= self.window and self.votes < num_layers

    def warnings(self, num_layers: int, is_regression: bool) -> list[str]:
        del is_regression
        if self.votes > self.window:
            return [f"{self.votes} votes in a window of {self.window} exits allow no early exit"]
        if self.votes >= num_layers:
            return [f"{self.votes} votes on {num_layers} layers allow no early exit"]
        return []
