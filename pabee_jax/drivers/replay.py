"""A criterion over recorded logits: every ablation from one forward pass."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from pabee_jax.criteria import ExitCriterion, as_arrays
from pabee_jax.drivers import exit_rule
from pabee_jax.drivers.shapes import next_power_of_two
from pabee_jax.errors import InputError

# Settings of a criterion that are replayed together; more of them need more memory at a time.
_SETTINGS_TOGETHER = 64


def _replay(criterion, logits):
    num_layers, rows, _ = logits.shape

    def step(state, x):
        layer, logits = x
        return exit_rule.update(criterion, state, logits, layer, num_layers), None

    nothing = jnp.zeros_like(logits[0])
    state = exit_rule.initial_state(
        criterion, nothing, jnp.arange(rows), done=jnp.zeros(rows, bool)
    )
    layers = jnp.arange(1, num_layers + 1, dtype=jnp.int32)
    state, _ = jax.lax.scan(step, state, (layers, logits))
    return state.exit_layer, state.logits


_replay_one = jax.jit(_replay)
_replay_many = jax.jit(jax.vmap(_replay, in_axes=(0, None)))


def replay(
    criterion: ExitCriterion, logits: ArrayLike
) -> tuple[Int[Array, " rows"], Float[Array, "rows classes"]]:
    """Where `criterion` would have let each row leave, and with which logits.

    `logits` are those of every exit, (exits, rows, classes).

    Calls the same `criterion.update` as the drivers, so the two cannot disagree. A new threshold
    does not recompile.

    Raises:
        InputError: `logits` is not of shape (exits, rows, classes).
    """
    padded, rows = _padded(logits)
    exit_layer, exit_logits = _replay_one(as_arrays(criterion), padded)
    return exit_layer[:rows], exit_logits[:rows]


def replay_many(
    criteria: Sequence[ExitCriterion], logits: ArrayLike
) -> tuple[Int[np.ndarray, "settings rows"], Float[np.ndarray, "settings rows classes"]]:
    """`replay` for many settings of one criterion, in the order given.

    What does not depend on the setting, such as an entropy, is computed once for many of them.

    Raises:
        InputError: as `replay`; no criterion, or criteria of several classes.
    """
    if len({type(criterion) for criterion in criteria}) != 1:
        raise InputError("replay_many takes settings of one criterion, and at least one")
    padded, rows = _padded(logits)
    found = []
    for start in range(0, len(criteria), _SETTINGS_TOGETHER):
        part = list(criteria[start : start + _SETTINGS_TOGETHER])
        # So that the last ones, which are fewer, share the program.
        filled = part + [part[-1]] * (min(_SETTINGS_TOGETHER, len(criteria)) - len(part))
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *map(as_arrays, filled))
        exit_layers, answers = jax.device_get(_replay_many(together, padded))
        found.append((exit_layers[: len(part), :rows], answers[: len(part), :rows]))
    exit_layers, answers = map(np.concatenate, zip(*found, strict=True))
    return exit_layers, answers


def _padded(logits: ArrayLike) -> tuple[Array, int]:
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim != 3 or 0 in logits.shape:
        raise InputError(f"logits must be (exits, rows, classes), not of shape {logits.shape}")
    rows = logits.shape[1]
    # So that many numbers of rows share a program.
    return jnp.pad(logits, ((0, 0), (0, next_power_of_two(rows) - rows), (0, 0))), rows
