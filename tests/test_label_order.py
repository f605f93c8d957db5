"""The order of a classifier's classes, from its checkpoint to every result.

The labels of the rows are the predictions of transformers (which needs PyTorch), so the accuracy
must be 100%.
"""

import csv
import json
import shutil

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from evaluated import options
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.commands.compare import compare
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.data.config import DataConfig, FilesConfig
from pabee_jax.data.load import load_task
from pabee_jax.io import storage
from pabee_jax.training.config import TrainConfig
from pabee_jax.training.run import train
from runs import WORDS, run_config, sources  # noqa: F401
from test_attach import attach_config, make_classifier

NAMES = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
ROWS = 60


@pytest.fixture(scope="module")
def named(sources, tmp_path_factory):  # noqa: F811
    """A classifier of `NAMES`, and rows with its predictions as labels, as MNLI and as files."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("named")
    make_classifier(sources, folder / "model", NAMES)
    random = np.random.default_rng(1)
    rows = [
        [" ".join(random.choice(WORDS, random.integers(1, 6))) for _ in range(2)]
        for _ in range(ROWS)
    ]
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder / "model")
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "model").eval()
    tokens = tokenizer(*map(list, zip(*rows, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        # A random head predicts one class for all rows, unless its mean logits are 0.
        model.classifier.bias -= model(**tokens).logits.mean(0)
        class_ids = model(**tokens).logits.argmax(1).tolist()
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["classifier.bias"] = model.classifier.bias.numpy(force=True)
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    labels = [NAMES[class_id].lower() for class_id in class_ids]
    assert len(set(labels)) == 3
    (folder / "MNLI").mkdir()
    for part in ("train", "dev_matched", "dev_mismatched"):
        lines = [
            "\t".join([str(index), *row, label])
            for index, (row, label) in enumerate(zip(rows, labels, strict=True))
        ]
        text = "\n".join(["index\tsentence1\tsentence2\tgold_label", *lines]) + "\n"
        (folder / "MNLI" / f"{part}.tsv").write_text(text)
    for part in ("train", "dev"):
        with (folder / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "pair", "label"])
            writer.writerows([*row, label] for row, label in zip(rows, labels, strict=True))
    return folder


FILES = FilesConfig(train="train.csv", dev="dev.csv", text_pair="pair")


def data(named, task, **values):
    files = FILES if task == "files" else FilesConfig()
    return TrainConfig(task=task, data_dir=str(named), files=files, max_seq_length=32, **values)


def with_names(named, tmp_path, names):
    shutil.copytree(named / "model", tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    values["id2label"] = {str(index): name for index, name in enumerate(names)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    return tmp_path / "model"


def accuracies(output):
    rows = json.loads((output / "results.json").read_text())["rows"]
    return {value for name, value in rows[0].items() if name.startswith("accuracy")}


def order_warnings(caplog):
    return [message for message in caplog.messages if message.endswith((_STATE, _WRONG))]


_STATE = "state another order with config.label_names"
_WRONG = "or its id2label have a wrong order"


@pytest.mark.parametrize("task", ["mnli", "files"])
def test_evaluate_maps_the_labels_to_the_classes_of_the_checkpoint(named, task, tmp_path, caplog):
    settings = options(named / "model", patience="0", output=str(tmp_path))
    evaluate(settings, data(named, task))
    assert accuracies(tmp_path) == {1.0}
    assert not order_warnings(caplog)
    with (tmp_path / "predictions.csv").open() as file:
        for row in csv.DictReader(file):
            assert row["label"] == row["prediction_patience_0"] and row["label"] in NAMES
    results = json.loads((tmp_path / "results.json").read_text())
    assert tuple(results["classes"]) == NAMES and sum(results["class_counts"]) % ROWS == 0


@pytest.mark.parametrize("task", ["mnli", "files"])
def test_a_checkpoint_without_names_takes_the_stated_order(named, task, tmp_path, caplog):
    model = with_names(named, tmp_path, ("LABEL_0", "LABEL_1", "LABEL_2"))
    for stated in ("", "contradiction,neutral,entailment"):
        output = tmp_path / f"out{len(stated)}"
        settings = options(model, patience="0", output=str(output))
        evaluate(settings, data(named, task, label_names=stated))
        if not stated:
            (warning,) = order_warnings(caplog)
            assert (
                "outputs in the order contradiction, neutral, entailment, it would be 100.00%"
                in (warning)
            )
            assert "the outputs have no names, and are taken for " in warning
            caplog.clear()
    assert accuracies(output) == {1.0} and not order_warnings(caplog)


def test_a_checkpoint_with_wrong_names_is_noticed(named, tmp_path, caplog):
    model = with_names(named, tmp_path, ("entailment", "contradiction", "neutral"))
    evaluate(options(model, patience="0", output=str(tmp_path / "out")), data(named, "mnli"))
    (warning,) = order_warnings(caplog)
    assert "in the order contradiction, neutral, entailment, it would be 100.00%" in warning


def test_other_classes_are_refused_with_both_orders(named, tmp_path):
    model = with_names(named, tmp_path, ("no", "maybe", "yes"))
    message = (
        "classes no, maybe, yes in this order.* entailment, neutral, contradiction.*label_names"
    )
    with pytest.raises(InputError, match=message):
        evaluate(options(model, output=str(tmp_path / "out")), data(named, "mnli"))
    stated = data(named, "mnli", label_names="contradiction,neutral,entailment")
    evaluate(options(model, patience="0", output=str(tmp_path / "out")), stated)
    assert accuracies(tmp_path / "out") == {1.0}


def started(named, sources, model, strategy, **overrides):  # noqa: F811
    values = {"strategy": strategy} if strategy == "joint" else {}
    values |= {"data_dir": str(named), "max_seq_length": 32, "max_steps": 1, "learning_rate": 1e-9}
    values |= {"eval_every": 1, "save_every": 1, "batch_size": 20}
    if strategy == "joint":
        return run_config(sources, model=str(model), **values | overrides)
    return attach_config(sources, model, **values | overrides)


@pytest.mark.parametrize(
    ("strategy", "task"),
    [
        ("joint", "mnli"),
        ("attach", "files"),
        pytest.param("joint", "files", marks=pytest.mark.slow),
        pytest.param("attach", "mnli", marks=pytest.mark.slow),
    ],
)
def test_training_starts_from_the_classes_of_the_classifier(
    named,
    sources,  # noqa: F811
    strategy,
    task,
    tmp_path,
    capsys,
    caplog,
):
    overrides = {"task": task, "files": FILES if task == "files" else FilesConfig()}
    run = tmp_path / "run"
    train(started(named, sources, named / "model", strategy, **overrides), run)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (evaluation,) = (line for line in lines if "dev" in line or "dev_matched" in line)
    assert evaluation["dev" if task == "files" else "dev_matched"]["accuracy"][-1] == 1.0
    restored = EarlyExitClassifier.from_pretrained(str(run)).pretrained
    assert restored.label_names == NAMES, "the order and the spelling of the classifier"
    assert "before step 1" not in caplog.text
    with (named / "train.csv").open() as file:
        counts = [row["label"] for row in csv.DictReader(file)]
    shown = ", ".join(f"{name} {counts.count(name.lower())}" for name in NAMES)
    printed = capsys.readouterr().out
    assert printed.index(f"train, {ROWS} rows: {shown}") < printed.index("step 1")
    assert shown in (run / "README.md").read_text()


def test_training_from_a_classifier_without_names_warns_before_step_1(
    named,
    sources,  # noqa: F811
    tmp_path,
    caplog,
):
    model = with_names(named, tmp_path, ("LABEL_0", "LABEL_1", "LABEL_2"))
    train(started(named, sources, model, "joint", files=FILES), tmp_path / "run")
    (warning,) = (message for message in caplog.messages if "before step 1" in message)
    assert "config.label_names" in warning
    caplog.clear()
    stated = {"files": FILES, "label_names": "Contradiction,Neutral,Entailment"}
    train(started(named, sources, model, "joint", **stated), tmp_path / "stated")
    assert "before step 1" not in caplog.text
    restored = EarlyExitClassifier.from_pretrained(str(tmp_path / "stated")).pretrained
    assert restored.label_names == ("Contradiction", "Neutral", "Entailment")


def test_training_from_a_classifier_of_other_classes_is_refused(
    named,
    sources,  # noqa: F811
    tmp_path,
):
    model = with_names(named, tmp_path, ("no", "maybe", "yes"))
    with pytest.raises(InputError, match="classes no, maybe, yes in this order, but task files"):
        train(started(named, sources, model, "joint", files=FILES), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_classes_of_one_name_are_refused(named, sources, tmp_path):  # noqa: F811
    model = with_names(named, tmp_path, ("other", "first", "other"))
    message = "gives classes 0 and 2 the same name, 'other'; give every class its own name"
    with pytest.raises(InputError, match=message):
        EarlyExitClassifier.from_pretrained(str(model))
    with pytest.raises(InputError, match=message):
        train(started(named, sources, model, "joint", files=FILES), tmp_path / "run")
    with pytest.raises(InputError, match=message):
        evaluate(options(model, output=str(tmp_path / "out")), data(named, "files"))


@pytest.mark.slow
def test_runs_of_classifiers_with_other_orders_are_compared_class_by_class(
    named,
    sources,  # noqa: F811
    tmp_path,
    capsys,
):
    """The second classifier is the first with its outputs in another order."""
    order = [2, 0, 1]
    other = with_names(named, tmp_path, [NAMES[index].title() for index in order])
    tensors = load_file(other / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = np.ascontiguousarray(tensors[name][order])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    runs = []
    for name, model in (("a", named / "model"), ("b", other)):
        overrides = {"files": FILES, "batch_size": 20 if name == "a" else 30}
        train(started(named, sources, model, "joint", **overrides), tmp_path / name)
        evaluate(options(tmp_path / name, patience="0"), None)
        runs.append(str(tmp_path / name))
    compare(runs, [], "macro_f1", storage.path_of(tmp_path / "compared"))
    records = json.loads((tmp_path / "compared" / "compare.json").read_text())["settings"]
    full_depth = [record for record in records if record["setting"] == "patience 0"]
    assert [record["macro_f1"] for record in full_depth] == [1.0, 1.0]
    assert full_depth[1]["difference"] == 0


def test_the_demo_maps_its_labels_to_a_classifier_in_another_order():
    own = load_task(DataConfig(task="demo"))
    reordered = load_task(DataConfig(task="demo"), own.label_names[::-1])
    expected = [own.label_names[label] for label in own.read("dev")["dev"].labels]
    actual = [reordered.label_names[label] for label in reordered.read("dev")["dev"].labels]
    assert actual == expected and reordered.label_names == own.label_names[::-1]
