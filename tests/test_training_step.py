"""The training step equals PyTorch's, for all devices, padding rows and compute types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from helpers import REFERENCES, random_batch, tiny_model
from pabee_jax.checkpoints.files import read_config_json, read_tensors
from pabee_jax.checkpoints.names import from_tensors, to_tensors
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import merge, split, stacked, unstacked
from pabee_jax.training.config import LossConfig, SecondPhaseConfig, TrainConfig
from pabee_jax.training.forward import training_logits
from pabee_jax.training.loss import joint_loss, mean_over_rows, row_losses
from pabee_jax.training.optimizer import learning_rate_schedules, make_adamw
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import exit_weights, join_parts, phase_of

TOTAL_STEPS = 8
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
}


def small_bert(dtype="float32"):
    """Return a random BERT with all dropouts active."""
    config = tiny_model("bert", num_hidden_layers=3, initializer_range=0.05).config
    return EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(0))


def reference_model(name):
    folder = REFERENCES / "training" / name
    values, tensors = read_config_json(folder), read_tensors(folder)
    labels = tensors["classifiers.0.weight"].shape[0]
    return from_tensors(tensors, ModelConfig.from_hugging_face(values, labels))[0]


def reference_batches(name):
    """Yield the recorded batches, in which all rows are valid."""
    with np.load(REFERENCES / "training" / name / "batches.npz") as file:
        arrays = dict(file)
    for index in range(len(arrays["labels"])):
        batch = {name: array[index] for name, array in arrays.items()}
        yield {**batch, "valid": np.ones(len(batch["labels"]), bool)}


def labeled_batch(seed=0, rows=16):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, rows, dtype=np.int32)
    return {**random_batch(rows, seed=seed), "labels": labels, "valid": np.ones(rows, bool)}


@functools.cache
def compiled_step(structure, weights="linear"):
    """Return the compiled step; tests share compiled steps, because compiling takes seconds."""
    config = training_config(weights)
    step = make_train_step(structure, config, TOTAL_STEPS)
    phase = phase_of(config, 0, TOTAL_STEPS, 3)
    return lambda state, batch: step(state, batch, phase)


def training_config(weights="linear"):
    """Return the configuration of the recorded runs, with other `weights` if given."""
    return TrainConfig(
        learning_rate=1e-3, weight_decay=0.01, warmup_steps=2, loss=LossConfig(weights)
    )


def start(model, step=0):
    structure, parameters = split(stacked(model))
    # The step donates the buffers of the state, and the model may be used again.
    parameters = jax.tree.map(jnp.copy, parameters)
    state = initial_state(parameters, training_config())
    return structure, state._replace(step=jnp.int32(step))


def one_step(model, batch, step=0, weights="linear"):
    """Return the state and the metrics after training step `step`."""
    structure, state = start(model, step)
    return compiled_step(structure, weights)(state, batch)


def gradients_of(state):
    """Return the (clipped) gradients of the first step from the state after this step.

    After one step, the first moment of AdamW is 0.1 times the gradient.
    """
    moments = {
        part: optax.tree.get(part_state, "mu") for part, part_state in state.optimizer.items()
    }
    return {name: 10 * np.asarray(value) for name, value in join_parts(moments).items()}


@pytest.mark.parametrize("run", ["bert-classification", "albert-regression"])
def test_six_steps_equal_pytorch(run):
    folder = REFERENCES / "training" / run
    expected = np.load(folder / "expected.npz")
    structure, state = start(reference_model(run))
    step = compiled_step(structure)
    for index, batch in enumerate(reference_batches(run)):
        state, metrics = step(state, batch)
        for actual, name in (
            (metrics.loss, "losses"),
            (metrics.exit_losses, "exit_losses"),
            (metrics.gradient_norm, "gradient_norms"),
            (metrics.learning_rate, "learning_rates"),
        ):
            message = f"{name} of step {index}"
            np.testing.assert_allclose(actual, expected[name][index], rtol=1e-4, err_msg=message)
    assert int(state.step) == len(expected["losses"]) == 6
    tensors = to_tensors(unstacked(merge(structure, state.parameters)))
    pytorch_tensors = load_file(folder / "final.safetensors")
    assert tensors.keys() == pytorch_tensors.keys()
    for name, tensor in pytorch_tensors.items():
        # The true gradient of a key bias is 0, so that Adam amplifies rounding errors.
        if "key.bias" not in name:
            np.testing.assert_allclose(tensors[name], tensor, rtol=0, atol=5e-6, err_msg=name)


def joint(kind, losses):
    """Return the joint loss of one row."""
    weights = jnp.array(exit_weights(kind, 3))[:, None]
    return joint_loss(weights, losses, jnp.array([True]), jnp.int32(1))


def exit_losses(logits, labels, valid):
    return mean_over_rows(row_losses(logits, labels), valid, valid.sum())


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("linear", (1 * 0.5 + 2 * 0.2 + 3 * 0.1) / 6),
        ("uniform", (0.5 + 0.2 + 0.1) / 3),
        ("last", 0.1),
    ],
)
def test_joint_loss_is_the_weighted_mean_of_the_exits_losses(kind, expected):
    losses = jnp.array([[0.5], [0.2], [0.1]])
    assert float(joint(kind, losses)) == pytest.approx(expected, rel=1e-6)


def test_a_loss_of_weight_zero_does_not_enter_the_sum():
    assert float(joint("last", jnp.array([[jnp.inf], [jnp.nan], [0.25]]))) == 0.25


def test_cross_entropy_equals_its_closed_form():
    # With two classes, the loss of a row is log(1 + exp(logit of the other class - logit of the
    # label)).
    logits = jnp.log(jnp.array([[[1.0, 1.0], [1.0, 3.0]], [[4.0, 1.0], [5.0, 1.0]]]))
    expected = [
        (np.log(2) + np.log(4 / 3)) / 2,
        (np.log(5 / 4) + np.log(6)) / 2,
    ]
    losses = exit_losses(logits, jnp.array([0, 1]), jnp.array([True, True]))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_squared_error_equals_its_closed_form():
    logits = jnp.array([[[1.0], [2.0], [9.0]], [[0.0], [4.0], [9.0]]])
    losses = exit_losses(logits, jnp.array([0.5, 4.0, 0.0]), jnp.array([True, True, False]))
    np.testing.assert_allclose(losses, [(0.25 + 4.0) / 2, (0.25 + 0.0) / 2], rtol=1e-6)


def test_losses_are_means_over_the_valid_rows():
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 8, 4)).astype(np.float32)
    labels, valid = random.integers(0, 4, 8), np.array([True, False] * 4)
    logits[:, ~valid] = np.inf
    labels[~valid] = -1
    losses = exit_losses(*map(jnp.asarray, (logits, labels, valid)))
    valid_rows = (logits[:, valid], labels[valid], valid[valid])
    losses_of_valid_rows = exit_losses(*map(jnp.asarray, valid_rows))
    np.testing.assert_allclose(losses, losses_of_valid_rows, rtol=1e-6)


def test_padding_rows_change_no_gradient():
    """Four rows with four padding rows have the same mean loss as the four rows twice."""
    model = reference_model("bert-classification")
    batch = next(reference_batches("bert-classification"))
    rows = {name: values[:4] for name, values in batch.items()}
    twice = {name: np.concatenate([values, values]) for name, values in rows.items()}
    padded = {
        name: np.concatenate([values, np.zeros_like(values)]) for name, values in rows.items()
    }
    # The contents of padding rows must not change the gradient either.
    padded["input_ids"][4:], padded["labels"][4:] = 7, 2
    (state, metrics), (padded_state, padded_metrics) = (
        one_step(model, batch) for batch in (twice, padded)
    )
    np.testing.assert_allclose(padded_metrics.exit_losses, metrics.exit_losses, rtol=1e-5)
    np.testing.assert_allclose(padded_metrics.gradient_norm, metrics.gradient_norm, rtol=1e-5)
    expected, padded_gradients = gradients_of(state), gradients_of(padded_state)
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            padded_gradients[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_weight_decay_exempts_biases_and_layer_norms(family):
    config = TrainConfig(weight_decay=0.1)
    shapes = split(nnx.eval_shape(lambda: tiny_model(family, num_hidden_layers=2)))[1]
    parameters = {name: jnp.ones(shape.shape) for name, shape in shapes.items()}
    optimizer = make_adamw(config)
    zero_gradients = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = jax.jit(optimizer.update)(zero_gradients, optimizer.init(parameters), parameters)
    num_exempt = 0
    for name, update in updates.items():
        exempt = "bias" in name or "norm" in name
        num_exempt += exempt
        np.testing.assert_allclose(update, 0.0 if exempt else -0.1, rtol=1e-6, err_msg=name)
    assert 0 < num_exempt < len(updates)


@pytest.mark.parametrize(
    "warmup_steps, total_steps, rates",
    [
        (0, 4, [8, 6, 4, 2, 0, 0]),
        (4, 12, [0, 2, 4, 6, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (2, 2, [0, 4]),
        # The warm-up is longer than the run: the learning rate rises until the end.
        (4, 2, [0, 2]),
    ],
)
def test_learning_rate_rises_and_falls_linearly(warmup_steps, total_steps, rates):
    config = TrainConfig(learning_rate=8.0, warmup_steps=warmup_steps)
    schedule = learning_rate_schedules(config, total_steps)["shared"]
    np.testing.assert_allclose([schedule(step) for step in range(len(rates))], rates, atol=1e-5)


def test_each_phase_can_have_a_learning_rate_schedule_of_its_own():
    config = TrainConfig(learning_rate=8.0, strategy="last_first", last_exit_share=0.4)
    config.second_phase = SecondPhaseConfig(learning_rate=4.0, warmup_steps=2)
    schedule = learning_rate_schedules(config, total_steps=10)["shared"]
    rates = [8, 6, 4, 2, 0, 2, 4, 3, 2, 1, 0]
    np.testing.assert_allclose([schedule(step) for step in range(11)], rates, atol=1e-5)


@pytest.mark.slow  # tests/test_parallel.py has more meshes.
def test_one_device_and_eight_devices_give_the_same_losses():
    """The model has dropout, whose masks must not depend on the sharding of the batch."""

    def losses(devices):
        mesh = sharding.make_mesh(devices)
        structure, state = start(small_bert())
        state = sharding.replicate(state, mesh)
        result = []
        for seed in range(5):
            batch = sharding.shard_batch(labeled_batch(seed), mesh)
            state, metrics = compiled_step(structure)(state, batch)
            result.append(metrics.exit_losses)
        assert len(metrics.loss.sharding.device_set) == devices
        return np.array(result)

    np.testing.assert_allclose(losses(1), losses(8), rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_follows_float32():
    (_, metrics), (half_state, half_metrics) = (
        one_step(small_bert(dtype), labeled_batch(), step=3) for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(half_metrics.loss, metrics.loss, rtol=0.02)
    assert half_metrics.loss != metrics.loss, "the model must compute in bfloat16"
    assert jnp.isfinite(half_metrics.gradient_norm)
    for name, value in half_state.parameters.items():
        assert value.dtype == jnp.float32, f"{name} must stay float32, but is {value.dtype}"
        assert jnp.isfinite(value).all(), name


def test_dropout_is_a_function_of_the_step():
    model, batch = small_bert(), labeled_batch()
    loss, repeated_loss, other_loss = (one_step(model, batch, step)[1].loss for step in (3, 3, 4))
    assert loss == repeated_loss, "a resumed run must draw the same dropout masks"
    assert loss != other_loss, "different steps must draw different dropout masks"


@pytest.mark.parametrize("active", NO_DROPOUT)
def test_every_dropout_is_active_in_training(active):
    def logits(**rates):
        model = tiny_model(num_hidden_layers=3, **rates)
        return jax.jit(training_logits)(stacked(model), random_batch(8), jax.random.key(0))

    difference = np.abs(logits(**NO_DROPOUT | {active: 0.3}) - logits(**NO_DROPOUT))
    assert (difference.max(axis=(1, 2)) > 1e-3).all(), (
        f"{active} must change the logits in training"
    )


def test_with_weights_last_only_the_last_classifier_has_a_gradient():
    model = reference_model("bert-classification")
    batch = next(reference_batches("bert-classification"))
    state, metrics = one_step(model, batch, weights="last")
    assert metrics.loss == metrics.exit_losses[-1]
    for name, gradient in gradients_of(state).items():
        if name.startswith("classifiers."):
            assert (gradient[:-1] == 0).all(), f"{name} of an early exit must have no gradient"
            gradient = gradient[-1]
        assert (gradient != 0).any(), f"{name} must have a gradient"


@pytest.mark.slow
def test_bfloat16_accumulates_gradients_in_float32():
    """A gradient that was accumulated in bfloat16 would not change by a cast to bfloat16."""
    rows = 64
    batch = jax.tree.map(jnp.asarray, labeled_batch(rows=rows))

    def gradients(dtype):
        structure, parameters = split(stacked(small_bert(dtype)))

        def loss(parameters):
            logits = all_exit_logits(merge(structure, parameters), batch)
            return exit_losses(logits, batch["labels"], batch["valid"]).sum()

        return jax.grad(loss)(parameters)

    for name, value in gradients("bfloat16").items():
        rounded = value.astype(jnp.bfloat16).astype(jnp.float32)
        assert value.dtype == jnp.float32
        nonzero = value != 0
        is_float32 = not nonzero.any() or (value != rounded)[nonzero].mean() > 0.5
        assert is_float32, f"the gradient of {name} must be accumulated in float32"
