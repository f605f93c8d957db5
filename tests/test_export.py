"""An exported program predicts as the classifier does, without the model's code."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export

from helpers import TINY, one_device_environment, random_batch, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.criteria import registered
from pabee_jax.export import export, load
from pabee_jax.inference import export as export_module
from pabee_jax.models.encoder import EarlyExitModel

LENGTH = 12
NAMES = ("no", "maybe", "yes")
PATIENCES = (0, 1, 2, 4, 9)

# The program of a serving machine.
SERVING = """
import sys
import numpy as np
from pabee_jax import Patience
from pabee_jax.export import load
directory, tokens, output = sys.argv[1:]
predictions = load(directory).predict(dict(np.load(tokens)), Patience(2))
np.savez(output, exit_layers=predictions.exit_layers, logits=predictions.logits)
unneeded = ("transformers", "flax", "orbax", "optax", "datasets", "pabee_jax.models.encoder")
assert not set(unneeded) & set(sys.modules), set(unneeded) & set(sys.modules)
"""


def classifier_of(family="albert", labels=3, criterion=None, dtype="float32", **overrides):
    config = tiny_model(family, labels, **overrides).config
    model = EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(0))
    pretrained = Pretrained(model, None, {}, NAMES if labels > 1 else (), LENGTH)
    return EarlyExitClassifier(pretrained, criterion=criterion, driver="loop")


@pytest.fixture(scope="module")
def classifier():
    return classifier_of(criterion=Patience(2))


@pytest.fixture(scope="module")
def directory(classifier, tmp_path_factory):
    output = tmp_path_factory.mktemp("export") / "new" / "albert"
    export(classifier, output)
    return output


@pytest.fixture(scope="module")
def loaded(directory):
    return load(directory)


@pytest.fixture
def copy(directory, tmp_path):
    """A copy of the exported files, for tests that damage them."""
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change_artifact(directory, **values):
    """Change values of `artifact.json` together with its sha256."""
    path = directory / "artifact.json"
    values = json.loads(path.read_text()) | values
    del values["sha256_of_this"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values | {"sha256_of_this": digest}))


def damage_artifact(directory):
    """Change a value of `artifact.json`, but not its sha256."""
    path = directory / "artifact.json"
    path.write_text(path.read_text().replace('"sequence_length": 12', '"sequence_length": 13'))


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def contents(directory):
    """Return the bytes of every file by its path."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_same(predictions, expected, rows=None):
    """Assert that `predictions` equal the first `rows` rows of `expected`."""
    np.testing.assert_array_equal(predictions.exit_layers, expected.exit_layers[:rows])
    np.testing.assert_allclose(predictions.logits, expected.logits[:rows], atol=2e-5)
    np.testing.assert_allclose(predictions.labels, expected.labels[:rows], atol=2e-5)
    assert predictions.label_names == expected.label_names


@pytest.mark.parametrize(
    ("family", "labels"),
    [("albert", 1)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("bert", 3), ("albert", 3), ("bert", 1))
    ],
)
def test_the_program_predicts_as_the_classifier_does(family, labels, tmp_path):
    classifier = classifier_of(family, labels, num_hidden_groups=2)
    export(classifier, tmp_path)
    loaded = load(tmp_path)
    batch, exit_layers = random_batch(8, LENGTH), set()
    for patience in PATIENCES:
        classifier.criterion = Patience(patience, 0.6)
        expected = classifier.predict(batch)
        exit_layers |= set(expected.exit_layers.tolist())
        for rows in (1, 3, 8):
            first_rows = {name: array[:rows] for name, array in batch.items()}
            assert_same(loaded.predict(first_rows, classifier.criterion), expected, rows)
    assert len(exit_layers) > 2, "the rows exit at one or two layers: choose another model or batch"


def test_predictions_do_not_depend_on_the_batch_size(classifier, loaded):
    batch = random_batch(11, LENGTH)
    expected = classifier.predict(batch, batch_size=8)
    for batch_size in (4, 5, 64):
        assert_same(loaded.predict(batch, batch_size=batch_size), expected)


