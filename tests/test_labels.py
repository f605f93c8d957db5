"""Class labels: their spelling, the class that a label names, likely mistakes, and their order.

The expected class ids and metrics are written by hand, or come from scikit-learn and pandas.
"""

import csv
import decimal
import json
import re

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet
from sklearn import metrics as sk

from pabee_jax.analysis import metrics
from pabee_jax.data import files, labels
from pabee_jax.data.config import DataConfig, FilesConfig
from pabee_jax.data.load import load_task
from pabee_jax.data.perturbed import read_pairs
from pabee_jax.errors import InputError

MNLI = ("entailment", "neutral", "contradiction")


def write(path, **cells):
    frame = pandas.DataFrame(cells)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(cells), path)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


def ids_of(path, split="train", **arguments):
    task = files.task(**{split: path} | arguments)
    return task.label_names, task.read(split)[split].labels.tolist()


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("written", "names", "ids"),
    [
        (["0", "1", "0.0", "1.0"], ("0", "1"), [0, 1, 0, 1]),
        (["1.0", "0.0", "1.0", "0.0"], ("0", "1"), [1, 0, 1, 0]),
        (["10.0", "9.0", "2", "10"], ("2", "9", "10"), [2, 1, 0, 2]),
        (["1.000000000000000000e+00", "0.000000000000000000e+00"], ("0", "1"), [1, 0]),
        (["-1.0", "1", "-0.0", "+1"], ("-1", "0", "1"), [0, 2, 1, 2]),
        (["0", "0.0", "other", "1"], ("0", "0.0", "1", "other"), [0, 1, 3, 2]),
        (["01", "1", "02", "1"], ("01", "1", "02"), [0, 1, 2, 1]),  # Codes, such as postcodes.
        (["1.5", "1.50", "2", "2.0"], ("1.5", "2"), [0, 0, 1, 1]),
        (["True", "False", "False", "True"], ("False", "True"), [1, 0, 0, 1]),
    ],
)
def test_equal_numbers_are_one_class_if_the_whole_column_is_numeric(
    tmp_path, kind, written, names, ids
):
    path = write(tmp_path / f"train.{kind}", text=["x"] * len(written), label=written)
    assert ids_of(path) == (names, ids)


KINDS = {
    "integers": [0, 1, 2, 1],
    "floats": [0.0, 1.0, 2.0, 1.0],
    "texts": ["0", "1", "2", "1"],
    "decimals": ["0.0", "1.00", "2.", "1e0"],
}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("train", KINDS)
@pytest.mark.parametrize("dev", KINDS)
def test_numbers_of_train_and_dev_match_however_they_are_written(tmp_path, train, dev, suffix):
    """A null makes pandas write integers as floats, often in one of the two files only."""
    paths = {
        name: write(tmp_path / f"{name}.{suffix}", text=list("wxyz"), label=KINDS[kind])
        for name, kind in (("train", train), ("dev", dev))
    }
    task = files.task(**paths)
    assert task.read("dev")["dev"].labels.tolist() == [0, 1, 2, 1]
    assert task.read("train")["train"].labels.tolist() == [0, 1, 2, 1]


def test_a_column_of_decimal128_is_read(tmp_path):
    values = [decimal.Decimal("1.00"), decimal.Decimal("0.00")]
    path = write(tmp_path / "train.parquet", text=["x", "y"], label=values)
    assert ids_of(path) == (("0", "1"), [1, 0])


def test_equal_numbers_that_are_merged_are_said_once(tmp_path, caplog):
    path = write(tmp_path / "train.csv", text=list("abcd"), label=["0", "1", "0.0", "1.0"])
    task = files.task(train=path)
    task.read("train")
    (message,) = caplog.messages
    assert "labels that are equal as numbers, such as 1 and 1.0, are one class" in message


