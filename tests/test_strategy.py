"""Training strategies: the parameters that a step changes, and the parameters that it does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers import random_batch, tiny_model
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.errors import InputError
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import merge, split, stacked
from pabee_jax.training.config import (
    DistillConfig,
    LossConfig,
    SampleWeightsConfig,
    SecondPhaseConfig,
    TrainConfig,
    check,
    recommend,
)
from pabee_jax.training.effects import refuse_settings_without_effect
from pabee_jax.training.loss import row_distances
from pabee_jax.training.optimizer import learning_rate_schedules
from pabee_jax.training.start import prior_bias
from pabee_jax.training.step import initial_state, make_eval_step, make_train_step
from pabee_jax.training.steps import refuse_short_run
from pabee_jax.training.strategy import PARTS, Phase, exit_weights, phase_of, split_parts

EXITS, STEPS = 3, 10
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LINEAR, LAST = (1 / 6, 2 / 6, 3 / 6), (0.0, 0.0, 1.0)


def config_of(**fields) -> TrainConfig:
    defaults = dict(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.0)
    config = TrainConfig(**defaults | fields)
    check(config)
    return config


@functools.cache
def model_of(pooler="shared", pooling="cls", labels=3, dropout=False) -> EarlyExitModel:
    """Return a BERT, whose layers do not share parameters."""
    exits = {"exit_pooler": pooler, "exit_pooling": pooling}
    rates = {} if dropout else NO_DROPOUT
    return tiny_model("bert", labels, num_hidden_layers=EXITS, **exits, **rates)


def labeled_batch(labels=3, rows=8):
    values = np.random.default_rng(1).integers(0, 3, rows)
    values = values.astype(np.int32 if labels > 1 else np.float32)
    return {**random_batch(rows, seed=1), "labels": values, "valid": np.ones(rows, bool)}


def start(model, config):
    structure, parameters = split(stacked(model))
    return structure, initial_state(jax.tree.map(jnp.copy, parameters), config)


def run_steps(model, config, phases, batch=None):
    """Return the parameters before the first step and after every step, and the last metrics."""
    structure, state = start(model, config)
    step = make_train_step(structure, config, STEPS)
    batch = batch or labeled_batch(model.config.num_labels)
    parameters = [jax.device_get(state.parameters)]
    for phase in phases:
        state, metrics = step(state, batch, phase)
        parameters.append(jax.device_get(state.parameters))
    return parameters, metrics


def by_exit(parameters, pooler):
    """Return the parameters by name, with one entry per exit for parameters of the exits."""
    result = {}
    for name, value in parameters.items():
        if name.startswith("classifiers.") or (name.startswith("pooler.") and pooler != "shared"):
            result |= {f"{name} of exit {exit}": value[exit - 1] for exit in range(1, EXITS + 1)}
        else:
            result[name] = value
    return result


def changed(before, after, pooler):
    """Return the names of the changed parameters, and the names of all compared parameters."""
    before, after = by_exit(before, pooler), by_exit(after, pooler)
    # The true gradient of a key bias is 0; rounding errors may change it or not.
    names = {name for name in before if "key_projection.bias" not in name}
    return {name for name in names if (before[name] != after[name]).any()}, names


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [LINEAR] * STEPS),
        ({"loss": LossConfig("uniform")}, [(1 / 3,) * 3] * STEPS),
        ({"loss": LossConfig("last")}, [LAST] * STEPS),
        ({"strategy": "alternating"}, [LAST, LINEAR] * 5),
        ({"strategy": "last_first", "last_exit_share": 0.3}, [LAST] * 3 + [LINEAR] * 7),
        ({"strategy": "two_stage"}, [LAST] * 5 + [(1 / 3, 2 / 3, 0.0)] * 5),
        (
            {"strategy": "two_stage", "loss": LossConfig("uniform"), "last_exit_share": 0.8},
            [LAST] * 8 + [(1 / 2, 1 / 2, 0.0)] * 2,
        ),
    ],
)
def test_loss_weights_of_every_step(fields, expected):
    config = config_of(**fields)
    phases = [phase_of(config, step, STEPS, EXITS) for step in range(STEPS)]
    np.testing.assert_allclose([phase.weights for phase in phases], expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("pooler", ["shared", "per_exit"])
def test_a_step_of_the_last_exit_alone_does_not_change_the_early_exits(pooler):
    """The early exits have momentum from an earlier joint step, and weight decay."""
    config = config_of(strategy="alternating", pooler=pooler)
    joint_phase, last_phase = (phase_of(config, step, STEPS, EXITS) for step in (1, 0))
    parameters, metrics = run_steps(model_of(pooler), config, [joint_phase, last_phase])
    assert metrics.loss == metrics.exit_losses[-1]
    changed_names, names = changed(parameters[0], parameters[1], pooler)
    assert changed_names == names, "the joint step must change all parameters"
    changed_names, names = changed(parameters[1], parameters[2], pooler)
    early = {name for name in names if "of exit 1" in name or "of exit 2" in name}
    assert early and changed_names == names - early


@pytest.mark.parametrize("pooler", ["shared", pytest.param("per_exit", marks=pytest.mark.slow)])
def test_the_second_stage_changes_only_early_exits_and_no_logit_of_the_last_exit(pooler):
    config = config_of(strategy="two_stage", pooler=pooler, pooling="mean")
    phases = [phase_of(config, step, STEPS, EXITS) for step in (0, 0, 0, 9, 9)]
    model = model_of(pooler, "mean")
    parameters, _ = run_steps(model, config, phases)
    changed_names, names = changed(parameters[0], parameters[3], pooler)
    early = {name for name in names if "of exit 1" in name or "of exit 2" in name}
    assert changed_names == names - early, "the first stage must train all but the early exits"
    changed_names, _ = changed(parameters[3], parameters[5], pooler)
    assert changed_names == early, "the second stage must train only the early exits"
    logits = make_eval_step(split(stacked(model))[0])
    before, after = (logits(parameters[step], labeled_batch()) for step in (3, 5))
    np.testing.assert_array_equal(before[-1], after[-1])
    assert (before[:-1] != after[:-1]).any()


def test_bias_correction_counts_the_steps_of_each_part():
    """The first Adam update of a part has the size of the learning rate at any step of the run."""
    config = config_of(strategy="two_stage", weight_decay=0.0)
    phases = [phase_of(config, step, STEPS, EXITS) for step in (0, 0, 0, 0, 0, 9)]
    parameters, metrics = run_steps(model_of(), config, phases)
    updates = parameters[6]["classifiers.kernel"][:2] - parameters[5]["classifiers.kernel"][:2]
    np.testing.assert_allclose(np.abs(updates), metrics.learning_rate, rtol=1e-3)


@functools.cache
def gradients_of_each_exit(pooling):
    """Return the gradient of each exit's loss, from an independent implementation of the loss."""
    structure, parameters = split(stacked(model_of(pooling=pooling)))
    batch = labeled_batch()
    labels = jnp.asarray(batch["labels"])

    def losses(parameters):
        logits = all_exit_logits(merge(structure, parameters), batch)
        log_likelihood = jnp.take_along_axis(
            jax.nn.log_softmax(logits), labels[None, :, None], axis=2
        )
        return -log_likelihood[:, :, 0].mean(axis=1)

    return jax.device_get(jax.jit(jax.jacrev(losses))(parameters))


