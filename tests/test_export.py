"""A serialised program answers as the classifier does, anywhere, without the model's code."""

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

from helpers import TINY, random_batch, tiny_checkpoint, tiny_model
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
from pabee_jax.criteria import registered
from pabee_jax.export import export, load
from pabee_jax.inference import export as export_module
from pabee_jax.models.encoder import EarlyExitModel

LENGTH = 12
NAMES = ("no", "maybe", "yes")
PATIENCES = (0, 1, 2, 4, 9)

# What a serving machine does.
SERVING = """
import sys
import numpy as np
from pabee_jax import Patience
from pabee_jax.export import load
directory, tokens, answers = sys.argv[1:]
found = load(directory).predict(dict(np.load(tokens)), Patience(2))
np.savez(answers, exits=found.exit_layers, logits=found.logits)
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
    """The exported files once more, to be damaged."""
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(directory, **values):
    path = directory / "artifact.json"
    values = json.loads(path.read_text()) | values
    del values["sha256_of_this"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values | {"sha256_of_this": digest}))


def flip(directory):
    path = directory / "artifact.json"
    path.write_text(path.read_text().replace('"sequence_length": 12', '"sequence_length": 13'))


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_same(found, expected, rows=None):
    """The same answers as the first `rows` of what was expected."""
    np.testing.assert_array_equal(found.exit_layers, expected.exit_layers[:rows])
    np.testing.assert_allclose(found.logits, expected.logits[:rows], atol=2e-5)
    np.testing.assert_allclose(found.labels, expected.labels[:rows], atol=2e-5)
    assert found.label_names == expected.label_names


@pytest.mark.parametrize(
    ("family", "labels"),
    [("albert", 1), ("bert", 3)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("albert", 3), ("bert", 1))],
)
def test_rows_leave_as_they_do_in_the_classifier(family, labels, tmp_path):
    classifier = classifier_of(family, labels, num_hidden_groups=2)
    export(classifier, tmp_path)
    loaded = load(tmp_path)
    batch, layers_seen = random_batch(8, LENGTH), set()
    for patience in PATIENCES:
        classifier.criterion = Patience(patience, 0.6)
        expected = classifier.predict(batch)
        layers_seen |= set(expected.exit_layers.tolist())
        for rows in (1, 3, 8):
            some = {name: each[:rows] for name, each in batch.items()}
            assert_same(loaded.predict(some, classifier.criterion), expected, rows)
    assert len(layers_seen) > 2, "the rows all leave together: this test shows nothing"


def test_rows_beyond_the_batch_size_run_in_several_batches(classifier, loaded):
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
    kinds = {weight.dtype.name for weight in loaded._weights.values()}
    assert kinds == {"bfloat16", "float32"} and loaded.artifact.dtype == "bfloat16"
    batch = random_batch(8, LENGTH)
    found, expected = loaded.predict(batch), classifier.predict(batch)
    np.testing.assert_allclose(found.logits, expected.logits, atol=0.05)


def test_one_artefact_for_every_platform_says_what_it_is(directory, loaded):
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


def test_the_exit_is_inside_and_products_are_float32(directory):
    blob = bytearray((directory / "artifact.program").read_bytes())
    program = jax_export.deserialize(blob)
    text = program.mlir_module()
    assert "stablehlo.while" in text, "the loop ran in Python: no layer can be saved"
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products and all("HIGHEST" in line for line in products), (
        "a product may be rounded to TF32 or bfloat16 on an accelerator, which moves exits"
    )
    assert program.in_avals[-1].shape == () and str(program.out_avals[0].shape) == "(rows,)"


def test_another_patience_compiles_nothing(directory):
    loaded = load(directory)
    for rows in (1, 3, 4, 8):
        for patience in PATIENCES:
            loaded.predict(random_batch(rows, LENGTH), Patience(patience, patience / 10))
    assert loaded._run._cache_size() == 3, "1, 4 and 8 rows are three programs, and no more"


def test_runs_without_the_model_and_its_libraries(classifier, directory, tmp_path):
    batch = random_batch(8, LENGTH)
    np.savez(tmp_path / "tokens.npz", **batch)
    files = [directory, tmp_path / "tokens.npz", tmp_path / "answers.npz"]
    subprocess.run([sys.executable, "-c", SERVING, *map(str, files)], check=True, timeout=300)
    answers = np.load(tmp_path / "answers.npz")
    expected = classifier.predict(batch)
    np.testing.assert_array_equal(answers["exits"], expected.exit_layers)
    np.testing.assert_allclose(answers["logits"], expected.logits, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ["cpu", "gpu"]}, "unknown platform 'gpu'; known are cpu, cuda, rocm, tpu"),
        ({"platforms": []}, "platforms is empty; known are cpu"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, not 0"),
        ({"sequence_length": 25}, "sequence_length is 25, but the model has 24 positions"),
    ],
)
def test_refuses_what_cannot_be_exported(classifier, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        export(classifier, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_the_last_position_can_be_used(classifier, tmp_path):
    export(classifier, tmp_path, sequence_length=24, platforms=["cpu"])
    batch = random_batch(2, 24)
    assert_same(load(tmp_path).predict(batch), classifier.predict(batch))


def test_refuses_a_criterion_of_the_users_own(tmp_path):
    @registered()
    @dataclasses.dataclass(frozen=True)
    class Mine(Patience):
        pass

    with pytest.raises(InputError, match="criterion Mine is a class of your own"):
        export(classifier_of(criterion=Mine(1)), tmp_path / "new")


def test_refuses_an_output_in_use(classifier, directory, tmp_path):
    before = contents(directory)
    with pytest.raises(InputError, match="holds an exported program already"):
        export(classifier, directory, sequence_length=5)
    assert contents(directory) == before
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file, file / "below" / "it"):
        with pytest.raises(InputError, match="file is a file; the output is a directory"):
            export(classifier, output)
    assert file.read_text() == "mine"


def test_refuses_an_output_that_cannot_be_written(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # A superuser has no other way.
    with pytest.raises(InputError, match="is not writable"):
        export(classifier, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("file", ["artifact.program", "artifact.safetensors", "artifact.json"])
def test_a_full_disk_leaves_nothing_behind(classifier, tmp_path, monkeypatch, file):
    (tmp_path / "mine").write_text("mine")

    def write(path, writer):
        writer(path.with_name(f".{path.name}.tmp"))
        if path.name == file:
            raise OSError(28, "No space left on device")
        os.replace(path.with_name(f".{path.name}.tmp"), path)

    monkeypatch.setattr(export_module, "write_atomically", write)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        export(classifier, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_names_the_extra_when_flatbuffers_is_absent(classifier, directory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for use in (
        lambda: export(classifier, tmp_path / "new"),
        lambda: load(directory),
    ):
        with pytest.raises(InputError, match=r"flatbuffers: pip install 'pabee_jax\[export\]'"):
            use()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "artifact.json").unlink(), "it has no artifact.json"),
        (lambda path: (path / "artifact.json").write_text("{"), "it is not JSON"),
        (lambda path: (path / "artifact.json").write_bytes(b"\xff"), "it is not JSON"),
        (lambda path: (path / "artifact.json").write_text("[]"), "says no format version"),
        (flip, "artifact.json is damaged: its values are not those that were written"),
        (lambda path: change(path, format=2), "format version 2, but this pabee_jax reads 1"),
        (lambda path: change(path, sequence_length=None), "damaged: sequence_length is None"),
        (lambda path: change(path, criterion={"criterion": "luck"}), "exit criterion 'luck'"),
        (lambda path: change(path, criterion=3), "damaged: criterion is 3"),
        (lambda path: change(path, platforms=["tpu"]), "for tpu, but this process computes on cpu"),
        (lambda path: (path / "artifact.program").unlink(), "artifact.program is missing"),
        (lambda path: (path / "artifact.safetensors").unlink(), "artifact.safetensors is missing"),
        (lambda path: flip(path / "artifact.program"), "artifact.program is damaged"),
        (lambda path: flip(path / "artifact.safetensors"), "artifact.safetensors is damaged"),
    ],
)
def test_refuses_what_it_cannot_load(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message):
        load(copy)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_refuses_a_directory_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        with pytest.raises(InputError, match=f"{name} holds no exported program"):
            load(tmp_path / name)


def test_a_program_of_another_jax_is_named_as_such(copy):
    unreadable = b"another version's bytes"
    (copy / "artifact.program").write_bytes(unreadable)
    digests = json.loads((copy / "artifact.json").read_text())["sha256"]
    digests["artifact.program"] = hashlib.sha256(unreadable).hexdigest()
    change(copy, sha256=digests, jax_version="0.99")
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
def test_refuses_inputs_in_one_sentence(loaded, tokens, message):
    with pytest.raises(InputError, match=message):
        loaded.predict(tokens)


def test_refuses_bad_settings(loaded):
    tokens = {"input_ids": IDS}
    with pytest.raises(InputError, match="exit criterion Patience and takes no other: 3"):
        loaded.predict(tokens, 3)
    for patience in (-1, 1.5):
        with pytest.raises(InputError, match="patience must be a whole number, 0 or more"):
            loaded.predict(tokens, Patience(patience))
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        loaded.predict(tokens, batch_size=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A finished checkpoint of three layers, with its own criterion."""
    place = tmp_path_factory.mktemp("checkpoint")
    shape = {"num_hidden_layers": 3, "initializer_range": 0.5}
    plain = load_pretrained(str(tiny_checkpoint(place / "plain", ["a"], **shape)), num_labels=2)
    save_pretrained(dataclasses.replace(plain, criterion=Patience(1)), place / "saved")
    return place / "saved"


def command(*arguments):
    """`python -m pabee_jax.export` as a person runs it, on one device."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "pabee_jax.export", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_line(checkpoint, tmp_path):
    output = tmp_path / "out"
    done = command("--checkpoint", checkpoint, "--output", output, "--platforms=cpu,tpu")
    assert done.returncode == 0, done.stderr
    loaded = load(output)
    assert loaded.artifact.platforms == ("cpu", "tpu")
    assert loaded.artifact.sequence_length == 32 and loaded.artifact.criterion == Patience(1)
    batch = {name: np.minimum(each, 4) for name, each in random_batch(4, 32).items()}
    classifier = EarlyExitClassifier.from_pretrained(str(checkpoint), driver="loop")
    assert_same(loaded.predict(batch), classifier.predict(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint=/nowhere/at/all", "--output=OUT"], "there is no directory /nowhere/at/all"),
    ],
)
def test_command_line_mistakes_are_one_sentence(tmp_path, arguments, message):
    done = command(*(each.replace("OUT", str(tmp_path / "new")) for each in arguments))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "new").exists()
