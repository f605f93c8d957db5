"""Any value of any setting is refused with one sentence, or gives a run that works."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pabee_jax.configs import demo
from pabee_jax.distributed import sharding
from pabee_jax.errors import InputError
from pabee_jax.models.config import ModelConfig
from pabee_jax.training import memory
from pabee_jax.training.config import (
    LARGEST_INTEGER,
    MeshConfig,
    ScratchConfig,
    TrainConfig,
    check,
    leaves,
)
from pabee_jax.training.effects import refuse_settings_without_effect
from pabee_jax.training.run import TrainingDiverged, train
from pabee_jax.training.run_directory import from_dict
from pabee_jax.training.steps import refuse_short_run, total_steps

NAMES = sorted(leaves(TrainConfig()))
WORDS = (
    *("", "demo", "files", "mrpc", "last", "best", "linear", "uniform", "joint", "two_stage"),
    *("alternating", "last_first", "full", "equilibrium", "scaled", "shared", "per_exit", "cls"),
    *("mean", "zero", "prior", "shuffled", "length_grouped", "float32", "bfloat16", "\0", "\udcff"),
    "x" * 5_000,
)
NUMBERS = (0, 1, -1, 2, 3, 8, 0.5, 1e-300, 1e308, 10**9, 2**31, 10**400, math.nan, math.inf)
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=20),
    st.booleans(),
    st.sampled_from([None, [], {}, b"demo", -math.inf, TrainConfig, ScratchConfig(), 1j]),
)
ROWS = 10_000


def fuzz(max_examples):
    """Return the settings of a test with this number of examples, the same in every session."""
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


def with_values(config, values):
    """Return a copy of the config with other values, such as {"loss.weights": "last"}."""
    config = dataclasses.replace(config)
    for name, value in values.items():
        *group, field = name.split(".")
        holder = config
        if group:
            # A copy, because `dataclasses.replace` copies no nested config.
            setattr(config, group[0], dataclasses.replace(getattr(config, group[0])))
            holder = getattr(config, group[0])
        setattr(holder, field, value)
    return config


def small_demo(**fields):
    config = dataclasses.replace(demo.get_config(), max_steps=2, warmup_steps=0, eval_every=0)
    sizes = ScratchConfig(num_hidden_layers=2, embedding_size=8, hidden_size=8)
    return dataclasses.replace(
        config, batch_size=8, max_seq_length=8, scratch=sizes, mesh=MeshConfig(data=1), **fields
    )


def model_of(config):
    sizes = dataclasses.asdict(config.scratch)
    values = {"model_type": "albert", "vocab_size": 200, **sizes}
    values["max_position_embeddings"] = config.max_seq_length
    exits = {"exit_pooler": config.pooler, "exit_pooling": config.pooling}
    return ModelConfig.from_hugging_face(values | exits, 2)


def usual_values(name):
    """Return values of the type of a field; about half of them are valid."""
    kind = type(leaves(TrainConfig())[name])
    if kind is str:
        return st.sampled_from(WORDS)
    return {int: st.integers(0, 40), float: st.floats(0, 1), bool: st.booleans()}[kind]


def check_start(config):
    """Call the checks of a run before its model is made, in the order of `train`."""
    check(config)
    refuse_settings_without_effect(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    sharding.check_batch_size(config.batch_size, config.gradient_accumulation, mesh)
    refuse_short_run(config, ROWS)
    if not config.model:
        model = model_of(config)
        sharding.check_model(model, mesh, shard_parameters=config.mesh.shard_parameters)
        memory.check(config, model, mesh, config.max_seq_length)


def is_accepted(config):
    try:
        check_start(config)
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and not message.endswith(".")
        assert len(message) < 600, "the sentence repeats a long value"
        return False
    return True


def assert_sound(config):
    """Assert properties that every accepted config has, independently of the checks."""
    for name, value in leaves(config).items():
        assert type(value) in (int, float, str, bool), name
        if not isinstance(value, str):
            assert math.isfinite(value)
            assert isinstance(value, float) or abs(value) <= LARGEST_INTEGER
        else:
            value.encode()
    assert 1 <= total_steps(config, ROWS) <= LARGEST_INTEGER
    assert config.warmup_steps < total_steps(config, ROWS)
    assert config.scratch.num_hidden_layers <= 1_000
    if not config.model:
        assert memory.parameter_count(model_of(config)) < 2**40
    # In the directory of a run, a config is stored as JSON.
    assert from_dict(TrainConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


CHANGES = st.lists(
    st.sampled_from(NAMES).flatmap(
        lambda name: st.tuples(st.just(name), usual_values(name) | VALUES)
    ),
    min_size=1,
    max_size=4,
).map(dict)


@fuzz(100)
@given(CHANGES)
def test_a_config_is_refused_with_a_sentence_or_sound(changes):
    config = with_values(small_demo(), changes)
    if is_accepted(config):
        assert_sound(config)


@pytest.mark.slow
@fuzz(10_000)
@given(CHANGES)
def test_many_configs_are_refused_with_a_sentence_or_sound(changes):
    config = with_values(small_demo(), changes)
    if is_accepted(config):
        assert_sound(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_refuses_values_of_other_types(name):
    """Also if the value is the whole group of the field."""
    default = leaves(TrainConfig())[name]
    for value in (None, [], {}, b"", 1j, "text", 1.5, True):
        is_number_for_float = isinstance(default, float) and type(value) is float
        if type(value) is not type(default) and not is_number_for_float:
            with pytest.raises(InputError, match=f"config.{name} is "):
                check(with_values(small_demo(), {name: value}))
    if group := name.rpartition(".")[0]:
        with pytest.raises(InputError, match=f"config.{group} does not exist as a single setting"):
            check(dataclasses.replace(small_demo(), **{group: None}))


# Values that are unusual but may be valid, for runs of one or two steps.
EDGES = {
    "max_seq_length": (8, 9, 64),
    "batch_size": (1, 2, 7, 16),
    "gradient_accumulation": (1, 2),
    "rematerialize": (True,),
    "learning_rate": (1e-30, 1, 1e30),
    "max_steps": (1, 2),
    "warmup_steps": (1,),
    "weight_decay": (0.5, 1e30),
    "adam_epsilon": (1e-300, 1e30),
    "max_grad_norm": (0, 1e-30, 1e30),
    "seed": (LARGEST_INTEGER,),
    "dtype": ("bfloat16",),
    "eval_every": (1, LARGEST_INTEGER),
    "save_every": (1, LARGEST_INTEGER),
    "export": ("best",),
    "mesh.data": (1, 2, -1),
    "mesh.model": (1, 2),
    "mesh.shard_parameters": (True,),
    "loss.weights": ("uniform", "last"),
    "strategy": ("two_stage", "alternating", "last_first"),
    "last_exit_share": (1e-300, 0.999),
    "gradient": ("equilibrium", "scaled"),
    "gradient_scale": (0, 0.5),
    "distill.weight": (1, 1e30),
    "distill.temperature": (1e-30, 1e30),
    "pooler": ("per_exit",),
    "pooling": ("mean",),
    "classifier_bias": ("prior",),
    "order": ("length_grouped",),
    "scratch.num_hidden_layers": (1, 3),
    "scratch.embedding_size": (1, 3),
    "scratch.hidden_size": (4, 12),
    "scratch.num_attention_heads": (1, 2),
    "scratch.intermediate_size": (1, 6),
    "scratch.dropout": (0.999, 0.5),
    "scratch.initializer_range": (1e-300, 1e30),
}
EDGE_CHANGES = st.lists(
    st.sampled_from(sorted(EDGES)).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(EDGES[name]))
    ),
    min_size=1,
    max_size=6,
).map(dict)


@pytest.mark.slow
@fuzz(60)
@given(EDGE_CHANGES)
def test_a_run_with_an_accepted_config_works(tmp_path_factory, changes):
    """A run whose numbers overflow ends with the sentence about divergence."""
    config = with_values(small_demo(), changes)
    if not is_accepted(config):
        return
    workdir = tmp_path_factory.mktemp("fuzz") / "run"
    try:
        train(config, workdir)
    except TrainingDiverged:
        return
    except InputError as error:  # Such as settings of early exits, for a model of one layer.
        assert not workdir.exists(), error
        return
    assert (workdir / "model.safetensors").exists()