def test_mask_and_segments_may_be_absent(classifier, loaded):
    ids = random_batch(2, LENGTH)["input_ids"].tolist()
    assert_same(loaded.predict({"input_ids": ids}), classifier.predict({"input_ids": ids}))


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    classifier = classifier_of(dtype="bfloat16")
    export(classifier, tmp_path)
    loaded = load(tmp_path)
    dtypes = {weight.dtype.name for weight in loaded._weights.values()}
    assert dtypes == {"bfloat16", "float32"} and loaded.artifact.dtype == "bfloat16"
    batch = random_batch(8, LENGTH)
    predictions, expected = loaded.predict(batch), classifier.predict(batch)
    np.testing.assert_allclose(predictions.logits, expected.logits, atol=0.05)


def test_the_artifact_describes_the_program_for_all_platforms(directory, loaded):
    artifact = loaded.artifact
    assert artifact.platforms == ("cpu", "cuda", "tpu")
    assert artifact.criterion == Patience(2) and artifact.label_names == NAMES
    assert (artifact.num_layers, artifact.num_labels) == (6, 3)
    assert (artifact.sequence_length, artifact.dtype) == (LENGTH, "float32")
    assert (artifact.vocab_size, artifact.max_position_embeddings) == (TINY["vocab_size"], 24)
    assert artifact.jax_version == jax.__version__
    assert sorted(path.name for path in directory.iterdir()) == [
        "artifact.json",
        "artifact.program",
        "artifact.safetensors",
    ]


def test_the_program_contains_the_loop_and_float32_matrix_products(directory):
    serialized = bytearray((directory / "artifact.program").read_bytes())
    program = jax_export.deserialize(serialized)
    text = program.mlir_module()
    assert "stablehlo.while" in text, "the loop was unrolled, so that no layer is skipped"
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all("HIGHEST" in line for line in products), (
        "an accelerator may compute a product in TF32 or bfloat16, which changes exit layers: "
        "set its precision to HIGHEST"
    )
    assert program.in_avals[-1].shape == () and str(program.out_avals[0].shape) == "(rows,)"


def test_a_new_patience_does_not_recompile(directory):
    loaded = load(directory)
    for rows in (1, 3, 4, 8):
        for patience in PATIENCES:
            loaded.predict(random_batch(rows, LENGTH), Patience(patience, patience / 10))
    assert loaded._run._cache_size() == 3, "expected one program for each of 1, 4 and 8 rows"


