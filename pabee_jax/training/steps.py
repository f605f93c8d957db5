"""The steps of a run: their number, and the settings that need more steps than the run has."""

import math

from pabee_jax.data.batching import steps_per_epoch
from pabee_jax.errors import InputError
from pabee_jax.training.config import LARGEST_INTEGER, TrainConfig
from pabee_jax.training.effects import refuse_long_warmup
from pabee_jax.training.strategy import first_phase_steps, trains_early_exits


def total_steps(config: TrainConfig, num_rows: int) -> int:
    """Return the number of optimizer steps of a run with `num_rows` training rows.

    Raises:
        InputError: a step number would not fit into int32.
    """
    epoch_steps = steps_per_epoch(num_rows, config.batch_size)
    if not config.max_steps and config.num_epochs * epoch_steps > LARGEST_INTEGER:
        raise InputError(
            f"config.num_epochs is {config.num_epochs:g}, which makes more than {LARGEST_INTEGER} "
            f"steps of {epoch_steps} steps per epoch"
        )
    return config.max_steps or math.ceil(config.num_epochs * epoch_steps)


def refuse_short_run(config: TrainConfig, num_rows: int) -> None:
    """Raise InputError for a setting without effect in a run with so few rows or steps."""
    steps = total_steps(config, num_rows)
    if config.warmup_steps:
        refuse_long_warmup(config, steps)
    if config.second_phase.learning_rate:
        _refuse_long_warmup_of_a_phase(config, steps)
    if config.strategy not in ("joint", "attach") and steps < 2:
        raise InputError(
            f"config.strategy is {config.strategy!r}, which needs at least 2 steps, but the run "
            f"has {steps}"
        )
    every = config.eval_every or steps_per_epoch(num_rows, config.batch_size)
    if config.export == "best" and not _evaluates_twice(config, steps, every):
        raise InputError(
            "config.export is 'best', but the run evaluates its trained exits only once, at its "
            f"last step: it has {steps} steps and evaluates every {every} steps; give a smaller "
            "eval_every"
        )
    if config.order == "length_grouped" and num_rows < 2 * config.batch_size:
        raise InputError(
            f"config.order is 'length_grouped', but the {num_rows} training rows make fewer than "
            f"two batches of {config.batch_size} rows"
        )


def _refuse_long_warmup_of_a_phase(config: TrainConfig, steps: int) -> None:
    first_steps = first_phase_steps(config, steps)
    for name, warmup_steps, phase_steps in (
        ("warmup_steps", config.warmup_steps, first_steps),
        ("second_phase.warmup_steps", config.second_phase.warmup_steps, steps - first_steps),
    ):
        if warmup_steps >= phase_steps:
            raise InputError(
                f"config.{name} is {warmup_steps}, but its phase has {phase_steps} steps, so that "
                "the learning rate never reaches its peak; it must be below the number of steps"
            )


def _evaluates_twice(config: TrainConfig, steps: int, every: int) -> bool:
    """Return whether at least two evaluations of a run measure trained early exits.

    The last step of a run is always evaluated. If the evaluation before it measures early exits
    that are not trained yet, then so do all evaluations before it.
    """
    previous = (steps - 1) // every * every
    return previous > 0 and trains_early_exits(config, previous - 1, steps)
