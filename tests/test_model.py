"""The encoder against PyTorch's hidden states and logits, and checkpoint round trips."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from helpers import REFERENCES, random_batch, tiny_model
from pabee_jax.checkpoints.files import read_config_json, read_tensors
from pabee_jax.checkpoints.names import LoadReport, from_tensors, to_tensors
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.families import FAMILIES
from pabee_jax.models.layers import dropout, product
from pabee_jax.models.parameters import in_compute_dtype, merge, split, stacked, unstacked
from pabee_jax.training.forward import training_logits

# Covers the rounding on both sides. A wrong GELU changes the logits by 2e-4 or more.
TOLERANCE = 2e-5
MODELS = sorted(path.name for path in (REFERENCES / "models").iterdir())


def load(directory, num_labels=3):
    config = ModelConfig.from_hugging_face(read_config_json(directory), num_labels)
    return from_tensors(read_tensors(directory), config)


def reference_batch(expected):
    return {name: expected[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


run_embed = jax.jit(lambda model, batch: model.embed(batch))
run_layer = jax.jit(EarlyExitModel.layer)
run_exit = jax.jit(lambda model, layer, hidden, mask: model.exit_logits(layer, hidden, mask))
run_full = jax.jit(all_exit_logits)


def every_hidden_state(model, batch):
    """Return the first layer's input followed by every layer's output, and all exits' logits."""
    hidden, mask, side = run_embed(model, batch)
    states, logits = [hidden], []
    for layer, group in enumerate(model.config.layer_groups):
        states.append(run_layer(model, model.groups[group], states[-1], mask, side.of_layer(layer)))
        logits.append(run_exit(model, layer, states[-1], mask))
    return states, logits


def assert_close(actual, expected, name):
    difference = np.abs(np.asarray(actual) - expected).max()
    assert difference < TOLERANCE, f"{name} differ from the reference by {difference:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_every_layer_and_every_exit_equal_pytorch(name):
    model, report = load(REFERENCES / "models" / name)
    assert report == LoadReport((), ())
    expected = np.load(REFERENCES / "models" / name / "expected.npz")
    batch = reference_batch(expected)
    (embeddings, *states), logits = every_hidden_state(model, batch)
    assert_close(embeddings, expected["embeddings"], "embeddings")
    for layer, (state, exit_logits) in enumerate(zip(states, logits, strict=True)):
        assert_close(state, expected["hidden_states"][layer], f"hidden states of layer {layer}")
        assert_close(exit_logits, expected["logits"][layer], f"logits of exit {layer}")
    assert_close(run_full(stacked(model), batch), expected["logits"], "logits under scan")


@pytest.mark.parametrize("name", ["bert-for-pretraining", "albert"])
def test_a_hugging_face_flax_checkpoint_gives_the_recorded_hidden_states(name):
    directory = REFERENCES / "flax" / name
    model, report = load(directory)
    expected = np.load(directory / "expected.npz")
    (_, *states), _ = every_hidden_state(model, reference_batch(expected))
    for layer, state in enumerate(states):
        assert_close(state, expected["hidden_states"][layer], f"hidden states of layer {layer}")
    pooled = jnp.tanh(model.pooler(states[-1][:, 0]))
    assert_close(pooled, expected["pooler_output"], "pooler outputs")
    assert all(missing.startswith("classifiers.") for missing in report.missing)
    heads = [tensor for tensor in report.unexpected if tensor.startswith("cls.")]
    assert list(report.unexpected) == heads and bool(heads) == (name == "bert-for-pretraining")


@pytest.mark.parametrize("name", MODELS)
def test_saved_tensors_have_the_names_and_values_of_the_loaded_checkpoint(name):
    directory = REFERENCES / "models" / name
    model, _ = load(directory)
    saved, original = to_tensors(model), load_file(directory / "model.safetensors")
    assert saved.keys() == original.keys()
    for tensor, value in original.items():
        np.testing.assert_array_equal(saved[tensor], value, err_msg=tensor)