@pytest.mark.parametrize(
    ("names", "label", "class_id"),
    [
        (MNLI, "CONTRADICTION", 2),
        (MNLI, " Neutral ", 1),
        (("not_entailment", "entailment"), "not-entailment", 0),
        (("not_entailment", "entailment"), "NOT ENTAILMENT", 0),
        (("Straße", "Weg"), "STRASSE", 0),
        (("caf\u00e9", "bar"), "cafe\u0301", 0),
        (("yes", "no"), "y\u00e9s", None),
        (("Yes", "yes"), "yes", 1),
        (("Yes", "yes"), "YES", None),
        (("a-b", "a_b", "c"), "a b", None),
        (("a-b", "a_b", "c"), "A_B", 1),
        (("-1", "1"), "1.0", 1),
        (("-1", "1"), "-1.0", 0),
        (("1", "01"), "01", 1),
        (("c", "c++", "c#"), "C++", 1),
        (("0.0", "1.0"), "1", 1),
    ],
)
def test_a_label_names_the_class_that_differs_least(names, label, class_id):
    assert labels.class_id_of(names)(label) == class_id


WARNINGS = [
    ({"-1": 3, "0": 30, "1": 30}, "class '-1' .3 rows. is a usual sign of a missing label"),
    ({"-": 3, "no": 30, "yes": 30}, "class '-' .3 rows. is a usual sign"),
    ({"NaN": 3, "no": 30, "yes": 30}, "class 'NaN' .3 rows. is a usual sign"),
    ({"N/A": 3, "no": 30, "yes": 30}, "class 'N/A' .3 rows. is a usual sign"),
    ({"No": 20, "no": 20, "yes": 20}, "'No', 'no' differ only in case or white space"),
    ({"not spam": 9, "not  spam": 9, "spam": 9}, "differ only in case or white space"),
    ({"spam": 9, "sp\u200bam": 9, "ham": 9}, "differ only in case or white space"),
    ({"not_spam": 9, "not-spam": 9, "spam": 9}, "differ only in case, white space or separators"),
    ({"0": 9, "0.0": 9, "other": 9}, "'0', '0.0' are equal as numbers"),
    ({"01": 9, "1": 9, "2": 9}, "'01', '1' are equal as numbers"),
    ({"0.5": 9, "1": 9, "1.5": 9}, "some have decimals .* did you mean files.regression=true"),
    ({f"a{i}": 1 for i in range(23)}, "nearly as many classes as rows .23 classes, 23 rows"),
    ({"a": 30, "b": 30, "c": 1, "d": 1}, "2 of 4 classes have fewer than two .* c, d"),
    ({"a": 30, "b": 30, "c": 0}, "1 of 3 classes have fewer than two training rows: c"),
    ({"a": 970, "b": 30}, "class 'a' has 97.0% of the rows"),
]


@pytest.mark.parametrize(("counts", "message"), WARNINGS)
def test_a_likely_mistake_is_one_sentence(counts, message):
    (sentence,) = labels.warnings(counts)
    assert re.search(message, sentence) and "\n" not in sentence


@pytest.mark.parametrize(
    "counts",
    [
        {"no": 30, "yes": 30},
        {"0": 30, "1": 30},
        {str(stars): 10 for stars in range(1, 6)},
        {"unknown": 30, "known": 30},
        {"c": 9, "c++": 9, "c#": 9},
        {"1-2": 9, "1": 9, "2": 9},
    ],
)
def test_usual_classes_have_no_warning(counts):
    assert labels.warnings(counts) == []


def test_the_text_of_many_classes_is_short():
    text = labels.counts_text({f"intent {number}": 2 for number in range(1000)})
    assert text.startswith("intent 0 2, intent 1 2, ") and text.endswith(" and 980 more")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("b,a", ("b", "a")),
        (" b , a ", ("b", "a")),
        ('"x, y",z', ("x, y", "z")),
        ("only", None),
        ("a,,b", None),
        ("a,a", None),
        ('"a,b', None),
    ],
)
def test_the_names_in_the_configuration_are_separated_by_commas(text, names):
    if names:
        assert labels.parse_names(text) == names
    else:
        with pytest.raises(InputError, match="config.label_names is"):
            labels.parse_names(text)


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """GLUE's MNLI and MRPC in their TSV format."""
    folder = tmp_path_factory.mktemp("glue")
    for name, spelled in (("train", MNLI), ("dev_matched", MNLI), ("dev_mismatched", MNLI)):
        lines = [f"{i}\tpremise {i}\thypothesis\t{label}" for i, label in enumerate(spelled)]
        _tsv(folder / "MNLI", name, ["index\tsentence1\tsentence2\tgold_label", *lines])
    for name in ("train", "dev"):
        lines = [f"{label}\t1\t2\tfirst\tsecond" for label in (1, 0, 1)]
        header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        _tsv(folder / "MRPC", name, [header, *lines])
    return folder