@pytest.mark.parametrize(
    ("pooling", "fields", "factor"),
    [
        # The factor on the gradient of exit j in layer i, both from 1; layer 0 is the embeddings.
        ("cls", {"gradient": "full"}, lambda i, j: 1.0),
        ("cls", {"gradient": "equilibrium"}, lambda i, j: 1 / (EXITS - max(i, 1) + 1)),
        ("mean", {"gradient": "equilibrium"}, lambda i, j: 1 / (EXITS - max(i, 1) + 1)),
        (
            "mean",
            {"gradient": "scaled", "gradient_scale": 0.25},
            lambda i, j: 1.0 if j == EXITS else 0.25,
        ),
        (
            "cls",
            {"gradient": "scaled", "gradient_scale": 0.0},
            lambda i, j: 1.0 if j == EXITS else 0.0,
        ),
    ],
)
def test_gradients_of_exits_enter_the_encoder_with_the_documented_factors(pooling, fields, factor):
    config = config_of(pooling=pooling, **fields)
    model, batch = model_of(pooling=pooling), labeled_batch()
    exit_gradients = gradients_of_each_exit(pooling)
    structure, state = start(model, config)
    phase = phase_of(config, 0, STEPS, EXITS)
    state, _ = make_train_step(structure, config, STEPS)(state, batch, phase)
    # After one step AdamW's first moment is 0.1 times the gradient.
    moments = state.optimizer["shared"][0].mu
    for name, moment in moments.items():
        gradient, gradients = 10 * np.asarray(moment), exit_gradients[name]
        if name.startswith("groups."):
            for i in range(1, EXITS + 1):
                sums = [factor(i, j) * LINEAR[j - 1] * gradients[j - 1, i - 1] for j in range(i, 4)]
                close(gradient[i - 1], sum(sums), f"{name} of layer {i}")
        elif name.startswith("pooler."):  # The pooler receives unscaled gradients.
            close(gradient, sum(LINEAR[j - 1] * gradients[j - 1] for j in (1, 2, 3)), name)
        else:
            sums = [factor(0, j) * LINEAR[j - 1] * gradients[j - 1] for j in (1, 2, 3)]
            close(gradient, sum(sums), name)
    for part, exits in (("early", slice(0, 2)), ("last", slice(2, 3))):
        for name, moment in state.optimizer[part][0].mu.items():
            expected = [LINEAR[j] * exit_gradients[name][j, j] for j in range(EXITS)][exits]
            close(10 * np.asarray(moment), np.stack(expected), f"{name}, {part}")


