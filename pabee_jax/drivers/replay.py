"""A criterion over recorded logits: every ablation from one forward pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from pabee_jax.criteria import ExitCriterion, as_arrays
from pabee_jax.drivers.plan import next_power_of_two
from pabee_jax.errors import InputError


@jax.jit
def _replay(criterion, logits):
    exits, rows, _ = logits.shape

    def step(carry, x):
        state, done, exit_layer, exit_logits = carry
        layer, logits = x
        state, wants_exit = criterion.update(state, logits, layer)
        leaves = ~done & (wants_exit | (layer == exits))
        exit_layer = jnp.where(leaves, layer, exit_layer)
        exit_logits = jnp.where(leaves[:, None], logits, exit_logits)
        return (state, done | leaves, exit_layer, exit_logits), None

    nothing = jnp.zeros_like(logits[0])
    start = (
        criterion.init(nothing, jnp.arange(rows)),
        jnp.zeros(rows, bool),
        jnp.zeros(rows, jnp.int32),
        nothing,
    )
    layers = jnp.arange(1, exits + 1, dtype=jnp.int32)
    (_, _, exit_layer, exit_logits), _ = jax.lax.scan(step, start, (layers, logits))
    return exit_layer, exit_logits


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
    logits = jnp.asarray(logits, jnp.float32)
    if logits.ndim != 3 or 0 in logits.shape:
        raise InputError(f"logits must be (exits, rows, classes), not of shape {logits.shape}")
    rows = logits.shape[1]
    # So that many numbers of rows share a program.
    padded = jnp.pad(logits, ((0, 0), (0, next_power_of_two(rows) - rows), (0, 0)))
    exit_layer, exit_logits = _replay(as_arrays(criterion), padded)
    return exit_layer[:rows], exit_logits[:rows]