def test_old_layer_norm_names_and_names_without_prefix_are_loaded():
    directory = REFERENCES / "models" / "bert-3-layers"
    tensors = dict(read_tensors(directory))
    old_tensors = {}
    for name, value in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta").removeprefix("bert.")
        old_tensors[name] = value
    old_tensors["embeddings.position_ids"] = np.arange(24)[None]
    old_tensors["cls.predictions.bias"] = np.zeros(60, np.float32)
    config = ModelConfig.from_hugging_face(read_config_json(directory), 3)
    model, report = from_tensors(old_tensors, config)
    assert report == LoadReport((), ("cls.predictions.bias",))
    for name, value in to_tensors(model).items():
        np.testing.assert_array_equal(value, tensors[name])


def test_a_missing_pooler_and_missing_classifiers_are_initialized_from_the_seed():
    directory = REFERENCES / "models" / "bert-3-layers"
    tensors = {
        name: value
        for name, value in read_tensors(directory).items()
        if "pooler" not in name and "classifiers" not in name
    }
    config = ModelConfig.from_hugging_face(read_config_json(directory), 3)
    model, report = from_tensors(tensors, config, seed=1)
    same_seed, _ = from_tensors(tensors, config, seed=1)
    other_seed, _ = from_tensors(tensors, config, seed=2)
    assert len(report.missing) == 2 + 2 * 3
    assert (model.pooler.kernel[...] == same_seed.pooler.kernel[...]).all()
    assert (model.pooler.kernel[...] != other_seed.pooler.kernel[...]).any()
    assert (model.classifiers.bias[...] == 0).all()
    assert float(jnp.std(model.classifiers.kernel[...])) == pytest.approx(0.02, rel=0.3)


def test_sharded_safetensors_are_loaded(tmp_path):
    from safetensors.numpy import save_file

    directory = REFERENCES / "models" / "bert-3-layers"
    tensors = read_tensors(directory)
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, shard in shards.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in shard}, tmp_path / file)
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_tensors(tmp_path).keys() == tensors.keys()


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_padding_does_not_change_the_logits(family):
    model = tiny_model(family)
    batch = random_batch(4, length=8)
    padded = {name: np.pad(values, ((0, 0), (0, 5))) for name, values in batch.items()}
    difference = run_full(model, batch) - run_full(model, padded)
    assert jnp.abs(difference).max() < 1e-5


def test_stacked_and_unstacked_are_inverse():
    model = tiny_model(num_hidden_groups=2, inner_group_num=2, num_hidden_layers=3)
    restored = unstacked(stacked(model))
    assert stacked(model).is_stacked and not restored.is_stacked
    batch = random_batch(4)
    np.testing.assert_array_equal(run_full(restored, batch), run_full(model, batch))


def test_split_and_merge_are_inverse():
    model = tiny_model(num_hidden_groups=2, inner_group_num=2)
    structure, parameters = split(stacked(model))
    assert parameters["groups.inner.1.query_projection.kernel"].shape == (2, 32, 32)
    restored = split(merge(structure, parameters))[1]
    assert restored.keys() == parameters.keys()


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name == "bert" else pytest.mark.slow) for name in FAMILIES],
)
def test_with_bfloat16_only_the_matrices_of_the_encoder_are_cast(family):
    exact = tiny_model(family)
    model = EarlyExitModel(exact.config, dtype="bfloat16", rngs=nnx.Rngs(0))
    model = merge(split(model)[0], split(exact)[1])
    for name, value in split(in_compute_dtype(model))[1].items():
        is_product = name.endswith("kernel") and name.startswith(("groups.", "embeddings."))
        assert value.dtype == (jnp.bfloat16 if is_product else jnp.float32), name
    in_training, logits, expected = (
        run_full(each, random_batch(4)) for each in (model, in_compute_dtype(model), exact)
    )
    np.testing.assert_array_equal(
        logits, in_training, "inference must not round what training does not"
    )
    assert logits.dtype == jnp.float32
    assert 0 < jnp.abs(logits - expected).max() < 0.3