def close(actual, expected, message):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6, err_msg=message)


def test_a_step_of_the_last_exit_alone_scales_no_gradient():
    config = config_of(strategy="alternating", gradient="equilibrium")
    assert phase_of(config, 0, STEPS, EXITS) == Phase(LAST, ("shared", "last"))
    assert phase_of(config, 1, STEPS, EXITS).gradient == "equilibrium"


def softmax(x):
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_loss_equals_its_closed_form(temperature):
    random = np.random.default_rng(0)
    logits = random.normal(size=(EXITS, 5, 4)).astype(np.float32)
    distances = row_distances(jnp.asarray(logits), temperature)
    probabilities = softmax(logits.astype(np.float64) / temperature)
    teacher = probabilities[-1]
    divergences = (teacher * np.log(teacher / probabilities)).sum(axis=2)
    np.testing.assert_allclose(distances, temperature**2 * divergences, rtol=1e-4, atol=1e-6)


def test_distillation_of_scores_is_the_squared_difference():
    logits = jnp.array([[[1.0], [2.0], [7.0]], [[3.0], [2.5], [9.0]]])
    np.testing.assert_allclose(row_distances(logits, 1.0), [[4.0, 0.25, 4.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("labels", [1, 3])
def test_distillation_has_no_gradient_at_the_last_exit(labels):
    logits = jax.random.normal(jax.random.key(0), (EXITS, 5, labels))
    gradient = jax.grad(lambda logits: row_distances(logits, 2.0).sum())(logits)
    assert (gradient[-1] == 0).all() and (gradient[:-1] != 0).any()


def test_the_loss_includes_the_weighted_distillation_losses():
    distill = DistillConfig(weight=0.5, temperature=2.0)
    model, batch = model_of(), labeled_batch()
    _, plain = run_steps(model, config_of(), [Phase(LINEAR, ("shared", "early", "last"))])
    config = config_of(distill=distill)
    _, metrics = run_steps(model, config, [phase_of(config, 0, STEPS, EXITS)])
    logits = np.asarray(all_exit_logits(model, batch), np.float64)
    probabilities = softmax(logits / 2.0)
    divergences = (probabilities[-1] * np.log(probabilities[-1] / probabilities)).sum(axis=2)
    distilled = divergences.mean(axis=1)
    added = sum(weight * 0.5 * 4 * loss for weight, loss in zip(LINEAR, distilled, strict=True))
    np.testing.assert_allclose(metrics.exit_losses, plain.exit_losses, rtol=1e-6)
    np.testing.assert_allclose(metrics.loss - plain.loss, added, rtol=1e-3)


# By settings, with learning_rate=2e-5 and 10 steps: by step, counted from 0, the learning rates of
# the encoder, of the early exits and of the last exit; 0 for a part that the step does not train.
SECOND = SecondPhaseConfig(learning_rate=4e-4)
RATES = {
    "paper": ({}, {0: (2e-5, 2e-5, 2e-5), 5: (1e-5, 1e-5, 1e-5)}),
    "recommended": ({"recommended": True}, {0: (2e-5, 1e-3, 1e-3), 5: (1e-5, 5e-4, 5e-4)}),
    "recommended, warm-up": (
        {"recommended": True, "warmup_steps": 4},
        {1: (5e-6, 2.5e-4, 2.5e-4), 4: (2e-5, 1e-3, 1e-3), 7: (1e-5, 5e-4, 5e-4)},
    ),
    "recommended, alternating": (
        {"recommended": True, "strategy": "alternating"},
        {0: (2e-5, 0, 1e-3), 5: (1e-5, 5e-4, 5e-4)},
    ),
    "attach": ({"strategy": "attach"}, {0: (0, 2e-5, 0), 5: (0, 1e-5, 0)}),
    "attach, warm-up": ({"strategy": "attach", "warmup_steps": 4}, {1: (0, 5e-6, 0)}),
    "two_stage": ({"strategy": "two_stage"}, {0: (2e-5, 0, 2e-5), 5: (0, 1e-5, 0)}),
    "recommended, two_stage": (
        {"recommended": True, "strategy": "two_stage"},
        {0: (2e-5, 0, 1e-3), 5: (0, 5e-4, 0)},
    ),
    "two_stage, two schedules": (
        {"strategy": "two_stage", "second_phase": SECOND},
        {0: (2e-5, 0, 2e-5), 4: (4e-6, 0, 4e-6), 5: (0, 4e-4, 0)},
    ),
    "recommended, two_stage, two schedules": (
        {"recommended": True, "strategy": "two_stage", "second_phase": SECOND},
        {0: (2e-5, 0, 1e-3), 4: (4e-6, 0, 2e-4), 5: (0, 4e-4, 0)},
    ),
    "recommended, two_stage, two schedules of one rate": (
        {"recommended": True, "strategy": "two_stage", "second_phase": SecondPhaseConfig(1e-3, 2)},
        {6: (0, 5e-4, 0), 7: (0, 1e-3, 0)},
    ),
    "last_first": ({"strategy": "last_first"}, {0: (2e-5, 0, 2e-5), 5: (1e-5,) * 3}),
    "last_first, two schedules": (
        {"strategy": "last_first", "second_phase": SECOND},
        {0: (2e-5, 0, 2e-5), 5: (4e-4, 4e-4, 4e-4), 9: (8e-5, 8e-5, 8e-5)},
    ),
    "last_first, two schedules, one rate of the exits": (
        {"strategy": "last_first", "second_phase": SECOND, "exit_learning_rate": 2e-5},
        {0: (2e-5, 0, 2e-5), 5: (4e-4, 2e-5, 2e-5)},
    ),
    "recommended, last_first, two schedules": (
        {"recommended": True, "strategy": "last_first", "second_phase": SECOND},
        {0: (2e-5, 0, 1e-3), 5: (4e-4, 1e-3, 1e-3), 9: (8e-5, 2e-4, 2e-4)},
    ),
}


def recipe_of(name) -> TrainConfig:
    fields = dict(RATES[name][0])
    config = TrainConfig(adam_epsilon=1e-15, max_grad_norm=0.0)
    if fields.pop("recommended", False):
        recommend(config)
    config = dataclasses.replace(config, **fields)
    check(config)
    refuse_settings_without_effect(config)
    return config


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_of_every_part_in_every_phase(name):
    config = recipe_of(name)
    schedules = learning_rate_schedules(config, STEPS)
    for step, expected in RATES[name][1].items():
        trained = phase_of(config, step, STEPS, EXITS).parts
        rates = [schedules[part](step) if part in trained else 0 for part in PARTS]
        assert rates == pytest.approx(expected, rel=1e-4), f"step {step}"


IN_STEPS = ("recommended, two_stage, two schedules", "recommended, last_first, two schedules")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in IN_STEPS else pytest.mark.slow) for name in RATES],
)
def test_the_first_update_of_adam_has_the_size_of_the_learning_rate(name):
    """The steps begin with a new state at their step of the run, as after resuming."""
    config = recipe_of(name)
    structure, state = start(model_of(config.pooler, config.pooling), config)
    step = make_train_step(structure, config, STEPS)
    before = jax.device_get(state)
    for index, expected in RATES[name][1].items():
        phase = phase_of(config, index, STEPS, EXITS)
        state = jax.tree.map(jnp.array, before)._replace(step=jnp.int32(index))
        after, metrics = step(state, labeled_batch(), phase)
        sizes = jax.tree.map(
            lambda new, old: np.abs(new - old), after.parameters, before.parameters
        )
        rates = [
            float(np.median(np.concatenate([value.ravel() for value in values.values()])))
            for values in split_parts(sizes, config.pooler).values()
        ]
        assert rates == pytest.approx(expected, rel=0.01), f"step {index}"
        assert metrics.learning_rate == pytest.approx(expected[0] or expected[1])