def _tsv(folder, name, lines):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


def config(glue, task="mnli", label_names=""):
    return DataConfig(task=task, data_dir=str(glue), label_names=label_names)


@pytest.mark.parametrize(
    ("classifier", "ids"),
    [
        (("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), [2, 1, 0]),
        (("Neutral", "Contradiction", "Entailment"), [2, 0, 1]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2]),
        (("0", "1", "2"), [0, 1, 2]),
        ((), [0, 1, 2]),
    ],
)
def test_the_labels_of_glue_get_the_class_ids_of_the_classifier(glue, classifier, ids):
    task = load_task(config(glue), classifier)
    for split in ("train", "dev"):
        for part in task.read(split).values():
            assert part.labels.tolist() == ids and part.labels.dtype == np.int32
    spelled = [task.submission_labels[class_id] for class_id in ids]
    assert spelled == list(MNLI), "a submission keeps GLUE's spelling"
    if classifier and classifier[0][0] in "CN":
        assert task.label_names == classifier


def test_a_field_states_the_order_of_a_classifier_without_names(glue):
    stated = config(glue, label_names="contradiction,entailment,neutral")
    task = load_task(stated, ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert task.read("dev")["dev_matched"].labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("label_names", "classifier", "message"),
    [
        ("", ("yes", "maybe", "no"), "the classes yes, maybe, no in this order.* entailment, neu"),
        ("a,b,c", (), "config.label_names is a, b, c, but the classes of task mnli are entail"),
        ("entailment,neutral", (), "the classes of task mnli are entailment, neutral, contra"),
        (
            "entailment,neutral,contradiction",
            ("neutral", "entailment", "contradiction"),
            "label_names is entail.* in the order neutral, entailment, contra",
        ),
    ],
)
def test_classes_that_do_not_match_are_refused_with_both_orders(
    glue, label_names, classifier, message
):
    with pytest.raises(InputError, match=message):
        load_task(config(glue, label_names=label_names), classifier)


def test_a_stated_order_renames_the_classes_of_a_classifier(glue):
    stated = config(glue, label_names="contradiction,neutral,entailment")
    task = load_task(stated, ("no", "maybe", "yes"))
    assert task.read("dev")["dev_matched"].labels.tolist() == [2, 1, 0]


def test_regression_has_no_class_names(glue):
    with pytest.raises(InputError, match="config.label_names is for classification"):
        load_task(config(glue, "stsb", "a,b"))
    with pytest.raises(InputError, match="config.label_names is for classification"):
        load_task(DataConfig("files", files=FilesConfig(regression=True), label_names="a,b"))


@pytest.mark.parametrize(
    "order", [("not_equivalent", "equivalent"), ("EQUIVALENT", "NOT EQUIVALENT")]
)
def test_f1_is_that_of_the_same_class_in_every_order(glue, order):
    task = load_task(config(glue, "mrpc"), order)
    class_ids = task.read("dev")["dev"].labels
    predicted = ["equivalent", "equivalent", "not_equivalent"]
    columns = [name.lower().replace(" ", "_") for name in order]
    logits = np.array([[float(name == column) for column in columns] for name in predicted])
    values = metrics.compute(
        task.metrics, logits.astype(np.float32), class_ids, task.positive_class
    )
    spelled = ["equivalent", "not_equivalent", "equivalent"]
    assert values["f1"] == sk.f1_score(spelled, predicted, pos_label="equivalent")
    assert values["accuracy"] == sk.accuracy_score(spelled, predicted)


def files_config(folder, **values):
    return DataConfig("files", str(folder), FilesConfig(train="train.csv", dev="dev.csv"), **values)


@pytest.mark.parametrize(
    ("written", "classifier", "is_new_head", "names"),
    [
        (["no", "yes"], ("YES", "NO"), True, ("YES", "NO")),
        (["no", "yes"], ("YES", "NO"), False, ("YES", "NO")),
        (["no", "yes"], ("maybe", "YES", "NO"), True, ("maybe", "YES", "NO")),
        (["no", "yes"], ("LABEL_0", "LABEL_1"), True, ("no", "yes")),
        (["no", "yes"], ("LABEL_0", "LABEL_1"), False, ("no", "yes")),
        (["no", "yes"], ("spam", "ham"), True, ("no", "yes")),
        (["0", "2"], ("LABEL_0", "LABEL_1", "LABEL_2"), False, ("0", "1", "2")),
        (["1", "2"], ("LABEL_0", "LABEL_1"), False, ("1", "2")),
        (["LABEL_1", "LABEL_0"], ("LABEL_0", "LABEL_1"), False, ("LABEL_0", "LABEL_1")),
        (["1.0", "0.0"], ("0", "1"), False, ("0", "1")),
    ],
)
def test_the_labels_of_files_get_the_class_ids_of_the_classifier(
    tmp_path, written, classifier, is_new_head, names
):
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.csv", text=["x", "y"], label=written)
    task = load_task(files_config(tmp_path), classifier, is_new_head=is_new_head)
    assert task.label_names == names
    folded = [name.casefold() for name in names]
    expected = [folded.index(label.removesuffix(".0").casefold()) for label in written]
    assert task.read("dev")["dev"].labels.tolist() == expected


def test_the_order_of_the_users_files_can_be_stated(tmp_path):
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.csv", text=["x", "y"], label=["no", "yes"])
    stated = files_config(tmp_path, label_names="Yes,No")
    task = load_task(stated, ("LABEL_0", "LABEL_1"))
    assert task.read("dev")["dev"].labels.tolist() == [1, 0]
    assert task.positive_class == 0, "F1 is that of Yes, as it is without the stated order"
    wrong = files_config(tmp_path, label_names="maybe,no")
    with pytest.raises(InputError, match="line 3: label 'yes' is not one of maybe, no"):
        load_task(wrong, ("LABEL_0", "LABEL_1")).read("dev")


def test_perturbed_texts_get_the_class_ids_of_the_classifier(glue, tmp_path):
    task = load_task(config(glue), ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    records = [
        {
            "premise": "p",
            "hypothesis": "h",
            "original_premise": "q",
            "original_hypothesis": "h",
            "label": label,
        }
        for label in (0, 1, 2)
    ]
    path = tmp_path / "dev_ann.json"
    path.write_text(json.dumps({"mnli": records}))
    assert read_pairs(str(path), task).original.labels.tolist() == [2, 1, 0]
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ["original", "perturbed", "original_pair", "perturbed_pair", "label"]
        writer.writerow(columns)
        writer.writerows([["a", "b", "c", "d", name] for name in MNLI])
    assert read_pairs(str(path), task).original.labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["label_1", "LABEL_0"], ("LABEL_0", "LABEL_1")),
        (["1", "1"], ("0", "1")),
        (["yes", "no"], None),
        (["0", "2"], None),
    ],
)
def test_without_training_file_the_labels_are_those_of_the_classifier(cells, expected, tmp_path):
    """Names that are not the classifier's would get class ids in an arbitrary order."""
    dev = tmp_path / "dev.csv"
    dev.write_text("text,label\n" + "".join(f"good,{cell}\n" for cell in cells))
    options = dict(dev=str(dev), classifier=("LABEL_0", "LABEL_1"))
    if expected is None:
        with pytest.raises(InputError, match="the class names are unknown: give the train file"):
            files.task(**options)
    else:
        task = files.task(**options)
        assert task.label_names == expected
        assert task.read("dev")["dev"].labels.tolist() == [1, int(cells[1][-1])]
