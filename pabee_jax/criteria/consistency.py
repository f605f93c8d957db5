"""A criterion that is fitted to recorded logits: does the exit already have the final answer?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pabee_jax.criteria.base import Criterion, Logits, predictions, quantiles
from pabee_jax.criteria.registry import registered
from pabee_jax.criteria.validation import set_number
from pabee_jax.errors import InputError, shown

# The weights of the margin and of the earlier exits; before them, there is one weight per class.
_NUM_MARGINS = 2


@registered("consistency")
@dataclasses.dataclass(frozen=True, eq=False)
class Consistency(Criterion):
    """Exit at the first layer that has the last layer's prediction with probability > `threshold`.

    The probability comes from one logistic regression per exit, which `fit` fits to recorded logits
    without labels. It has three inputs: the predicted class; the exit's margin, which is the
    predicted class's logit minus the highest other logit; and the mean, over the earlier exits, of
    the same class's logit minus the highest other logit there. The last input is positive if the
    earlier exits agree, as for `Patience`, and the more confident they were, the larger.

    The target "the prediction of the last layer" is that of CALM (arXiv 2207.07061), section 3.5,
    "early exit classifier". CALM's classifier reads hidden states, and one classifier serves all
    layers; this one reads logits. For classification only.

    Attributes:
        threshold: from 0 to 1.
        coefficients: (exits, classes + 2). A row has the weight of every class, the weight of the
            margin and the weight of the earlier exits.

    Raises:
        InputError: `threshold` is not a number from 0 to 1, `coefficients` is not a table of finite
            numbers, or the criterion is used on a model with other exits or classes.
    """

    threshold: float
    coefficients: Float[Array | np.ndarray, "exits weights"]

    def __post_init__(self):
        set_number(self, "threshold", 0, 1)
        # JAX rebuilds pytrees with arrays of other shapes and with placeholders.
        if isinstance(self.coefficients, list | tuple | str | int | float | dict):
            object.__setattr__(self, "coefficients", _as_table(self.coefficients))

    def __eq__(self, other):
        return (
            type(other) is type(self)
            and self.threshold == other.threshold
            and np.array_equal(self.coefficients, other.coefficients)
        )

    def __hash__(self):
        return hash((self.threshold, np.asarray(self.coefficients).tobytes()))

    @classmethod
    def fit(
        cls,
        logits: Float[np.ndarray, "exits rows classes"],
        threshold: float = 0.9,
        regularization: float = 1.0,
    ) -> "Consistency":
        """Return the criterion whose probabilities are fitted to the logits of every exit.

        Use rows that the model was not trained on: on its training rows, exits agree more often.

        Args:
            logits: the logits of every exit; labels are not needed.
            threshold: from 0 to 1.
            regularization: the strength of the penalty on the squared weights, above 0. With k
                times as many rows, k times the penalty has the same effect.

        Example:
            >>> logits = np.random.default_rng(0).normal(size=(4, 50, 2))  # 4 exits, 2 classes
            >>> Consistency.fit(logits, threshold=0.9).coefficients.shape
            (4, 4)

        Raises:
            InputError: `logits` are regression scores, or not of shape (exits, rows, classes).
        """
        logits = np.asarray(logits, np.float32)
        if logits.ndim != 3 or 0 in logits.shape:
            raise InputError(f"logits have shape {logits.shape}; they must be exits, rows, classes")
        if logits.shape[2] == 1:
            raise InputError("Consistency is for classification; these logits are scores")
        last = logits[-1].argmax(axis=1)
        table = [
            _fitted_weights(inputs, classes == last, regularization)
            for inputs, classes in zip(*_inputs(logits), strict=True)
        ]
        return cls(threshold, np.array(table, np.float32))

    def init(self, logits, row):
        del row
        return jnp.zeros_like(logits)

    def update(self, state, logits, layer):
        prediction = predictions(logits)
        margins = margins_of_classes(logits)
        earlier = _of(prediction, state) / jnp.maximum(layer - 1, 1)
        weights = jnp.asarray(self.coefficients)[layer - 1]
        score = weights[:-_NUM_MARGINS][prediction]
        score += weights[-2] * _of(prediction, margins) + weights[-1] * earlier
        return state + margins, jax.nn.sigmoid(score) > self.threshold

    def uses_early_exits(self, num_layers, is_regression):
        del is_regression
        return num_layers > 1 and self.threshold < 1

    def check_model(self, num_layers, num_labels):
        found, expected = np.shape(self.coefficients), (num_layers, num_labels + _NUM_MARGINS)
        if found != expected:
            raise InputError(
                f"Consistency has coefficients of shape {found}; a model with {num_layers} exits "
                f"and {num_labels} classes needs {expected}: fit it to the logits of this model"
            )

    @classmethod
    def families(cls, logits, count):
        if len(logits) < 2:
            return {}
        fitted = cls.fit(logits)
        inputs, classes = _inputs(np.asarray(logits, np.float32))
        probabilities = [
            jax.nn.sigmoid(weights[of_exit] + of_inputs @ weights[-_NUM_MARGINS:])
            for weights, of_exit, of_inputs in zip(
                np.asarray(fitted.coefficients), classes, inputs[..., -_NUM_MARGINS:], strict=True
            )
        ]
        # Above 0, every row exits at layer 1.
        thresholds = [*quantiles(np.array(probabilities), count)[::-1], 0.0]
        return {"": [cls(threshold, fitted.coefficients) for threshold in thresholds]}


def margins_of_classes(logits: Logits) -> Float[Array, "rows classes"]:
    """Return every class's logit minus the highest logit of the other classes."""
    highest, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
    is_prediction = jnp.arange(logits.shape[1]) == predictions(logits)[:, None]
    return logits - jnp.where(is_prediction, second[:, None], highest[:, None])


def _of(prediction: Array, values: Array) -> Float[Array, " rows"]:
    return jnp.take_along_axis(values, prediction[:, None], axis=1)[:, 0]


def _inputs(logits: Float[np.ndarray, "exits rows classes"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs (exits, rows, classes + 2) and the predicted classes (exits, rows)."""
    exits, _, num_classes = logits.shape
    margins = np.asarray(jax.vmap(margins_of_classes)(jnp.asarray(logits)))
    classes = logits.argmax(axis=2)
    before = np.cumsum(margins, axis=0) - margins
    before /= np.maximum(np.arange(exits), 1)[:, None, None]
    own, earlier = (
        np.take_along_axis(values, classes[..., None], axis=2) for values in (margins, before)
    )
    return np.concatenate([np.eye(num_classes)[classes], own, earlier], axis=2), classes


def _fitted_weights(
    inputs: Float[np.ndarray, "rows inputs"], consistent: np.ndarray, regularization: float
) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    num_classes = inputs.shape[1] - _NUM_MARGINS
    weights = np.zeros(inputs.shape[1])
    if consistent.all() or not consistent.any():
        # Laplace's rule of succession.
        counts = consistent.sum() + 1, (~consistent).sum() + 1
        weights[:num_classes] = np.log(counts[0] / counts[1])
        return weights
    model = LogisticRegression(C=1 / regularization, max_iter=1000).fit(inputs, consistent)
    weights[:] = model.coef_[0]
    weights[:num_classes] += model.intercept_[0]
    return weights


def _as_table(value: object) -> np.ndarray:
    try:
        table = np.array(value, np.float32)
    except (TypeError, ValueError):  # A ragged list, or values that are not numbers.
        table = np.zeros(0)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise InputError(
            f"coefficients is {shown(value)}; it must be a list of as many numbers for every exit"
        )
    return table
