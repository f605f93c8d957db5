"""Exchange of checkpoints with PyTorch, in both directions.

Skipped without torch; test_model.py then compares with the recorded references.
"""

import json
import shutil
import sys

import jax
import numpy as np
import pytest

from helpers import REFERENCES, random_batch, tiny_checkpoint
from pabee_jax import EarlyExitClassifier
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.errors import InputError

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from test_foreign_checkpoints import assert_recorded_logits  # noqa: E402

WORDS = ["a", "film", "was", "good", "the", "not", "at", "all", "bad"]
SHAPES = {
    "bert": {"num_hidden_layers": 4},
    "albert": {
        "model_type": "albert",
        "num_hidden_layers": 4,
        "num_hidden_groups": 2,
        "inner_group_num": 2,
        "embedding_size": 8,
    },
}


def pytorch_logits(directory, batch):
    import transformers

    sys.path.insert(0, str(REFERENCES))
    try:
        from pytorch_model import ReferenceModel
    finally:
        sys.path.remove(str(REFERENCES))
    config = transformers.AutoConfig.from_pretrained(directory)
    config._attn_implementation = "eager"
    model = ReferenceModel(config)
    missing, unexpected = model.load_state_dict(load_file(directory / "model.safetensors"), False)
    assert not unexpected and not [name for name in missing if "position_ids" not in name]
    model.eval()
    with torch.no_grad():
        tensors = {name: torch.tensor(value).long() for name, value in batch.items()}
        return model(tensors)[1].numpy()


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", SHAPES)
def test_a_saved_checkpoint_gives_the_same_logits_in_pytorch(family, num_labels, tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", WORDS, initializer_range=0.3, **SHAPES[family])
    classifier = EarlyExitClassifier.from_pretrained(str(plain), num_labels=num_labels)
    classifier.save_pretrained(tmp_path / "saved")
    batch = {name: value % 10 for name, value in random_batch(6).items()}
    expected = pytorch_logits(tmp_path / "saved", batch)
    logits = jax.jit(all_exit_logits)(classifier.model, batch)
    assert expected.shape == logits.shape == (4, 6, num_labels)
    assert np.abs(expected - logits).max() < 2e-5


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_model_bin_is_loaded(sharded, tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", WORDS)
    expected = EarlyExitClassifier.from_pretrained(str(plain), num_labels=2).all_exit_logits(
        ["bad"]
    )
    state = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    if sharded:
        names = sorted(state)
        shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, shard in shards.items():
            torch.save({name: state[name] for name in shard}, plain / file)
        index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
        (plain / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, plain / "pytorch_model.bin")
    logits = EarlyExitClassifier.from_pretrained(str(plain), num_labels=2).all_exit_logits(["bad"])
    np.testing.assert_array_equal(logits, expected)


@pytest.fixture
def recorded(tmp_path):
    """A recorded classifier of `transformers`, whose weights the test writes."""
    directory = shutil.copytree(REFERENCES / "classifiers" / "bert", tmp_path / "bert")
    (directory / "model.safetensors").unlink()
    return directory


def recorded_state():
    return load_file(REFERENCES / "classifiers" / "bert" / "model.safetensors")


def prefixed(prefix):
    return {prefix + name: value for name, value in recorded_state().items()}


CONTENTS = {
    "Lightning": lambda: {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed("model.") | {"loss.weight": torch.ones(3)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "hyper_parameters": {"lr": 2e-5},
    },
    "a compiled model in Lightning": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "model_state_dict": lambda: {"epoch": 1, "model_state_dict": recorded_state()},
    "model": lambda: {"model": prefixed("module."), "optimizer": {}, "step": 3},
    "DeepSpeed": lambda: {"module": recorded_state(), "dp_world_size": 2},
    "compiled under DataParallel": lambda: prefixed("_orig_mod.module."),
    "averaged": lambda: prefixed("module.") | {"n_averaged": torch.tensor(5)},
    "parameters": lambda: {k: torch.nn.Parameter(v) for k, v in recorded_state().items()},
    "with other values": lambda: recorded_state() | {"version": "1", "extra_state": None},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_training_programs_save_is_read(recorded, name):
    torch.save(CONTENTS[name](), recorded / "pytorch_model.bin")
    assert_recorded_logits(recorded)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_a_state_of_16_bits_is_read(recorded, dtype, atol):
    state = {name: value.to(dtype) for name, value in recorded_state().items()}
    torch.save(state, recorded / "pytorch_model.bin")
    assert_recorded_logits(recorded, atol=atol)


def test_shards_of_a_wrapped_model_are_read(recorded):
    state = prefixed("module.")
    names = sorted(state)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, shard in shards.items():
        torch.save({name: state[name] for name in shard}, recorded / file)
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (recorded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_recorded_logits(recorded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "holds other objects than tensors, which are not loaded"),
        (lambda: {"model": torch.nn.Linear(2, 2)}, r"torch.save\(model.state_dict\(\), PATH\)"),
        (lambda: {"a": object()}, "pytorch_model.bin is damaged, or holds other objects"),
        (lambda: [torch.ones(2)], "holds no tensors; it must hold a model's state_dict"),
        (lambda: {"epoch": 3}, "holds no tensors"),
        (
            lambda: {
                name: value.to(torch.int8) if "query.weight" in name else value
                for name, value in recorded_state().items()
            },
            "holds int8 values, but parameters are floating-point",
        ),
    ],
)
def test_other_contents_are_refused_with_one_sentence(recorded, content, message):
    """Such objects are never unpickled, because they can run code."""
    torch.save(content(), recorded / "pytorch_model.bin")
    with pytest.raises(InputError, match=message) as error:
        EarlyExitClassifier.from_pretrained(recorded)
    assert "\n" not in str(error.value)
