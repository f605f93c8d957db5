"""The training step and the evaluation step, both compiled for the device mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.models.encoder import Batch
from pabee_jax.models.parameters import Structure, merge
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.forward import training_logits
from pabee_jax.training.objective import Moment, objective
from pabee_jax.training.optimizer import (
    learning_rate_schedules,
    make_adamw,
    make_clipping,
)
from pabee_jax.training.strategy import gradient_scales, join_parts, split_parts

Parameters = dict[str, Array]


class TrainState(NamedTuple):
    """The state that training changes and that a checkpoint stores.

    Attributes:
        step: number of optimizer steps taken.
        parameters: float32 parameters by name; the layers are stacked.
        optimizer: AdamW's state by part of the parameters (`strategy.PARTS`). The state of a part
            has its own step count, because some strategies train a part in some steps only.
    """

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: dict[str, Any]


class StepMetrics(NamedTuple):
    """The metrics of one training step.

    Attributes:
        loss: the loss that the step minimizes, at the parameters before the update.
        exit_losses: (L,) the mean loss of each exit on the labels.
        gradient_norm: global norm, before clipping, of the gradients of the trained parameters.
        learning_rate: learning rate of this step: that of the encoder or, in a step that trains the
            early exits alone, that of the exits.
    """

    loss: Float[Array, ""]
    exit_losses: Float[Array, " exits"]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


def initial_state(parameters: Parameters, config: TrainConfig) -> TrainState:
    """Return the state before the first step."""
    adamw = make_adamw(config)
    parts = split_parts(parameters, config.pooler)
    moments = {part: adamw.init(values) for part, values in parts.items()}
    return TrainState(jnp.int32(0), parameters, moments)


def make_train_step(
    structure: Structure, config: TrainConfig, total_steps: int, shardings: TrainState | None = None
) -> functools.partial[tuple[TrainState, StepMetrics]]:
    """Return the compiled training step, a function of (state, batch, phase).

    The step donates the buffers of `state`. Only the parameters that `phase` trains have gradients:
    if the encoder is frozen, the step has no backward pass through the encoder.

    Args:
        structure: the structure of the model.
        config: the configuration of the run.
        total_steps: the step at which the learning rate reaches 0.
        shardings: the shardings of the new state; absent, the compiler chooses.
    """
    clipping, adamw = make_clipping(config), make_adamw(config)
    schedules = learning_rate_schedules(config, total_steps)

    def loss_of(trained, frozen, batch, moment, phase):
        model = merge(structure, join_parts(frozen | trained))
        scales = gradient_scales(phase)
        logits = training_logits(
            model, batch, moment.key, scales, rematerialize=config.rematerialize
        )
        return objective(logits, batch, moment, phase, config)

    def losses_and_gradients(trained, frozen, batch, moment, phase):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        if config.gradient_accumulation == 1:
            return gradient(trained, frozen, batch, moment, phase)

        def add(sums, index_and_microbatch):
            index, microbatch = index_and_microbatch
            of_microbatch = moment._replace(key=jax.random.fold_in(moment.key, index))
            terms = gradient(trained, frozen, microbatch, of_microbatch, phase)
            return jax.tree.map(jnp.add, sums, terms), None

        microbatches = _microbatches(batch, config.gradient_accumulation)
        indices = jnp.arange(config.gradient_accumulation)
        shapes = jax.eval_shape(lambda: gradient(trained, frozen, batch, moment, phase))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(add, zeros, (indices, microbatches))[0]

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="phase")
    def train_step(state, batch, phase, seed):
        # Dropout is a function of the seed, the step and the layer, so that a resumed run draws
        # the same masks.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        moment = Moment(key, batch["valid"].sum(), state.step / total_steps)
        parts = split_parts(state.parameters, config.pooler)
        trained = {part: parts.pop(part) for part in phase.parts}
        frozen = parts
        (loss, losses), gradients = losses_and_gradients(trained, frozen, batch, moment, phase)
        norm = optax.tree.norm(gradients)
        clipped: Any = clipping.update(gradients, clipping.init(trained))[0]
        rates = {part: jnp.float32(schedules[part](state.step)) for part in trained}
        moments = dict(state.optimizer)
        for part, values in trained.items():
            updates, moments[part] = adamw.update(clipped[part], moments[part], values)
            updates = jax.tree.map(lambda update, rate=rates[part]: rate * update, updates)
            updated: Any = optax.apply_updates(values, updates)
            trained[part] = updated
        parameters = join_parts(frozen | trained)
        metrics = StepMetrics(loss, losses, norm, rates[phase.parts[0]])
        new_state = TrainState(state.step + 1, parameters, moments)
        if shardings is not None:
            new_state = jax.lax.with_sharding_constraint(new_state, shardings)
        return new_state, metrics

    # The seed is an argument, so that runs with different seeds share a compiled program.
    return functools.partial(train_step, seed=np.int32(config.seed))


def _microbatches(batch: Batch, count: int) -> Batch:
    """Reshape every array to (count, rows / count, ...); rows do not move between devices."""
    return jax.tree.map(
        lambda value: jnp.moveaxis(jnp.reshape(value, (-1, count, *value.shape[1:])), 1, 0), batch
    )


def make_eval_step(
    structure: Structure, mesh: Mesh | None = None
) -> Callable[[Parameters, Batch], Float[Array, "exits batch classes"]]:
    """Return the compiled evaluation step, which computes all exits' logits without dropout.

    With `mesh`, the logits of the whole batch are replicated to every device of every process.
    """

    def eval_step(parameters, batch):
        return all_exit_logits(merge(structure, parameters), batch)

    return jax.jit(eval_step, out_shardings=mesh and sharding.replicated(mesh))


@jax.jit
def all_finite(parameters: Parameters) -> Bool[Array, ""]:
    """Return whether all values of all parameters are finite."""
    return jnp.array([jnp.isfinite(value).all() for value in parameters.values()]).all()
