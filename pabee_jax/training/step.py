"""One optimiser step and one evaluation step, both compiled over the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.model import Batch
from pabee_jax.parameters import Structure, merge
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.loss import distillation_losses, exit_losses, joint_loss
from pabee_jax.training.optimizer import learning_rate_schedule, make_adamw, make_clipping
from pabee_jax.training.strategy import Phase, gradient_scales, join_parts, split_parts

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
    graph: Structure, config: TrainConfig, total_steps: int
) -> Callable[[TrainState, Batch, Phase], tuple[TrainState, StepMetrics]]:
    """The compiled training step. It takes over the state's buffers.

    What a phase does not train costs nothing: a frozen encoder has no backward pass.
    """
    clipping, adamw = make_clipping(config), make_adamw(config)
    schedule = learning_rate_schedule(config, total_steps)

    def loss_of(trained, frozen, batch, key, phase):
        model = merge(graph, join_parts(frozen | trained))
        logits = all_exit_logits(model, batch, key, gradient_scales(phase))
        losses = exit_losses(logits, batch["labels"], batch["valid"])
        total = losses
        if config.distill.weight:
            distilled = distillation_losses(logits, batch["valid"], config.distill.temperature)
            total = losses + config.distill.weight * distilled
        return joint_loss(phase.weights, total), losses

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="phase")
    def train_step(state, batch, seed, phase):
        # The dropout is a function of seed, step and layer: a resumed run repeats it.
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        parts = split_parts(state.parameters, config.pooler)
        trained = {part: parts.pop(part) for part in phase.parts}
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, losses), gradients = gradient(trained, parts, batch, key, phase)
        norm = optax.tree.norm(gradients)
        clipped: Any = clipping.update(gradients, clipping.init(trained))[0]
        rate = jnp.float32(schedule(state.step))
        moments = dict(state.optimizer)
        for part, values in trained.items():
            updates, moments[part] = adamw.update(clipped[part], moments[part], values)
            updates = jax.tree.map(lambda update: rate * update, updates)
            trained[part] = optax.apply_updates(values, updates)
        parameters = join_parts(parts | trained)
        metrics = StepMetrics(loss, losses, norm, rate)
        return TrainState(state.step + 1, parameters, moments), metrics

    # The seed is an argument, so that runs with other seeds share compiled programs.
    return lambda state, batch, phase: train_step(state, batch, np.int32(config.seed), phase=phase)


def make_eval_step(
    graph: Structure,
) -> Callable[[Parameters, Batch], Float[Array, "exits batch classes"]]:
    """The compiled evaluation step: every exit's logits, without dropout."""
    return jax.jit(lambda parameters, batch: all_exit_logits(merge(graph, parameters), batch))