@pytest.mark.parametrize("seed", [0, 1])
def test_dropout_depends_only_on_its_key(seed):
    model, batch = stacked(tiny_model("bert")), random_batch(4)
    run_training = jax.jit(training_logits)
    first, second = (run_training(model, batch, jax.random.key(seed)) for _ in range(2))
    assert (first == second).all()
    assert jnp.abs(first - run_full(model, batch)).max() > 1e-3


@pytest.mark.parametrize("shape", [(64, 7, 33), (50, 1), (4, 8, 64, 64)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_its_rate_and_scales_the_other_elements(shape, rate):
    x = jnp.full(shape, 2.0)
    outputs = np.stack([dropout(x, rate, jax.random.key(seed)) for seed in range(20)])
    assert set(np.unique(outputs)) <= {np.float32(0), np.float32(2 / (1 - rate))}
    measured_rate, size = (outputs == 0).mean(), outputs.size
    assert abs(measured_rate - rate) < 4 * (rate * (1 - rate) / size) ** 0.5
    # Two neighbors are masked by the halves of one random word, but must be independent.
    pairs = (outputs.reshape(20, -1) == 0)[:, : size // 20 // 2 * 2].reshape(-1, 2)
    both_dropped = pairs.all(axis=1).mean()
    assert abs(both_dropped - rate**2) < 5 * (rate**2 / len(pairs)) ** 0.5
    np.testing.assert_array_equal(dropout(x, rate, None), x)
    assert dropout(x.astype(jnp.bfloat16), rate, jax.random.key(0)).dtype == jnp.bfloat16


def dot_types(function, *arguments):
    """Return the types of (left operand, right operand, result) of every product of a program."""
    text = jax.jit(function).lower(*arguments).as_text()
    array = r"tensor<[^>]*x(\w+)>"
    return re.findall(rf"dot_general .*: \({array}, {array}\) -> {array}", text)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_every_product_of_a_bfloat16_layer_returns_float32(family):
    """Forward and backward, attention included: accumulation and results are float32."""
    config = tiny_model(family).config
    model = EarlyExitModel(config, dtype="bfloat16", rngs=nnx.Rngs(0))
    batch = random_batch(2)

    def loss(model, key=None):
        hidden, mask, side = model.embed(batch, key)
        return model.layer(model.groups[0], hidden, mask, side, key).astype(jnp.float32).sum()

    for program in (loss, jax.grad(loss), jax.grad(lambda model: loss(model, jax.random.key(0)))):
        types = dot_types(program, model)
        assert len(types) >= 8 and set(types) == {("bf16", "bf16", "f32")}, types


@pytest.mark.parametrize("equation", ["bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "ri,io->ro"])
def test_a_product_of_bfloat16_is_exact_to_float32_and_so_are_its_gradients(equation):
    """The expected values are computed in float64 from the same rounded operands."""
    random = np.random.default_rng(0)
    sizes = dict(zip("bqkhdrio", (3, 5, 12, 4, 8, 7, 16, 9), strict=True))
    of_x, of_y, of_result = re.split(",|->", equation)
    x, y, weight = (
        jnp.asarray(random.normal(size=[sizes[index] for index in indices]), jnp.bfloat16)
        for indices in (of_x, of_y, of_result)
    )
    result, gradients = jax.vjp(lambda x, y: product(equation, x, y), x, y)
    assert result.dtype == jnp.float32
    x64, y64, weight64 = (np.asarray(values, np.float64) for values in (x, y, weight))
    np.testing.assert_allclose(result, np.einsum(equation, x64, y64), rtol=1e-5, atol=1e-5)
    x_gradient, y_gradient = gradients(weight.astype(jnp.float32))
    # The gradients are rounded to bfloat16, which has 8 bits, once, at the end.
    expected = np.einsum(f"{of_result},{of_y}->{of_x}", weight64, y64)
    np.testing.assert_allclose(x_gradient.astype(np.float64), expected, rtol=2**-8, atol=1e-5)
    expected = np.einsum(f"{of_result},{of_x}->{of_y}", weight64, x64)
    np.testing.assert_allclose(y_gradient.astype(np.float64), expected, rtol=2**-8, atol=1e-5)
