"""Exchange of checkpoints with PyTorch, in both directions.

Skipped without torch; test_model.py then compares with the recorded references.
"""

import sys

import jax
import numpy as np
import pytest

from helpers import REFERENCES, random_batch, tiny_checkpoint
from pabee_jax import EarlyExitClassifier
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.errors import InputError

torch = pytest.importorskip("torch")
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
    from safetensors.torch import load_file

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
    import json

    from safetensors.torch import load_file

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


def test_a_pickle_with_other_objects_than_tensors_is_refused(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", WORDS)
    (plain / "model.safetensors").unlink()
    torch.save({"a": object()}, plain / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin is damaged or not a weight file"):
        EarlyExitClassifier.from_pretrained(str(plain), num_labels=2)
