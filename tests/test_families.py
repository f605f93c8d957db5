"""Every family of encoders, with the classification head of `transformers` as the last exit."""

import dataclasses
import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from benchmarks.exit_schedule import ExitSchedule
from helpers import REFERENCES, random_batch, tiny_model
from pabee_jax import EarlyExitClassifier, FixedLayer, InputError, Patience
from pabee_jax.checkpoints.files import read_config_json, read_tensors
from pabee_jax.checkpoints.names import from_tensors, to_tensors
from pabee_jax.checkpoints.plain import save_plain
from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained
from pabee_jax.data.batching import MODEL_INPUTS
from pabee_jax.data.dataset import Dataset
from pabee_jax.distributed import sharding
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.export import load as load_exported
from pabee_jax.inference.engine import Engine
from pabee_jax.inference.export import export
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import split, stacked
from pabee_jax.models.side_inputs import relative_buckets
from pabee_jax.training import memory
from pabee_jax.training.run import train
from runs import TOTAL_STEPS, Killed, metrics_of, recording, run_config, sources, weights_of  # noqa: F401
from test_drivers import assert_every_driver_agrees
from test_parallel import small_model, trained

TOLERANCE = 2e-5
CLASSIFIERS = REFERENCES / "classifiers"
FAMILIES = sorted(path.name for path in CLASSIFIERS.iterdir())

run_embed = jax.jit(EarlyExitModel.embed)
run_layer = jax.jit(EarlyExitModel.layer)
run_full = jax.jit(all_exit_logits)


