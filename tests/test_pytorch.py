"""With PyTorch at hand: what we write, PyTorch reads, and gives the same logits; and the reverse.

Skipped without torch; the recorded references in test_model.py stand in for it.
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


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_pytorch_reads_what_we_write(name, labels, tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", WORDS, initializer_range=0.3, **SHAPES[name])
    classifier = EarlyExitClassifier.from_pretrained(str(plain), num_labels=labels)
    classifier.save_pretrained(tmp_path / "saved")
    batch = {key: value % 10 for key, value in random_batch(6).items()}
    theirs = pytorch_logits(tmp_path / "saved", batch)
    ours = jax.jit(all_exit_logits)(classifier.model, batch)
    assert theirs.shape == ours.shape == (4, 6, labels)
    assert np.abs(theirs - ours).max() < 2e-5


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_pytorch_model_bin(sharded, tmp_path):
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
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({key: state[key] for key in part}, plain / file)
        index = {"weight_map": {key: file for file, part in parts.items() for key in part}}
        (plain / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, plain / "pytorch_model.bin")
    found = EarlyExitClassifier.from_pretrained(str(plain), num_labels=2).all_exit_logits(["bad"])
    np.testing.assert_array_equal(found, expected)


def test_refuses_a_pickle_that_is_not_tensors(tmp_path):
    plain = tiny_checkpoint(tmp_path / "plain", WORDS)
    (plain / "model.safetensors").unlink()
    torch.save({"a": object()}, plain / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin is damaged or not a weight file"):
        EarlyExitClassifier.from_pretrained(str(plain), num_labels=2)
