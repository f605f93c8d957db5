"""The encoder computes what PyTorch computes, and a checkpoint survives the round trip."""

import json

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
from pabee_jax.models.layers import dropout
from pabee_jax.models.parameters import in_compute_dtype, merge, split, stacked, unstacked
from pabee_jax.training.forward import training_logits

# Both sides round; a wrong GELU moves the logits by 2e-4 or more.
TOLERANCE = 2e-5
MODELS = sorted(path.name for path in (REFERENCES / "models").iterdir())


def load(directory, labels=3):
    config = ModelConfig.from_hugging_face(read_config_json(directory), labels)
    return from_tensors(read_tensors(directory), config)


def reference_batch(expected):
    return {name: expected[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


run_embed = jax.jit(lambda model, batch: model.embed(batch))
run_layer = jax.jit(lambda model, group, hidden, mask: model.layer(group, hidden, mask))
run_exit = jax.jit(lambda model, layer, hidden, mask: model.exit_logits(layer, hidden, mask))
run_full = jax.jit(all_exit_logits)


def every_hidden_state(model, batch):
    """What enters the first layer, what leaves each, and the logits of each exit."""
    hidden, mask = run_embed(model, batch)
    states, logits = [hidden], []
    for layer, group in enumerate(model.config.layer_groups):
        states.append(run_layer(model, model.groups[group], states[-1], mask))
        logits.append(run_exit(model, layer, states[-1], mask))
    return states, logits


def assert_close(ours, theirs, what):
    difference = np.abs(np.asarray(ours) - theirs).max()
    assert difference < TOLERANCE, f"{what} differ from PyTorch's by {difference:.1e}"


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_every_layer_and_every_exit_equal_pytorch(name):
    model, report = load(REFERENCES / "models" / name)
    assert report == LoadReport((), ())
    expected = np.load(REFERENCES / "models" / name / "expected.npz")
    batch = reference_batch(expected)
    (embeddings, *states), logits = every_hidden_state(model, batch)
    assert_close(embeddings, expected["embeddings"], "embeddings")
    for layer, (state, answer) in enumerate(zip(states, logits, strict=True)):
        assert_close(state, expected["hidden_states"][layer], f"hidden states of layer {layer}")
        assert_close(answer, expected["logits"][layer], f"logits of exit {layer}")
    assert_close(run_full(stacked(model), batch), expected["logits"], "logits under scan")


@pytest.mark.parametrize("name", ["bert-for-pretraining", "albert"])
def test_reads_what_hugging_face_flax_saved(name):
    directory = REFERENCES / "flax" / name
    model, report = load(directory)
    expected = np.load(directory / "expected.npz")
    (_, *states), _ = every_hidden_state(model, reference_batch(expected))
    for layer, state in enumerate(states):
        assert_close(state, expected["hidden_states"][layer], f"hidden states of layer {layer}")
    pooled = jnp.tanh(model.pooler(states[-1][:, 0]))
    assert_close(pooled, expected["pooler_output"], "pooler outputs")
    assert all(name.startswith("classifiers.") for name in report.missing)
    heads = [name for name in report.unexpected if name.startswith("cls.")]
    assert list(report.unexpected) == heads and bool(heads) == (name == "bert-for-pretraining")


@pytest.mark.parametrize("name", MODELS)
def test_writes_the_names_and_values_it_read(name):
    directory = REFERENCES / "models" / name
    model, _ = load(directory)
    written, original = to_tensors(model), load_file(directory / "model.safetensors")
    assert written.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)


def test_reads_old_and_wrapped_names():
    directory = REFERENCES / "models" / "bert-3-layers"
    tensors = dict(read_tensors(directory))
    old = {}
    for name, value in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta").removeprefix("bert.")
        old[name] = value
    old["embeddings.position_ids"] = np.arange(24)[None]
    old["cls.predictions.bias"] = np.zeros(60, np.float32)
    config = ModelConfig.from_hugging_face(read_config_json(directory), 3)
    model, report = from_tensors(old, config)
    assert report == LoadReport((), ("cls.predictions.bias",))
    for name, value in to_tensors(model).items():
        np.testing.assert_array_equal(value, tensors[name])


def test_pooler_and_classifiers_may_be_missing_and_come_from_the_seed():
    directory = REFERENCES / "models" / "bert-3-layers"
    tensors = {
        name: value
        for name, value in read_tensors(directory).items()
        if "pooler" not in name and "classifiers" not in name
    }
    config = ModelConfig.from_hugging_face(read_config_json(directory), 3)
    one, report = from_tensors(tensors, config, seed=1)
    same, _ = from_tensors(tensors, config, seed=1)
    other, _ = from_tensors(tensors, config, seed=2)
    assert len(report.missing) == 2 + 2 * 3
    assert (one.pooler.kernel[...] == same.pooler.kernel[...]).all()
    assert (one.pooler.kernel[...] != other.pooler.kernel[...]).any()
    assert (one.classifiers.bias[...] == 0).all()
    assert float(jnp.std(one.classifiers.kernel[...])) == pytest.approx(0.02, rel=0.3)


def test_reads_sharded_safetensors(tmp_path):
    from safetensors.numpy import save_file

    directory = REFERENCES / "models" / "bert-3-layers"
    tensors = read_tensors(directory)
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in files.items():
        save_file({name: np.ascontiguousarray(tensors[name]) for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_tensors(tmp_path).keys() == tensors.keys()


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_padding_changes_nothing(family):
    model = tiny_model(family)
    batch = random_batch(4, length=8)
    wider = {name: np.pad(values, ((0, 0), (0, 5))) for name, values in batch.items()}
    difference = run_full(model, batch) - run_full(model, wider)
    assert jnp.abs(difference).max() < 1e-5


def test_stacked_and_unstacked_are_inverse():
    model = tiny_model(num_hidden_groups=2, inner_group_num=2, num_hidden_layers=3)
    again = unstacked(stacked(model))
    assert stacked(model).is_stacked and not again.is_stacked
    batch = random_batch(4)
    np.testing.assert_array_equal(run_full(again, batch), run_full(model, batch))


def test_split_and_merge_are_inverse():
    model = tiny_model(num_hidden_groups=2, inner_group_num=2)
    graph, parameters = split(stacked(model))
    assert parameters["groups.inner.1.query_projection.kernel"].shape == (2, 32, 32)
    again = split(merge(graph, parameters))[1]
    assert again.keys() == parameters.keys()


def test_bfloat16_keeps_pooler_and_classifiers_in_float32():
    model = tiny_model()
    config = model.config
    exact = run_full(model, random_batch(4))
    half = type(model)(config, dtype="bfloat16", rngs=nnx.Rngs(0))
    half = in_compute_dtype(half)
    assert half.groups[0].inner[0].query_projection.kernel[...].dtype == jnp.bfloat16
    assert half.pooler.kernel[...].dtype == half.classifiers.kernel[...].dtype == jnp.float32
    logits = run_full(half, random_batch(4))
    assert logits.dtype == jnp.float32
    assert 0 < jnp.abs(logits - exact).max() < 0.3


@pytest.mark.parametrize("seed", [0, 1])
def test_dropout_depends_on_its_key_and_on_nothing_else(seed):
    model, batch = stacked(tiny_model("bert")), random_batch(4)
    run_training = jax.jit(training_logits)
    once, again = (run_training(model, batch, jax.random.key(seed)) for _ in range(2))
    assert (once == again).all()
    assert jnp.abs(once - run_full(model, batch)).max() > 1e-3


@pytest.mark.parametrize("shape", [(64, 7, 33), (50, 1), (4, 8, 64, 64)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(shape, rate):
    x = jnp.full(shape, 2.0)
    dropped = np.stack([dropout(x, rate, jax.random.key(seed)) for seed in range(20)])
    assert set(np.unique(dropped)) <= {np.float32(0), np.float32(2 / (1 - rate))}
    share, size = (dropped == 0).mean(), dropped.size
    assert abs(share - rate) < 4 * (rate * (1 - rate) / size) ** 0.5
    # Neighbours share a random word, and must not share their fate.
    pairs = (dropped.reshape(20, -1) == 0)[:, : size // 20 // 2 * 2].reshape(-1, 2)
    both = pairs.all(axis=1).mean()
    assert abs(both - rate**2) < 5 * (rate**2 / len(pairs)) ** 0.5
    np.testing.assert_array_equal(dropout(x, rate, None), x)
    assert dropout(x.astype(jnp.bfloat16), rate, jax.random.key(0)).dtype == jnp.bfloat16
