"""One optimiser step and one evaluation step, both compiled over the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.model import Batch, Structure, merge
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.loss import exit_losses, exit_weights, joint_loss
from pabee_jax.training.optimizer import learning_rate_schedule, make_optimizer

Parameters = dict[str, Array]


class TrainState(NamedTuple):
    """All that changes during training, and all that a checkpoint must hold.

    Attributes:
        step: optimiser steps taken.
        parameters: by name, in float32, layers stacked.
        optimizer: optax's state.
    """

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: Any


class StepMetrics(NamedTuple):
    """Attributes:
    loss: the joint loss before the step.
    exit_losses: (L,) each exit's own mean loss.
    gradient_norm: before clipping.
    learning_rate: used in this step.
    """

    loss: Float[Array, ""]
    exit_losses: Float[Array, " exits"]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]


def initial_state(parameters: Parameters, config: TrainConfig, total_steps: int) -> TrainState:
    optimizer = make_optimizer(config, total_steps)
    return TrainState(jnp.int32(0), parameters, optimizer.init(parameters))


def make_train_step(
    graph: Structure, config: TrainConfig, total_steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The compiled training step. It takes over the state's buffers."""
    optimizer = make_optimizer(config, total_steps)
    schedule = learning_rate_schedule(config, total_steps)

    def loss_of(parameters, batch, key):
        logits = all_exit_logits(merge(graph, parameters), batch, key)
        losses = exit_losses(logits, batch["labels"], batch["valid"])
        return joint_loss(exit_weights(config.loss.weights, len(losses)), losses), losses

    def train_step(state, batch):
        # The dropout is a function of seed, step and layer: a resumed run repeats it.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, losses), gradients = gradient(state.parameters, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        norm = optax.tree.norm(gradients)
        metrics = StepMetrics(loss, losses, norm, jnp.float32(schedule(state.step)))
        return TrainState(state.step + 1, parameters, optimizer_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(
    graph: Structure,
) -> Callable[[Parameters, Batch], Float[Array, "exits batch classes"]]:
    """The compiled evaluation step: every exit's logits, without dropout."""
    return jax.jit(lambda parameters, batch: all_exit_logits(merge(graph, parameters), batch))