def test_the_program_runs_without_the_model_code_and_its_libraries(classifier, directory, tmp_path):
    batch = random_batch(8, LENGTH)
    np.savez(tmp_path / "tokens.npz", **batch)
    files = [directory, tmp_path / "tokens.npz", tmp_path / "predictions.npz"]
    subprocess.run([sys.executable, "-c", SERVING, *map(str, files)], check=True, timeout=300)
    predictions = np.load(tmp_path / "predictions.npz")
    expected = classifier.predict(batch)
    np.testing.assert_array_equal(predictions["exit_layers"], expected.exit_layers)
    np.testing.assert_allclose(predictions["logits"], expected.logits, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ["cpu", "gpu"]}, "unknown platform 'gpu'; known are cpu, cuda, rocm, tpu"),
        ({"platforms": []}, "platforms is empty; known are cpu"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, not 0"),
        ({"sequence_length": 25}, "sequence_length is 25, but the model has 24 positions"),
    ],
)
def test_wrong_arguments_of_export_are_input_errors(classifier, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        export(classifier, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_sequence_may_use_all_positions_of_the_model(classifier, tmp_path):
    export(classifier, tmp_path, sequence_length=24, platforms=["cpu"])
    batch = random_batch(2, 24)
    assert_same(load(tmp_path).predict(batch), classifier.predict(batch))


def test_a_custom_criterion_cannot_be_exported(tmp_path):
    @registered()
    @dataclasses.dataclass(frozen=True)
    class CustomCriterion(Patience):
        pass

    with pytest.raises(InputError, match="criterion CustomCriterion is a custom class"):
        export(classifier_of(criterion=CustomCriterion(1)), tmp_path / "new")


def test_export_overwrites_nothing(classifier, directory, tmp_path):
    before = contents(directory)
    with pytest.raises(InputError, match="already contains an exported program"):
        export(classifier, directory, sequence_length=5)
    assert contents(directory) == before
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file, file / "below" / "it"):
        with pytest.raises(InputError, match="file is a file; the output must be a directory"):
            export(classifier, output)
    assert file.read_text() == "mine"


def test_an_output_that_cannot_be_written_is_an_input_error(classifier, tmp_path, monkeypatch):
    # A superuser may write to any directory, whatever its permissions.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="is not writable"):
        export(classifier, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file", ["artifact.program", "artifact.safetensors", "artifact.json"])
def test_a_failed_export_removes_its_files(classifier, tmp_path, monkeypatch, file):
    (tmp_path / "mine").write_text("mine")

    def write(path, writer):
        if path.name == file:
            raise OSError(28, "No space left on device")
        writer(path)

    monkeypatch.setattr(export_module, "write_atomically", write)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        export(classifier, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_flatbuffers_the_error_names_the_extra(
    classifier, directory, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for call in (
        lambda: export(classifier, tmp_path / "new"),
        lambda: load(directory),
    ):
        with pytest.raises(InputError, match=r"flatbuffers: pip install 'pabee_jax\[export\]'"):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "artifact.json").unlink(), "it has no artifact.json"),
        (lambda path: (path / "artifact.json").write_text("{"), "it is not JSON"),
        (lambda path: (path / "artifact.json").write_bytes(b"\xff"), "it is not JSON"),
        (lambda path: (path / "artifact.json").write_text("[]"), "it has no format version"),
        (lambda path: (path / "artifact.json").write_text("[" * 9999), "it is not JSON"),
        (lambda path: (path / "artifact.json").write_text("9" * 5000), "it is not JSON"),
        (lambda path: change_artifact(path, format=["1"]), "format version .'1'., but"),
        (lambda path: change_artifact(path, vocab_size=-1), "damaged: vocab_size is -1"),
        (lambda path: change_artifact(path, num_layers=True), "damaged: num_layers is True"),
        (lambda path: change_artifact(path, label_names=[1, 2]), "damaged: label_names is"),
        (lambda path: change_artifact(path, platforms=[["cpu"]]), "damaged: platforms is"),
        (lambda path: change_artifact(path, sha256={}), "artifact.program is damaged"),
        (damage_artifact, "artifact.json is damaged: its values do not match its sha256"),
        (
            lambda path: change_artifact(path, format=2),
            "format version 2, but this pabee_jax reads version 1",
        ),
        (
            lambda path: change_artifact(path, sequence_length=None),
            "damaged: sequence_length is None",
        ),
        (
            lambda path: change_artifact(path, criterion={"criterion": "luck"}),
            "exit criterion 'luck'",
        ),
        (lambda path: change_artifact(path, criterion=3), "damaged: criterion is 3"),
        (
            lambda path: change_artifact(path, platforms=["tpu"]),
            "for tpu, but this process runs on cpu",
        ),
        (lambda path: (path / "artifact.program").unlink(), "artifact.program is missing"),
        (lambda path: (path / "artifact.safetensors").unlink(), "artifact.safetensors is missing"),
        (lambda path: flip_last_bit(path / "artifact.program"), "artifact.program is damaged"),
        (
            lambda path: flip_last_bit(path / "artifact.safetensors"),
            "artifact.safetensors is damaged",
        ),
    ],
)
def test_damaged_files_are_input_errors(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message):
        load(copy)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, (2**40).to_bytes(8, "little") + b"{}", b"\2" + bytes(7) + b"[]"]
)
def test_weights_that_are_no_weight_file_are_an_input_error(copy, content):
    (copy / "artifact.safetensors").write_bytes(content)
    digests = json.loads((copy / "artifact.json").read_text())["sha256"]
    digests["artifact.safetensors"] = hashlib.sha256(content).hexdigest()
    change_artifact(copy, sha256=digests)
    with pytest.raises(InputError, match="artifact.safetensors is damaged"):
        load(copy)


def test_loading_a_file_or_an_absent_directory_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        with pytest.raises(InputError, match=f"{name} is not an exported program"):
            load(tmp_path / name)


