"""Replay: applies a criterion to recorded logits, so that an ablation needs one forward pass."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int

from pabee_jax.criteria import ExitCriterion, as_arrays, check_labels, check_task
from pabee_jax.drivers import exit_rule
from pabee_jax.drivers.shapes import next_power_of_two
from pabee_jax.errors import InputError

# Settings of a criterion that one call of `_replay_many` vectorizes over. Memory grows with it.
_SETTINGS_PER_CALL = 64
# The most values per setting that one call computes with, so that the memory of a call does not
# grow with the number of rows; a power of two.
_VALUES_PER_CALL = 2**19


def _replay(criterion, logits, first_row):
    num_layers, rows, _ = logits.shape

    def step(state, x):
        layer, logits = x
        return exit_rule.apply(criterion, state, logits, layer, num_layers), None

    zero_logits = jnp.zeros_like(logits[0])
    row = first_row + jnp.arange(rows, dtype=jnp.int32)
    state = exit_rule.initial_state(criterion, zero_logits, row, done=jnp.zeros(rows, bool))
    layers = jnp.arange(1, num_layers + 1, dtype=jnp.int32)
    state, _ = jax.lax.scan(step, state, (layers, logits))
    return state.exit_layer, state.logits


_replay_one = jax.jit(_replay)
_replay_many = jax.jit(jax.vmap(_replay, in_axes=(0, None, None)))


def replay(
    criterion: ExitCriterion, logits: ArrayLike
) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, "rows classes"]]:
    """Return the exit layer (from 1) and the logits that `criterion` gives each row.

    The exit rule is the drivers' own (`exit_rule.apply`), so that replay and drivers cannot
    disagree. A new threshold does not recompile.

    Args:
        criterion: decides which rows exit.
        logits: the logits of every exit, (exits, rows, classes); not NaN.

    Returns:
        The exit layers, (rows,) int32, and the logits, (rows, classes) float32.

    Example:
        One row, which the first of four exits classifies otherwise than the exits after it:

        >>> logits = np.array([[[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]], [[0.0, 3.0]]])
        >>> replay(Patience(1), logits)
        (array([3], dtype=int32), array([[0., 2.]], dtype=float32))

    Raises:
        InputError: `logits` is not of shape (exits, rows, classes) or holds values that are not
            numbers; the criterion is for classification and `logits` has one class; or the
            criterion has not one label per row.
    """
    padded, rows = _padded(logits)
    arrays = _checked(criterion, padded, rows)
    exit_layers, exit_logits = _by_parts(_replay_one, arrays, padded, rows_axis=0)
    return exit_layers[:rows], exit_logits[:rows]


def replay_many(
    criteria: Sequence[ExitCriterion], logits: ArrayLike
) -> tuple[Int[np.ndarray, "settings rows"], Float[np.ndarray, "settings rows classes"]]:
    """Return what `replay` returns for many settings of one criterion, in the order given.

    Values that do not depend on the setting, such as an entropy, are computed once for up to 64
    settings.

    Example:
        >>> logits = np.array([[[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]], [[0.0, 3.0]]])
        >>> exit_layers, _ = replay_many([Patience(1), Patience(2)], logits)
        >>> exit_layers.tolist()  # (settings, rows)
        [[3], [4]]

    Raises:
        InputError: as `replay`; `criteria` is empty or has criteria of several classes.
    """
    if len({type(criterion) for criterion in criteria}) != 1:
        raise InputError("replay_many takes one or more settings of one criterion class")
    padded, rows = _padded(logits)
    results = []
    for start in range(0, len(criteria), _SETTINGS_PER_CALL):
        settings = list(criteria[start : start + _SETTINGS_PER_CALL])
        # Repeat the last setting, so that a last part with fewer settings shares the program.
        missing = min(_SETTINGS_PER_CALL, len(criteria)) - len(settings)
        padded_settings = settings + [settings[-1]] * missing
        arrays = [_checked(setting, padded, rows) for setting in padded_settings]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *arrays)
        exit_layers, exit_logits = _by_parts(_replay_many, stacked, padded, rows_axis=1)
        results.append((exit_layers[: len(settings), :rows], exit_logits[: len(settings), :rows]))
    exit_layers, exit_logits = map(np.concatenate, zip(*results, strict=True))
    return exit_layers, exit_logits


def _by_parts(program, criterion, logits: np.ndarray, rows_axis: int) -> Sequence[np.ndarray]:
    """Run a program on parts of the rows, and return the exit layers and the logits of all rows.

    The number of rows is a power of two, so that all parts share a program.
    """
    rows, classes = logits.shape[1:]
    part = min(rows, max(1, _VALUES_PER_CALL // next_power_of_two(classes)))
    results = [
        jax.device_get(program(criterion, logits[:, start : start + part], np.int32(start)))
        for start in range(0, rows, part)
    ]
    return [np.concatenate(arrays, axis=rows_axis) for arrays in zip(*results, strict=True)]


def _checked(criterion: ExitCriterion, logits: np.ndarray, rows: int) -> ExitCriterion:
    """Return the criterion as arrays, or raise InputError if it does not suit the logits."""
    arrays = as_arrays(criterion)
    num_layers, _, num_classes = logits.shape
    check_task(type(criterion), is_regression=num_classes == 1)
    criterion.check_model(num_layers, num_classes)
    check_labels(criterion, rows)
    return arrays


def _padded(logits: ArrayLike) -> tuple[np.ndarray, int]:
    """Return the logits, padded to a power of two of rows, and the number of rows before.

    On the host: on a device, padding would compile a program for every number of rows.
    """
    try:
        logits = np.asarray(logits)
    except ValueError:  # Nested lists of different lengths.
        raise InputError("logits must be an array (exits, rows, classes), not ragged") from None
    if not any(jnp.issubdtype(logits.dtype, kind) for kind in (np.floating, np.integer)):
        raise InputError(f"logits must be real numbers, not {logits.dtype}")
    with np.errstate(over="ignore"):  # A float64 logit may be infinite in float32.
        logits = logits.astype(np.float32)
    if logits.ndim != 3 or 0 in logits.shape:
        raise InputError(
            f"logits must have shape (exits, rows, classes), all at least 1, not {logits.shape}"
        )
    if np.isnan(logits).any():
        exit_index, row, _ = np.argwhere(np.isnan(logits))[0]
        raise InputError(f"the logits of exit {exit_index + 1} are NaN in row {row} (from 0)")
    rows = logits.shape[1]
    # Padding to a power of two lets many row counts share a program.
    return np.pad(logits, ((0, 0), (0, next_power_of_two(rows) - rows), (0, 0))), rows
