"""Exits for a trained classifier: strategy "attach"."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from helpers import REFERENCES
from pabee_jax import EarlyExitClassifier, InputError, Patience
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.configs import attach
from pabee_jax.data.config import FilesConfig
from pabee_jax.data.load import load_task
from pabee_jax.training.config import DistillConfig
from pabee_jax.training.run import train
from pabee_jax.training.start import classifier_label_names
from runs import WORDS, run_config, sources  # noqa: F401

TEXTS = ["good fine", "weak great dull"]


@pytest.fixture(scope="module")
def classifier(sources, tmp_path_factory):  # noqa: F811
    """A directory with an ordinary BERT classifier of "no" and "yes"."""
    return make_classifier(sources, tmp_path_factory.mktemp("classifier") / "bert")


def make_classifier(sources, directory, names=("no", "yes"), **values):  # noqa: F811
    shutil.copytree(sources / "model", directory)
    tensors, random = load_file(directory / "model.safetensors"), np.random.default_rng(0)
    tensors["classifier.weight"] = random.normal(size=(len(names), 16)).astype(np.float32)
    tensors["classifier.bias"] = random.normal(size=len(names)).astype(np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"]}
    config |= {"id2label": {str(index): name for index, name in enumerate(names)}} | values
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def attach_config(sources, classifier, **overrides):  # noqa: F811
    values = {
        "model": str(classifier),
        "strategy": "attach",
        "pooler": "per_exit",
        "learning_rate": 1e-2,
        "distill": DistillConfig(weight=1.0),
    }
    return run_config(sources, **values | overrides)


def logits_of(directory, **options):
    return EarlyExitClassifier.from_pretrained(str(directory), **options).all_exit_logits(TEXTS)


@pytest.mark.parametrize("label", [pytest.param("label", marks=pytest.mark.slow), ""])
def test_full_depth_keeps_its_logits_to_the_bit_and_the_early_exits_learn(
    sources,  # noqa: F811
    classifier,
    label,
    tmp_path,
):
    """With labels and without: the exits then learn from the last exit's answers."""
    files = FilesConfig(train="train.csv", dev="dev.csv", label=label)
    train(attach_config(sources, classifier, files=files), tmp_path / "run")
    exits = {"exit_pooler": "per_exit", "exit_pooling": "cls"}
    start = EarlyExitClassifier(load_pretrained(str(classifier), exits=exits))
    before, after = start.all_exit_logits(TEXTS), logits_of(tmp_path / "run")
    np.testing.assert_array_equal(after[-1], before[-1])
    assert (after[:-1] != before[:-1]).all()
    np.testing.assert_array_equal(
        after[-1], logits_of(classifier)[-1], "whatever poolers the early exits have"
    )
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]
    restored = EarlyExitClassifier.from_pretrained(str(tmp_path / "run"))
    assert restored.pretrained.trained_exits == "all"
    assert restored.pretrained.label_names == ("no", "yes")
    original = EarlyExitClassifier.from_pretrained(str(classifier))
    structures = [each.structure_and_parameters[0] for each in (original, restored)]
    assert structures[0] == structures[1], "other programs may round differently"


def test_a_classifier_predicts_with_its_head_at_once(classifier):
    loaded = EarlyExitClassifier.from_pretrained(str(classifier), criterion=Patience(0))
    assert loaded.pretrained.trained_exits == "last"
    predictions = loaded.predict(TEXTS)
    assert predictions.label_names == ("no", "yes")
    assert set(predictions.exit_layers.tolist()) == {2}


def test_a_token_classifier_has_no_head_for_sequences(sources, tmp_path):  # noqa: F811
    directory = make_classifier(
        sources, tmp_path / "model", architectures=["BertForTokenClassification"]
    )
    with pytest.raises(InputError, match="no internal classifiers yet, and no classification head"):
        EarlyExitClassifier.from_pretrained(str(directory))


