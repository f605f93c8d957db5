"""One optimiser step and one evaluation step, both compiled over the mesh."""

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
from pabee_jax.training.loss import distillation_losses, exit_losses, joint_loss
from pabee_jax.training.optimizer import learning_rate_schedule, make_adamw, make_clipping
from pabee_jax.training.strategy import gradient_scales, join_parts, split_parts

Parameters = dict[str, Array]


class TrainState(NamedTuple):
    """All that changes during training, and all that a checkpoint must hold.

    Attributes:
        step: optimiser steps taken.
        parameters: by name, in float32, layers stacked.
        optimizer: AdamW's state for each part of the parameters (`strategy.PARTS`), each with a
            count of its own steps, because some strategies train a part in some steps only.
    """

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: dict[str, Any]


class StepMetrics(NamedTuple):
    """Attributes:
    loss: what the step minimises, before the step.
    exit_losses: (L,) each exit's own mean loss on the labels.
    gradient_norm: of all that the step changes, before clipping.
    learning_rate: used in this step.
    """

    loss: Float[Array, ""]
    exit_losses: Float[Array, " exits"]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


def initial_state(parameters: Parameters, config: TrainConfig) -> TrainState:
    adamw = make_adamw(config)
    parts = split_parts(parameters, config.pooler)
    moments = {part: adamw.init(values) for part, values in parts.items()}
    return TrainState(jnp.int32(0), parameters, moments)


def make_train_step(
    graph: Structure, config: TrainConfig, total_steps: int, shardings: TrainState | None = None
) -> functools.partial[tuple[TrainState, StepMetrics]]:
    """The compiled training step of (state, batch, phase). It takes over the state's buffers.

    What a phase does not train costs nothing: a frozen encoder has no backward pass. `shardings`
    are those that the new state shall have.
    """
    clipping, adamw = make_clipping(config), make_adamw(config)
    schedule = learning_rate_schedule(config, total_steps)

    def loss_of(trained, frozen, batch, count, key, phase):
        model = merge(graph, join_parts(frozen | trained))
        scales, again = gradient_scales(phase), config.rematerialize
        logits = training_logits(model, batch, key, scales, rematerialize=again)
        losses = exit_losses(logits, batch["labels"], batch["valid"], count)
        total = losses
        if config.distill.weight:
            temperature = config.distill.temperature
            distilled = distillation_losses(logits, batch["valid"], temperature, count)
            total = losses + config.distill.weight * distilled
        return joint_loss(phase.weights, total), losses

    def losses_and_gradients(trained, frozen, batch, key, phase):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        count = batch["valid"].sum()
        if config.gradient_accumulation == 1:
            return gradient(trained, frozen, batch, count, key, phase)

        def add(sums, part):
            index, batch = part
            key_of_part = jax.random.fold_in(key, index)
            found = gradient(trained, frozen, batch, count, key_of_part, phase)
            return jax.tree.map(jnp.add, sums, found), None

        parts = _microbatches(batch, config.gradient_accumulation)
        shapes = jax.eval_shape(lambda: gradient(trained, frozen, batch, count, key, phase))
        zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(config.gradient_accumulation), parts))[0]

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="phase")
    def train_step(state, batch, phase, seed):
        # The dropout is a function of seed, step and layer: a resumed run repeats it.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        parts = split_parts(state.parameters, config.pooler)
        trained = {part: parts.pop(part) for part in phase.parts}
        (loss, losses), gradients = losses_and_gradients(trained, parts, batch, key, phase)
        norm = optax.tree.norm(gradients)
        clipped: Any = clipping.update(gradients, clipping.init(trained))[0]
        rate = jnp.float32(schedule(state.step))
        moments = dict(state.optimizer)
        for part, values in trained.items():
            updates, moments[part] = adamw.update(clipped[part], moments[part], values)
            updates = jax.tree.map(lambda update: rate * update, updates)
            updated: Any = optax.apply_updates(values, updates)
            trained[part] = updated
        parameters = join_parts(parts | trained)
        metrics = StepMetrics(loss, losses, norm, rate)
        new = TrainState(state.step + 1, parameters, moments)
        if shardings is not None:
            new = jax.lax.with_sharding_constraint(new, shardings)
        return new, metrics

    # The seed is an argument, so that runs with other seeds share compiled programs.
    return functools.partial(train_step, seed=np.int32(config.seed))


def _microbatches(batch: Batch, count: int) -> Batch:
    """Every array as (count, rows / count, ...); each device's rows stay on it."""
    return {
        name: jnp.moveaxis(jnp.reshape(value, (-1, count, *value.shape[1:])), 1, 0)
        for name, value in batch.items()
    }


def make_eval_step(
    graph: Structure, mesh: Mesh | None = None
) -> Callable[[Parameters, Batch], Float[Array, "exits batch classes"]]:
    """The compiled evaluation step: every exit's logits, without dropout.

    Over a mesh, every device, and so every process, gets those of the whole batch.
    """

    def eval_step(parameters, batch):
        return all_exit_logits(merge(graph, parameters), batch)

    return jax.jit(eval_step, out_shardings=mesh and sharding.replicated(mesh))


@jax.jit
def all_finite(parameters: Parameters) -> Bool[Array, ""]:
    """Whether every parameter is a finite number."""
    return jnp.array([jnp.isfinite(value).all() for value in parameters.values()]).all()
