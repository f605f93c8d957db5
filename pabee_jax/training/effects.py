"""Settings without effect: a run refuses them, because such a setting is a mistake."""

from pabee_jax.errors import InputError, shown
from pabee_jax.training.config import TWO_PHASES, TrainConfig, leaves


def refuse_settings_without_effect(config: TrainConfig) -> None:
    """Raise InputError for a setting that has no effect with the other settings of `config`."""
    _refuse_other_sources(config)
    _refuse_unused_exits(config)
    if config.max_steps and config.warmup_steps:
        refuse_long_warmup(config, config.max_steps)


def refuse_long_warmup(config: TrainConfig, steps: int) -> None:
    """Raise InputError if the learning rate of a run of `steps` steps never reaches its peak."""
    if config.warmup_steps >= steps:
        raise InputError(
            f"config.warmup_steps is {config.warmup_steps}, but the run has {steps} steps, so that "
            "the learning rate never reaches its peak; warmup_steps must be below the number of "
            "steps"
        )


def refuse_changed(config: TrainConfig, names: tuple[str, ...], reason: str) -> None:
    """Raise InputError for the first setting in `names` that differs from its default."""
    values, defaults = leaves(config), leaves(TrainConfig())
    for name in names:
        if values[name] != defaults[name]:
            raise InputError(f"config.{name} is {shown(values[name])}, but {reason}")


def _refuse_other_sources(config: TrainConfig) -> None:
    """Refuse settings of a model or of data that the run does not use."""
    if config.model:
        reason = "the sizes of a model that is given with config.model are those of the model"
        refuse_changed(config, _names("scratch."), reason)
    if config.task != "files":
        reason = (
            f"config.task is {shown(config.task)}; it has an effect only with config.task=files"
        )
        refuse_changed(config, _names("files."), reason)
    if config.task == "demo":
        refuse_changed(config, ("data_dir",), "the demo generates its rows and reads no files")


def _refuse_unused_exits(config: TrainConfig) -> None:
    """Refuse settings of exits, gradients and losses that the run does not use."""
    if config.loss.weights == "last":
        reason = "with config.loss.weights=last no early exit is trained"
        refuse_changed(config, ("strategy", "gradient", "distill.weight", "pooler"), reason)
        refuse_changed(config, ("sample_weights.decay", "sample_weights.calibration"), reason)
    if config.strategy in ("two_stage", "attach"):
        reason = f"with config.strategy={config.strategy} early exits never change the encoder"
        refuse_changed(config, ("gradient",), reason)
    if config.strategy == "attach":
        reason = "with config.strategy=attach the last exit, whose score selects the best step, "
        refuse_changed(config, ("export",), reason + "never changes")
        reason = (
            "with config.strategy=attach config.learning_rate is the learning rate of the exits"
        )
        refuse_changed(config, ("exit_learning_rate",), reason)
    if config.strategy not in TWO_PHASES:
        reason = "it has an effect only with config.strategy two_stage or last_first"
        names = ("last_exit_share", "second_phase.learning_rate", "second_phase.warmup_steps")
        refuse_changed(config, names, reason)
    if not config.second_phase.learning_rate:
        reason = "it has no effect while config.second_phase.learning_rate is 0"
        refuse_changed(config, ("second_phase.warmup_steps",), reason)
    of_second_phase = config.strategy == "last_first" and config.second_phase.learning_rate
    if (
        config.exit_learning_rate
        == config.learning_rate
        == (of_second_phase or config.learning_rate)
    ):
        raise InputError(
            "config.exit_learning_rate is config.learning_rate, which has no effect; give 0 or "
            "another learning rate"
        )
    _refuse_unused_sample_weights(config)
    if config.gradient == "scaled" and config.gradient_scale == 1:
        raise InputError("config.gradient_scale is 1, which has no effect; it must be below 1")
    if config.gradient != "scaled":
        reason = "it has an effect only with config.gradient=scaled"
        refuse_changed(config, ("gradient_scale",), reason)
    if not config.distill.weight:
        reason = "it has no effect while config.distill.weight is 0"
        refuse_changed(config, ("distill.temperature",), reason)


def _refuse_unused_sample_weights(config: TrainConfig) -> None:
    weights = config.sample_weights
    if weights.decay:
        reason = "with config.sample_weights.decay the rows have weights of their own"
        refuse_changed(config, ("loss.weights",), reason)
    else:
        reason = "it has no effect while config.sample_weights.decay is 0"
        refuse_changed(config, ("sample_weights.thresholds",), reason)
    if not weights.calibration:
        reason = "it has no effect while config.sample_weights.calibration is 0"
        refuse_changed(config, ("sample_weights.margin",), reason)
    if not (weights.decay or weights.calibration):
        reason = "it has no effect while config.sample_weights.decay and calibration are 0"
        refuse_changed(config, ("sample_weights.signal",), reason)


def _names(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in leaves(TrainConfig()) if name.startswith(prefix))