def test_the_labels_of_files_get_the_class_ids_of_the_classifier(sources, tmp_path):  # noqa: F811
    """In other runs, the sorted labels "no" and "yes" would be the classes 0 and 1."""
    directory = make_classifier(sources, tmp_path / "model", ("yes", "no"))
    task = load_task(
        attach_config(sources, directory),
        classifier_label_names(attach_config(sources, directory)),
    )
    assert task.label_names == ("yes", "no")
    (rows,) = task.read("dev").values()
    is_yes = [set(text.split()) <= set(WORDS[:5]) for text in rows.texts]
    np.testing.assert_array_equal(rows.labels, np.where(is_yes, 0, 1))


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, {}, "label 'no' is not one of a, b"),
        (
            {"problem_type": "multi_label_classification"},
            {},
            "a classifier with several labels per text",
        ),
        ({}, {"pooling": "mean"}, "config.pooling is 'mean', but the .* reads 'cls'"),
        (
            {},
            {"classifier_bias": "prior", "files": FilesConfig("train.csv", "dev.csv", label="")},
            "config.classifier_bias is 'prior', but the train rows of task files have no labels",
        ),
        ({}, {"export": "best"}, "config.export is 'best', but with config.stra"),
        ({}, {"gradient": "equilibrium"}, "attach early exits never change the"),
    ],
)
def test_what_cannot_be_attached_is_refused(
    sources,  # noqa: F811
    values,
    overrides,
    message,
    tmp_path,
):
    directory = make_classifier(sources, tmp_path / "model", **values)
    with pytest.raises(InputError, match=message):
        train(attach_config(sources, directory, **overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_head_of_another_size_than_the_labels_is_refused(sources, tmp_path):  # noqa: F811
    directory = make_classifier(sources, tmp_path / "model", ("no", "maybe", "yes"))
    with pytest.raises(InputError, match="classifier.(weight|bias) has 3 outputs"):
        load_pretrained(str(directory), num_labels=2)


def test_an_encoder_without_head_gets_no_attached_exits(sources, tmp_path):  # noqa: F811
    config = attach_config(sources, sources / "model")
    with pytest.raises(InputError, match="has no classification head"):
        train(config, tmp_path / "run")
    files = FilesConfig(train="train.csv", dev="dev.csv", label="")
    with pytest.raises(InputError, match="files.label is empty"):
        train(run_config(sources, files=files), tmp_path / "run")


def test_the_configuration_attach_trains_the_early_exits_alone():
    for name in ("files", "mrpc"):
        config = attach.get_config(name)
        assert (config.task, config.strategy, config.pooler) == (name, "attach", "per_exit")
    with pytest.raises(InputError, match="unknown GLUE task 'x'"):
        attach.get_config("x")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_exits_of_modernbert_pool_as_its_head_does(
    pooling,
    sources,  # noqa: F811
    tmp_path,
):
    """`classifier_pooling` is a field of ModernBERT alone."""
    directory = tmp_path / "modernbert"
    shutil.copytree(REFERENCES / "classifiers" / "modernbert", directory)
    values = json.loads((directory / "config.json").read_text())
    values["classifier_pooling"] = pooling
    (directory / "config.json").write_text(json.dumps(values))
    transformers.BertTokenizerFast.from_pretrained(sources / "model").save_pretrained(directory)
    assert load_pretrained(str(directory)).model.config.exit_pooling == pooling


# The sizes of MiniLM.
SIZES = {
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "max_position_embeddings": 130,
    "vocab_size": 2000,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("bert", {}),
        ("roberta", {"pad_token_id": 1}),
        ("modernbert", {"classifier_pooling": "mean", "pad_token_id": 0}),
    ],
)
def test_full_depth_is_the_same_to_the_bit_at_the_sizes_that_people_have(family, values, tmp_path):
    """In every driver, with the compiler's usual settings, which the other tests do not have."""
    config = transformers.AutoConfig.for_model(family, **SIZES, **values, num_labels=3)
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "classifier")
    exits = {"exit_pooler": "per_exit", "exit_pooling": values.get("classifier_pooling", "cls")}
    attached = load_pretrained(tmp_path / "classifier", exits=exits)
    random = np.random.default_rng(0)
    for parameter in (attached.model.pooler.kernel, attached.model.classifiers.kernel):
        noise = random.normal(scale=0.1, size=parameter.shape).astype(np.float32)
        noise[-1] = 0  # Training changes the early exits alone.
        parameter.set_value(parameter[...] + noise)
    save_pretrained(dataclasses.replace(attached, trained_exits="all"), tmp_path / "attached")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(Path(__file__).with_name("full_depth.py"))]
    command += [str(tmp_path / "classifier"), str(tmp_path / "attached")]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    differences = json.loads(output.stdout)
    assert differences == dict.fromkeys(("auto", "full", "loop", "pool"), 0.0)
