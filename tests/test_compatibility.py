"""Files of an earlier version, recorded by tests/fixtures/record.py, can still be used."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.export import load
from pabee_jax.training import run_directory
from pabee_jax.training.run import train

RECORDED = Path(__file__).parent / "fixtures" / "version_0_1"


@pytest.fixture(scope="module")
def expected():
    return np.load(RECORDED / "expected.npz")


def test_a_checkpoint_loads_with_its_criterion_and_gives_the_same_logits(expected):
    classifier = EarlyExitClassifier.from_pretrained(str(RECORDED / "checkpoint"))
    assert classifier.criterion == Patience(1)
    texts = expected["texts"].tolist()
    np.testing.assert_allclose(
        classifier.all_exit_logits(texts), expected["all_exit_logits"], atol=1e-5
    )
    predictions = classifier.predict(texts)
    np.testing.assert_array_equal(predictions.exit_layers, expected["exit_layers"])
    np.testing.assert_allclose(predictions.logits, expected["logits"], atol=1e-5)
    assert predictions.label_names == ("no", "yes")


def test_an_exported_program_gives_the_same_logits(expected):
    try:
        classifier = load(RECORDED / "exported")
    except InputError as error:  # JAX guarantees to read an exported program for six months.
        if jax.__version_info__ < (0, 12) or "cannot read" not in str(error):
            raise
        pytest.skip(str(error))
    tokens = {name: expected[name] for name in ("input_ids", "attention_mask")}
    predictions = classifier.predict(tokens)
    np.testing.assert_array_equal(predictions.exit_layers, expected["exit_layers"])
    np.testing.assert_allclose(predictions.logits, expected["logits"], atol=1e-5)


def test_a_killed_run_is_resumed(tmp_path, monkeypatch, capsys):
    """The resumed run ends with the weights of the run that the earlier version finished."""
    shutil.copytree(RECORDED, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    train(run_directory.read_config(Path("killed")), "killed")
    assert "from step 6 of 12" in capsys.readouterr().out
    resumed, finished = (load_file(f"{name}/model.safetensors") for name in ("killed", "finished"))
    assert resumed.keys() == finished.keys()
    for name, weights in finished.items():
        # The true gradient of the key bias is 0, and AdamW amplifies its rounding errors.
        if name.endswith("key.bias"):
            continue
        np.testing.assert_allclose(resumed[name], weights, atol=1e-5, err_msg=name)