def test_prior_bias_is_the_log_frequencies_or_the_mean_score():
    # Natural logarithms; the class without rows counts as a class with one row.
    labels = np.array([0, 0, 0, 2], np.int32)
    np.testing.assert_allclose(prior_bias(labels, 3), np.log([0.75, 0.25, 0.25]), rtol=1e-6)
    assert prior_bias(np.array([1.0, 2.0, 4.5], np.float32), 1) == pytest.approx([2.5])


@pytest.mark.slow
def test_combined_settings_in_bfloat16_on_two_devices_follow_float32_on_one_device():
    fields = dict(gradient="equilibrium", distill=DistillConfig(0.5, 2.0), pooler="per_exit")
    config = config_of(pooling="mean", **fields)
    model_config = model_of("per_exit", "mean", dropout=True).config
    losses = {}
    for dtype, devices in (("float32", 1), ("bfloat16", 2)):
        model = EarlyExitModel(model_config, dtype=dtype, rngs=nnx.Rngs(0))
        mesh = sharding.make_mesh(devices)
        structure, state = start(model, config)
        state = sharding.replicate(state, mesh)
        step = make_train_step(structure, config, STEPS)
        batch = sharding.shard_batch(labeled_batch(), mesh)
        exit_losses = []
        for index in range(3):  # Rounding errors grow from step to step.
            state, metrics = step(state, batch, phase_of(config, index, STEPS, EXITS))
            exit_losses.append(metrics.exit_losses)
        losses[dtype] = np.array(exit_losses)
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)