def assert_equals_pytorch(model: EarlyExitModel, expected, with_stacked: bool = True) -> None:
    """Compare embeddings, every layer, and the head at every layer.

    `with_stacked` also compares the layout of training, which takes seconds to compile.
    """
    model = nnx.merge(*nnx.split(model))
    with_one_head(model)
    batch = {name: expected[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    hidden, mask, side = run_embed(model, batch)
    states = [hidden]
    for layer, group in enumerate(model.config.layer_groups):
        states.append(run_layer(model, model.groups[group], states[-1], mask, side.of_layer(layer)))
    for name, actual, reference in (
        ("embeddings", states[0], expected["embeddings"]),
        *(
            (f"hidden states of layer {layer}", *pair)
            for layer, pair in enumerate(zip(states[1:], expected["hidden_states"], strict=True))
        ),
    ):
        difference = np.abs(np.asarray(actual) - reference)[np.asarray(mask)].max()
        assert difference < TOLERANCE, f"{name} differ from PyTorch by {difference:.1e}"
    layouts = {"separate groups": model} | (
        {"stacked groups": stacked(model)} if with_stacked else {}
    )
    for name, layout in layouts.items():
        difference = np.abs(run_full(layout, batch) - expected["logits"]).max()
        assert difference < TOLERANCE, f"logits with {name} differ by {difference:.1e}"


def with_one_head(model: EarlyExitModel) -> None:
    """Let every exit use the classifier of the last exit."""
    for parameter in (model.classifiers.kernel, model.classifiers.bias):
        parameter.set_value(jnp.broadcast_to(parameter[...][-1:], parameter.shape))


def pytorch_classifiers():
    """Return the module of the references; it needs torch."""
    sys.path.insert(0, str(REFERENCES))
    try:
        import pytorch_classifiers as reference
    finally:
        sys.path.remove(str(REFERENCES))
    return reference


@functools.cache
def load(family: str):
    directory = CLASSIFIERS / family
    config = ModelConfig.from_hugging_face(read_config_json(directory), 3)
    return from_tensors(read_tensors(directory), config)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_every_layer_and_the_head_equal_pytorch(family):
    model, report = load(family)
    assert report.unexpected == ()
    assert {name.partition(".")[0] for name in report.missing} <= {
        "classifiers",
        "exit_classifiers",
    }
    assert not [name for name in report.missing if ".3." in name], "the head is the last exit"
    expected = np.load(CLASSIFIERS / family / "expected.npz")
    assert_equals_pytorch(model, expected, with_stacked=family == "modernbert")


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_pytorch_at_both_depths(family, layers):
    pytest.importorskip("torch")
    reference = pytorch_classifiers()
    classifier, batch = reference.make_classifier(family, layers), reference.make_batch(family)
    tensors = {name: value.numpy() for name, value in classifier.state_dict().items()}
    config = ModelConfig.from_hugging_face(classifier.config.to_dict(), 3)
    model, _ = from_tensors(tensors, config)
    assert_equals_pytorch(model, batch | reference.outputs(classifier, batch))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layers", "sizes"),
    [
        ("bert", 2, {"num_labels": 1000, "vocab_size": 250_002}),
        ("albert", 24, {"num_labels": 150, "inner_group_num": 1}),
        ("albert", 12, {"num_hidden_groups": 3, "inner_group_num": 3}),
        ("modernbert", 7, {"num_labels": 20}),
    ],
)
def test_many_classes_layers_and_words_equal_pytorch(family, layers, sizes):
    pytest.importorskip("torch")
    reference = pytorch_classifiers()
    pytorch, batch = (
        reference.make_classifier(family, layers, **sizes),
        reference.make_batch(family),
    )
    batch["input_ids"] *= np.int32(sizes.get("vocab_size", 60) // 60)
    expected = reference.outputs(pytorch, batch)["logits"]
    tensors = {name: value.numpy() for name, value in pytorch.state_dict().items()}
    labels = sizes.get("num_labels", 3)
    model, _ = from_tensors(
        tensors, ModelConfig.from_hugging_face(pytorch.config.to_dict(), labels)
    )
    with_one_head(model)
    pretrained = Pretrained(model, None, {}, tuple(map(str, range(labels))), 11, None, "all")
    classifier = EarlyExitClassifier(pretrained, criterion=FixedLayer(1))
    rows = Dataset(*(batch[name] for name in MODEL_INPUTS))
    np.testing.assert_allclose(classifier.all_exit_logits(rows), expected, atol=TOLERANCE)
    with Engine(classifier) as engine:  # Computes all exits of rows at different depths.
        for row, layer in enumerate((1, 2, layers - 1, layers)):
            (future,) = engine.submit(rows.take(slice(row, row + 1)), FixedLayer(layer))
            np.testing.assert_allclose(
                future.result().logits, expected[layer - 1, row], atol=TOLERANCE
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_loads_as_it_was(family):
    model, _ = load(family)
    saved = to_tensors(model)
    loaded, report = from_tensors(saved, model.config)
    assert report.missing == report.unexpected == ()
    parameters = split(loaded)[1]
    for name, value in split(model)[1].items():
        np.testing.assert_array_equal(parameters[name], value, err_msg=name)
    encoder = read_tensors(CLASSIFIERS / family)
    kept = [name for name in saved if name in encoder]
    head = ("classifier.", "pre_classifier.", "head.")
    assert all(name.startswith(head) for name in encoder.keys() - saved.keys())
    for name in kept:
        np.testing.assert_array_equal(saved[name], encoder[name], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_parameters_is_known_without_building_the_model(family):
    model, _ = load(family)
    assert memory.parameter_count(model.config) == sum(
        value.size for value in split(model)[1].values()
    )


def checkpoint_of(family: str, directory: Path) -> Path:
    """Return a copy of the recorded classifier with a tokenizer."""
    shutil.copytree(CLASSIFIERS / family, directory)
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "dull"]
    words = directory / "words.txt"
    words.write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizerFast(str(words)).save_pretrained(directory)
    words.unlink()
    return directory


TEXTS = ["good", "a bad film", ("good film", "dull"), "dull dull film good bad good"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exit_pooler", ["per_exit", "shared"])
def test_a_plain_classifier_has_the_logits_of_its_exit(family, exit_pooler, tmp_path):
    directory = checkpoint_of(family, tmp_path / "model")
    exits = {"exit_pooler": exit_pooler, "exit_pooling": "cls"}
    pretrained = load_pretrained(str(directory), exits=exits)
    # As if they were trained: random exits would be refused.
    pretrained = dataclasses.replace(pretrained, trained_exits="all")
    expected = EarlyExitClassifier(pretrained).all_exit_logits(TEXTS)
    for exit in (1, 3, 4):
        target = tmp_path / f"plain-{exit}"
        save_plain(pretrained, target, exit)
        plain = EarlyExitClassifier.from_pretrained(str(target))
        assert plain.num_layers == exit and plain.pretrained.trained_exits == "last"
        np.testing.assert_allclose(plain.all_exit_logits(TEXTS)[-1], expected[exit - 1], atol=1e-6)
        if importlib.util.find_spec("torch"):
            tokens = plain.tokenize(TEXTS)
            logits = pytorch_logits(target, tokens)
            np.testing.assert_allclose(logits, expected[exit - 1], atol=2e-5)


def pytorch_logits(directory: Path, tokens) -> np.ndarray:
    import torch

    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    with torch.no_grad():
        return model(**{name: torch.tensor(tokens[name]).long() for name in names}).logits.numpy()


EXITS = [
    {"exit_pooler": "shared", "exit_pooling": "cls"},
    {"exit_pooler": "per_exit", "exit_pooling": "mean"},
]
# ModernBERT's local layers see tokens at most 3 away.
WINDOW = {"modernbert": {"local_attention": 6}}


def batch_for(model, rows, **options):
    batch = random_batch(rows, **options)
    if model.config.type_vocab_size < 2:
        batch["token_type_ids"] *= 0
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("exits", "devices"), [(EXITS[0], 1), (EXITS[1], 8)])
def test_every_driver_gives_the_same_exits(family, exits, devices):
    """Rows of 2 to 18 tokens: ModernBERT's local layers do not see all of them."""
    model = tiny_model(family, num_hidden_layers=4, **exits, **WINDOW.get(family, {}))
    batch, mesh = batch_for(model, 29, length=18), sharding.make_mesh(devices)
    assert_every_driver_agrees(
        model,
        batch,
        [ExitSchedule(np.arange(29, dtype=np.int32) % 4 + 1)],
        mesh,
        chunk_rows_values=[3],
    )
    pretrained = Pretrained(model, None, {}, ("0", "1", "2"), 18)
    classifier = EarlyExitClassifier(pretrained, driver="full", mesh=mesh, chunk_tokens=40)
    np.testing.assert_allclose(
        classifier.all_exit_logits(batch), run_full(model, batch), atol=TOLERANCE
    )


@pytest.mark.parametrize(
    "family",
    ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "bert")],
)
def test_bfloat16_changes_logits_little(family):
    config = tiny_model(family, num_hidden_layers=4, **WINDOW.get(family, {})).config
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = EarlyExitModel(config, dtype=dtype, rngs=nnx.Rngs(0))
        batch = batch_for(model, 40)
        pretrained = Pretrained(model, None, {}, ("0", "1", "2"), 12)
        logits[dtype] = EarlyExitClassifier(pretrained, driver="pool").all_exit_logits(batch)
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.3)
    same = logits["bfloat16"].argmax(axis=2) == logits["float32"].argmax(axis=2)
    assert same.mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_training_over_a_mesh_gives_the_losses_of_one_device(family):
    """Heads and feed-forward features are sharded over the axis `model`."""
    alone, _ = trained(small_model(family), sharding.make_mesh(1))
    losses, _ = trained(small_model(family), sharding.make_mesh(4, 2))
    np.testing.assert_allclose(losses, alone, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_resumes_to_the_bit(
    family,
    sources,  # noqa: F811
    recording,  # noqa: F811
    tmp_path,
):
    directory = checkpoint_of(family, tmp_path / "model")
    config = run_config(sources, model=str(directory), pooling="mean", pooler="per_exit")
    with pytest.raises(InputError, match="has 3 outputs, but num_labels or the task requires 2"):
        train(config, tmp_path / "undisturbed")
    values = json.loads((directory / "config.json").read_text())
    values["architectures"] = ["SomeModel"]  # The head is of another task.
    (directory / "config.json").write_text(json.dumps(values))
    train(config, tmp_path / "undisturbed")
    recording.kill_in_step = 7
    with pytest.raises(Killed):
        train(config, tmp_path / "killed")
    recording.kill_in_step = None
    train(config, tmp_path / "killed")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "undisturbed")
    losses = [line["loss"] for line in metrics_of(tmp_path / "killed") if "loss" in line]
    assert len(losses) == TOTAL_STEPS
    predictions = EarlyExitClassifier.from_pretrained(str(tmp_path / "killed")).predict(TEXTS)
    assert len(predictions.labels) == len(TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_an_exported_program_predicts_as_the_classifier_does(family, tmp_path):
    pytest.importorskip("flatbuffers")
    model = tiny_model(family, num_hidden_layers=4, **WINDOW.get(family, {}))
    pretrained = Pretrained(model, None, {}, ("0", "1", "2"), 12)
    classifier = EarlyExitClassifier(pretrained, criterion=Patience(1), driver="loop")
    export(classifier, tmp_path)
    batch = batch_for(model, 9)
    expected, actual = classifier.predict(batch), load_exported(tmp_path).predict(batch)
    np.testing.assert_array_equal(actual.exit_layers, expected.exit_layers)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=TOLERANCE)