def test_the_error_for_an_unreadable_program_names_both_jax_versions(copy):
    unreadable = b"another version's bytes"
    (copy / "artifact.program").write_bytes(unreadable)
    digests = json.loads((copy / "artifact.json").read_text())["sha256"]
    digests["artifact.program"] = hashlib.sha256(unreadable).hexdigest()
    change_artifact(copy, sha256=digests, jax_version="0.99")
    with pytest.raises(InputError, match=f"jax {jax.__version__} cannot read .* jax 0.99 wrote"):
        load(copy)


IDS = np.ones((2, LENGTH), int)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"input_ids": np.ones((2, 11), int)}, "11 columns, but this program was exported for 12"),
        ({"input_ids": np.ones((2, 13), int)}, "13 columns, but this program was exported for 12"),
        ({"input_ids": np.ones((2, 25), int)}, "25 columns, but the model has 24 positions"),
        ({"input_ids": IDS * TINY["vocab_size"]}, "input_ids must be from 0 to 59"),
        ({"input_ids": -IDS}, "input_ids must be from 0 to 59"),
        ({"input_ids": IDS, "token_type_ids": 2 * IDS}, "token_type_ids must be from 0 to 1"),
        ({"input_ids": IDS, "attention_mask": 0 * IDS}, "masks every token of row 0"),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, "must be an .N, S. array"),
        ({"input_ids": IDS[0]}, "must be an .N, S. array"),
        ({"input_ids": IDS / 2}, "array of integers"),
        ({"input_ids": IDS[:0]}, "nothing to predict"),
        ({}, "needs input_ids"),
        (["a text"], "has no tokenizer: it takes a dict of input_ids"),
    ],
)
def test_wrong_inputs_are_input_errors(loaded, tokens, message):
    with pytest.raises(InputError, match=message):
        loaded.predict(tokens)


def test_wrong_settings_are_input_errors(loaded):
    tokens = {"input_ids": IDS}
    with pytest.raises(InputError, match="criterion is 3, but .* with the exit criterion Patience"):
        loaded.predict(tokens, 3)
    for patience in (-1, 1.5):
        with pytest.raises(InputError, match="patience must be a whole number, 0 or more"):
            loaded.predict(tokens, Patience(patience))
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        loaded.predict(tokens, batch_size=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of three layers with a stored criterion."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {"num_hidden_layers": 3, "initializer_range": 0.5}
    plain = load_pretrained(str(tiny_checkpoint(folder / "plain", ["a"], **config)), num_labels=2)
    save_pretrained(dataclasses.replace(plain, criterion=Patience(1)), folder / "saved")
    return folder / "saved"


def run_command(*arguments):
    """Run `python -m pabee_jax.export` in a new process with one device."""
    return subprocess.run(
        [sys.executable, "-m", "pabee_jax.export", *map(str, arguments)],
        env=one_device_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_command_exports_for_the_given_platforms(checkpoint, tmp_path):
    output = tmp_path / "out"
    process = run_command("--checkpoint", checkpoint, "--output", output, "--platforms=cpu,tpu")
    assert process.returncode == 0, process.stderr
    loaded = load(output)
    assert loaded.artifact.platforms == ("cpu", "tpu")
    assert loaded.artifact.sequence_length == 32 and loaded.artifact.criterion == Patience(1)
    batch = {name: np.minimum(array, 4) for name, array in random_batch(4, 32).items()}
    classifier = EarlyExitClassifier.from_pretrained(str(checkpoint), driver="loop")
    assert_same(loaded.predict(batch), classifier.predict(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is missing"),
        pytest.param(
            ["--checkpoint=/nowhere/at/all", "--output=OUT"],
            "there is no directory /nowhere/at/all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_arguments_of_the_command_print_one_line(tmp_path, arguments, message):
    output = str(tmp_path / "new")
    process = run_command(*(argument.replace("OUT", output) for argument in arguments))
    assert process.returncode == 2, process.stderr
    assert message in process.stderr and "Traceback" not in process.stderr
    assert len(process.stderr.splitlines()) == 1, process.stderr
    assert not (tmp_path / "new").exists()