REFUSED = {
    "strategy=mixed": (dict(strategy="mixed"), "joint, two_stage, alternating, last_first"),
    "gradient=half": (dict(gradient="half"), "full, equilibrium, scaled"),
    "pooler": (dict(pooler="each"), "shared, per_exit"),
    "pooling": (dict(pooling="max"), "cls, mean"),
    "bias": (dict(classifier_bias="mean"), "zero, prior"),
    "order": (dict(order="sorted"), "shuffled, length_grouped"),
    "no share": (dict(strategy="last_first", last_exit_share=0.0), "between 0 and 1"),
    "all steps": (dict(strategy="two_stage", last_exit_share=1.0), "between 0 and 1"),
    "a share without effect": (
        dict(last_exit_share=0.3),
        "only with config.strategy two_stage or last_first",
    ),
    "a second phase without effect": (
        dict(second_phase=SecondPhaseConfig(1e-5)),
        "second_phase.learning_rate is 1e-05, but it has an effect only with config.strategy",
    ),
    "a warm-up without effect": (
        dict(strategy="last_first", second_phase=SecondPhaseConfig(warmup_steps=3)),
        "no effect while config.second_phase.learning_rate is 0",
    ),
    "the exits' learning rate": (
        dict(learning_rate=1e-4, exit_learning_rate=1e-4),
        "exit_learning_rate is config.learning_rate, which has no effect",
    ),
    "the exits' learning rate in two stages": (
        dict(
            learning_rate=1e-4,
            exit_learning_rate=1e-4,
            strategy="two_stage",
            second_phase=SecondPhaseConfig(1e-3),
        ),
        "exit_learning_rate is config.learning_rate, which has no effect",
    ),
    "attached exits": (
        dict(strategy="attach", exit_learning_rate=1e-3),
        "config.learning_rate is the learning rate of the exits",
    ),
    "sample weights and weights": (
        dict(sample_weights=SampleWeightsConfig(1.0), loss=LossConfig("uniform")),
        "loss.weights is 'uniform', but with config.sample_weights.decay",
    ),
    "thresholds without effect": (
        dict(sample_weights=SampleWeightsConfig(thresholds=3, calibration=1.0)),
        "sample_weights.thresholds is 3, but it has no effect while",
    ),
    "a signal without effect": (
        dict(sample_weights=SampleWeightsConfig(signal="entropy")),
        "sample_weights.signal is 'entropy', but",
    ),
    "a margin without effect": (
        dict(sample_weights=SampleWeightsConfig(1.0, margin=0.5)),
        "sample_weights.margin is 0.5, but",
    ),
    "signal": (
        dict(sample_weights=SampleWeightsConfig(1.0, signal="patience")),
        "energy, max_probability, entropy",
    ),
    "last, sample weights": (
        dict(loss=LossConfig("last"), sample_weights=SampleWeightsConfig(1.0)),
        "no early exit is trained",
    ),
    "scale": (dict(gradient="scaled", gradient_scale=1.5), "0 to 1"),
    "no number": (dict(gradient="scaled", gradient_scale=float("nan")), "0 to 1"),
    "a scale of 1": (dict(gradient="scaled"), "config.gradient_scale is 1, which has no effect"),
    "a scale without effect": (dict(gradient_scale=0.5), "only with config.gradient=scaled"),
    "distill": (dict(distill=DistillConfig(weight=-1.0)), "at least 0"),
    "temperature": (dict(distill=DistillConfig(1.0, 0.0)), "positive"),
    "a temperature without effect": (dict(distill=DistillConfig(0.0, 2.0)), "distill.weight is 0"),
    "last, two stages": (
        dict(loss=LossConfig("last"), strategy="two_stage"),
        "config.strategy is 'two_stage', but .* no early exit is trained",
    ),
    "last, distilled": (
        dict(loss=LossConfig("last"), distill=DistillConfig(1.0)),
        "no early exit is trained",
    ),
    "two stages, scaled": (
        dict(strategy="two_stage", gradient="equilibrium"),
        "early exits never change the encoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_settings_and_settings_without_effect_are_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        check(TrainConfig(**fields))
        refuse_settings_without_effect(TrainConfig(**fields))


@pytest.mark.parametrize(
    ("warmup", "second", "message"),
    [
        (4, 0, "config.warmup_steps is 4, but its phase has 4 steps"),
        (3, 6, "config.second_phase.warmup_steps is 6, but its phase has 6 steps"),
    ],
)
def test_a_warmup_as_long_as_its_phase_is_refused(warmup, second, message):
    config = config_of(
        strategy="last_first",
        last_exit_share=0.4,
        warmup_steps=warmup,
        second_phase=SecondPhaseConfig(1e-3, second),
        max_steps=10,
    )
    with pytest.raises(InputError, match=message):
        refuse_short_run(config, 320)
    config = dataclasses.replace(config, warmup_steps=3, second_phase=SecondPhaseConfig(1e-3, 5))
    refuse_short_run(config, 320)


@pytest.mark.parametrize(("share", "first"), [(0.01, 1), (0.99, 3), (0.5, 2)])
def test_a_short_run_has_both_phases(share, first):
    config = config_of(strategy="last_first", last_exit_share=share)
    phases = [phase_of(config, step, 4, EXITS).weights for step in range(4)]
    np.testing.assert_allclose(phases, [LAST] * first + [LINEAR] * (4 - first))


def test_exit_weights_are_exact():
    assert exit_weights("linear", 4) == (0.1, 0.2, 0.3, 0.4)
    assert exit_weights("uniform", 2) == (0.5, 0.5)
    assert exit_weights("last", 1) == exit_weights("linear", 1) == (1.0,)