def test_relative_positions_fall_into_the_buckets_of_transformers():
    """`buckets` has the bucket of every key position minus query position from -299 to 299."""
    buckets = np.load(CLASSIFIERS / "mpnet" / "expected.npz")["buckets"]
    positions = np.arange(300)
    expected = buckets[positions - positions[:, None] + 299]
    np.testing.assert_array_equal(relative_buckets(300, 32), expected)


def test_the_checkpoint_decides_how_texts_become_tokens(tmp_path):
    """A byte-level tokenizer as RoBERTa has it, from vocab.json and merges.txt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    directory = tmp_path / "roberta"
    shutil.copytree(CLASSIFIERS / "roberta", directory)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=50, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["a good film", "a bad film"], trainer)
    tokenizer.model.save(str(directory))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    pretrained = load_pretrained(str(directory))
    rows = pretrained.encode(["good film", "bad"], ["bad", None])
    tokens = [pretrained.tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in rows.input_ids]
    separators = [index for index, token in enumerate(tokens[0]) if token == "</s>"]
    assert tokens[0][0] == "<s>" and separators[1] == separators[0] + 1, "two between the texts"
    assert tokens[0][-1] == "</s>" and tokens[1][-1] == "<pad>"
    assert not rows.token_type_ids.any()
    predictions = EarlyExitClassifier(pretrained).predict([("good film", "bad"), "bad", ""])
    alone = EarlyExitClassifier(pretrained).predict(["bad"])
    np.testing.assert_allclose(predictions.logits[1:2], alone.logits, atol=TOLERANCE)


def test_token_types_of_a_tokenizer_are_dropped_for_a_model_without_them(tmp_path):
    pretrained = load_pretrained(str(checkpoint_of("distilbert", tmp_path / "model")))
    assert pretrained.tokenizer("good", "bad", return_token_type_ids=True)["token_type_ids"][-1]
    assert not pretrained.encode(["good"], ["bad"]).token_type_ids.any()
