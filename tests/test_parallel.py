"""Training gives the same losses on any mesh, with microbatches and with rematerialization."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import device_orders
from helpers import random_batch, tiny_model
from pabee_jax import InputError
from pabee_jax.distributed import sharding
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split, stacked
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.forward import training_logits
from pabee_jax.training.step import initial_state, make_train_step
from pabee_jax.training.strategy import phase_of

STEPS, ROWS = 3, 16


def small_model(family="bert", dropout=0.1, **overrides):
    values = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    values |= {"classifier_dropout_prob": dropout, "initializer_range": 0.05}
    return tiny_model(family, **{"num_hidden_layers": 3, **values, **overrides})


def batch_of(seed, rows=ROWS, valid=ROWS):
    labels = np.random.default_rng(seed).integers(0, 3, rows, dtype=np.int32)
    is_valid = np.arange(rows) < valid
    return {**random_batch(rows, seed=seed), "labels": labels, "valid": is_valid}


def trained(model, mesh, *, shard_parameters=False, valid=ROWS, **settings):
    """Train for STEPS steps; return the exit losses of the steps, and the last state."""
    config = TrainConfig(learning_rate=1e-3, **settings)
    structure, parameters = split(stacked(model))
    state = initial_state(parameters, config)
    shardings = sharding.shardings(state, mesh, shard_parameters=shard_parameters)
    step = make_train_step(structure, config, STEPS, shardings)
    phase, losses = phase_of(config, 0, STEPS, model.config.num_hidden_layers), []
    state = sharding.put(state, shardings)
    for seed in range(STEPS):
        batch = sharding.shard_batch(batch_of(seed, valid=valid), mesh)
        state, metrics = step(state, batch, phase)
        losses.append(np.asarray(metrics.exit_losses))
    return np.array(losses), state


@pytest.fixture(scope="module")
def alone():
    """The losses and the state of each model family, trained on one device."""
    return {name: trained(small_model(name), sharding.make_mesh(1)) for name in ("bert", "albert")}


@pytest.mark.parametrize(
    ("family", "data", "model", "shard_parameters", "order"),
    [
        ("bert", 8, 1, True, "of a pod"),
        pytest.param("bert", 4, 2, False, "of a pod", marks=pytest.mark.slow),
        pytest.param("bert", 2, 4, True, "of the CPU", marks=pytest.mark.slow),
        ("albert", 2, 4, True, "of a pod"),
    ],
)
def test_every_mesh_gives_the_same_losses(alone, family, data, model, shard_parameters, order):
    """The models have dropout, whose masks must not depend on the mesh."""
    mesh = sharding.make_mesh(data, model)
    mesh = device_orders.permuted(mesh) if order == "of a pod" else mesh
    losses, state = trained(small_model(family), mesh, shard_parameters=shard_parameters)
    np.testing.assert_allclose(losses, alone[family][0], rtol=1e-5)
    for name, value in state.parameters.items():
        expected = alone[family][1].parameters[name]
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=name)


def test_each_parameter_is_sharded_over_its_axes():
    mesh = sharding.make_mesh(4, 2)
    _, state = trained(small_model(), mesh, shard_parameters=True)
    _, unsharded_state = trained(small_model(), mesh)
    first_moments_and_parameters = {**state.optimizer["shared"][0].mu, **state.parameters}

    def parts(name, tree):
        """Return the number of shards along each dimension."""
        shape, shard_shape = tree[name].shape, tree[name].addressable_shards[0].data.shape
        return tuple(size // part for size, part in zip(shape, shard_shape, strict=True))

    layer = "groups.inner.0"
    for tree in (first_moments_and_parameters, state.optimizer["shared"][0].nu):
        assert parts(f"{layer}.query_projection.kernel", tree) == (1, 4, 2)
        assert parts(f"{layer}.attention_output.kernel", tree) == (1, 2, 4)
        assert parts(f"{layer}.intermediate.bias", tree) == (1, 2)
        assert parts(f"{layer}.output_norm.scale", tree) == (1, 1)
        assert parts("embeddings.word.embedding", tree) == (1, 2)
    assert parts(f"{layer}.query_projection.kernel", unsharded_state.parameters) == (1, 1, 2)
    assert parts("classifiers.kernel", state.parameters) == (1, 1, 1)


@pytest.mark.parametrize(
    ("valid", "devices"), [pytest.param(11, 1, marks=pytest.mark.slow), (ROWS, 4)]
)
def test_microbatches_give_the_gradient_of_the_whole_batch(valid, devices):
    model, mesh = small_model(dropout=0.0), sharding.make_mesh(devices)
    losses, state = trained(model, mesh, valid=valid)
    accumulated_losses, accumulated_state = trained(
        model, mesh, valid=valid, gradient_accumulation=4
    )
    np.testing.assert_allclose(accumulated_losses, losses, rtol=1e-5)
    for name, value in accumulated_state.parameters.items():
        # The true gradient of a key bias is 0, and Adam amplifies its rounding errors.
        if not name.endswith("key_projection.bias"):
            np.testing.assert_allclose(value, state.parameters[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("family", ["bert", pytest.param("albert", marks=pytest.mark.slow)])
def test_rematerialization_changes_no_loss(alone, family):
    """The models have dropout: a recomputed layer must draw the same masks."""
    mesh = sharding.make_mesh(1)
    losses, _ = trained(small_model(family), mesh, rematerialize=True)
    np.testing.assert_allclose(losses, alone[family][0], rtol=1e-6)


@pytest.mark.slow
def test_rematerialization_needs_less_memory():
    def temporary_bytes(rematerialize):
        config = TrainConfig(rematerialize=rematerialize)
        structure, parameters = split(stacked(small_model(num_hidden_layers=6)))
        state = initial_state(parameters, config)
        step = make_train_step(structure, config, STEPS)
        batch = batch_of(0, rows=64)
        phase = phase_of(config, 0, STEPS, 6)
        program = step.func.lower(state, batch, phase, **step.keywords).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(True) < 0.6 * temporary_bytes(False)


def test_dropout_masks_are_stored_for_the_backward_pass():
    """The backward pass draws no masks, unless rematerialization recomputes the layers."""
    model = stacked(small_model())

    def draws(rematerialize, transform):
        """Return how often the traced program draws random bits."""

        def total(model):
            key = jax.random.key(0)
            return training_logits(model, batch_of(0), key, rematerialize=rematerialize).sum()

        return str(jax.make_jaxpr(transform(total))(model)).count("= random_bits[")

    forward = draws(None, lambda total: total)
    assert forward > 3
    assert draws(False, nnx.grad) == forward
    assert draws(True, nnx.grad) > forward


@pytest.mark.parametrize(
    ("mesh", "sizes", "shard", "message"),
    [
        ((1, 8), {}, False, "4 attention heads cannot be split over the 8 devices .* axis 'model'"),
        ((2, 4), {"intermediate_size": 50}, False, "50 feed-forward features .* axis 'model'"),
        ((2, 4), {"embedding_size": 10}, False, "10 embedding features .* the 4 devices"),
        ((8, 1), {"hidden_size": 36}, True, "36 hidden features .* the 8 devices .* axis 'data'"),
    ],
)
def test_model_sizes_that_the_mesh_does_not_divide_are_refused(mesh, sizes, shard, message):
    values = {"model_type": "albert", "num_attention_heads": 4, "hidden_size": 32, **sizes}
    config = ModelConfig.from_hugging_face({"vocab_size": 9, "num_hidden_layers": 2, **values}, 2)
    with pytest.raises(InputError, match=message):
        sharding.check_model(config, sharding.make_mesh(*mesh), shard_parameters=shard)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (9, 1, "mesh.data is 9, but there are 8 devices"),
        (0, 1, "mesh.data is 0, but there are 8 devices"),
        (-1, 3, "mesh.model is 3, which does not divide the 8 devices"),
        (-1, 0, "mesh.model is 0"),
        (8, 2, "mesh.data is 8 and mesh.model is 2, but there are 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(data, model, message):
    with pytest.raises(InputError, match=message):
        sharding.make_mesh(data, model)


def test_batch_sizes_that_the_mesh_does_not_divide_are_refused():
    mesh = sharding.make_mesh(4, 2)
    sharding.check_batch_size(24, 3, mesh)
    with pytest.raises(InputError, match="batch_size 10 is not a multiple of the 4 devices"):
        sharding.check_batch_size(10, 1, mesh)
    with pytest.raises(InputError, match="4 devices .* times the gradient_accumulation of 3"):
        sharding.check_batch_size(16, 3, mesh)


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth():
    """The layers are one loop, so that the compile time does not grow with depth either."""

    def program_lines(layers):
        config = TrainConfig()
        model = EarlyExitModel(small_model(num_hidden_layers=layers).config, rngs=nnx.Rngs(0))
        structure, parameters = split(stacked(model))
        step = make_train_step(structure, config, STEPS)
        state, phase = initial_state(parameters, config), phase_of(config, 0, STEPS, layers)
        return step.func.lower(state, batch_of(0), phase, **step.keywords).as_text().count("\n")

    assert program_lines(24) <= program_lines(6) + 5


def test_one_process_reads_the_whole_batch():
    for mesh in (sharding.make_mesh(4, 2), device_orders.permuted(sharding.make_mesh(8))):
        assert sharding.process_rows(24, mesh).tolist() == list(range(24))


def rows_by_process(mesh, batch_size):
    count = 1 + max(device.process_index for device in mesh.devices.flat)
    return [sharding.process_rows(batch_size, mesh, process).tolist() for process in range(count)]


@pytest.mark.parametrize("pod", device_orders.BY_PROCESS)
def test_the_processes_of_a_pod_read_every_row_once(pod):
    """Row r is on the device r // 2 of the mesh axis `data`, in the order of the pod."""
    by_process = device_orders.BY_PROCESS[pod]
    rows = rows_by_process(device_orders.stand_in_mesh(by_process), 2 * len(by_process))
    assert sorted(itertools.chain(*rows)) == list(range(2 * len(by_process)))
    for process, process_rows in enumerate(rows):
        assert [by_process[row // 2] for row in process_rows] == [process] * len(process_rows)


def test_the_rows_of_a_process_are_not_contiguous_on_a_pod():
    mesh = device_orders.stand_in_mesh(device_orders.BY_PROCESS["v5e:4x4"])
    assert rows_by_process(mesh, 16)[0] == [0, 1, 6, 15]


def test_processes_that_share_rows_over_the_model_axis_read_the_same_rows():
    rows = rows_by_process(device_orders.stand_in_mesh([0, 1, 0, 1], model=2), 4)
    assert rows == [[0, 1, 2, 3], [0, 1, 2, 3]]


TOPOLOGIES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("size", TOPOLOGIES)
def test_every_process_of_every_pod_reads_the_rows_of_its_devices(chip, size, monkeypatch):
    """libtpu describes the pods; pip install --no-deps libtpu==0.0.42.1 for jax 0.10.2."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{size}").devices
    for model in (1, 2, 4):
        mesh = sharding.mesh_of(devices, model)
        batch_size = 2 * mesh.shape[sharding.DATA]
        rows = NamedSharding(mesh, PartitionSpec(sharding.DATA)).devices_indices_map((batch_size,))
        for process in {device.process_index for device in devices}:
            expected = {
                row
                for device, (part, *_) in rows.items()
                if device.process_index == process
                for row in range(batch_size)[part]
            }
            assert sharding.process_rows(batch_size, mesh, process).tolist() == sorted(expected)
        by_process = [device.process_index for device in mesh.devices.flat]
        recorded = device_orders.BY_PROCESS.get(f"v5e:{size}")
        if model == 1 and recorded:
            assert by_process == recorded, "tests/device_orders.py is not what libtpu says"
