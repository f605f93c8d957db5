"""Pairs of original and perturbed texts: tables, AdvGLUE's file, invalid files, evaluation."""

import json
import shutil

import numpy as np
import pytest

from evaluated import finished_run, options
from pabee_jax import EarlyExitClassifier, InputError
from pabee_jax.commands.evaluate import evaluate
from pabee_jax.data.perturbed import read_pairs
from pabee_jax.data.task import Task

SST2 = Task("sst2", ("negative", "positive"), ("accuracy",), lambda split: {}, ("0", "1"))
MNLI = Task("mnli", ("entailment", "neutral", "contradiction"), ("accuracy",), lambda split: {})
MRPC = Task("mrpc", ("not_equivalent", "equivalent"), ("accuracy",), lambda split: {}, ("0", "1"))
STSB = Task("stsb", (), ("pearson",), lambda split: {})


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_table_of_single_texts_with_class_names(tmp_path):
    text = "original\tperturbed\tlabel\na film\ta f1lm\tpositive\nbad\tb4d\tnegative\n"
    pairs = read_pairs(write(tmp_path / "pairs.tsv", text), SST2)
    assert pairs.original.texts == ["a film", "bad"] and pairs.original.pairs is None
    assert pairs.perturbed.texts == ["a f1lm", "b4d"]
    assert pairs.original.labels.tolist() == pairs.perturbed.labels.tolist() == [1, 0]


def test_json_lines_of_two_texts_with_the_labels_of_glues_files(tmp_path):
    rows = [
        {"original": "a", "original_pair": "b", "perturbed": "c", "perturbed_pair": "d", "label": 1}
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("pairs.jsonl", "pairs.json"):
        pairs = read_pairs(write(tmp_path / name, lines), MRPC)
        assert (pairs.original.texts, pairs.original.pairs) == (["a"], ["b"])
        assert (pairs.perturbed.texts, pairs.perturbed.pairs) == (["c"], ["d"])
        assert pairs.original.labels.tolist() == [1]


def test_advglue_file_is_read_without_conversion(tmp_path):
    content = {
        "sst2": [
            {"idx": 7, "label": 0, "sentence": "b4d", "original_sentence": "bad", "method": "x"}
        ],
        "mnli": [
            {
                "idx": 0,
                "label": 2,
                "premise": "p",
                "hypothesis": "h2",
                "original_hypothesis": "h",
                "method": "x",
            }
        ],
        "mnli-mm": [
            {"idx": 0, "label": 1, "premise": "q2", "hypothesis": "i", "original_premise": "q"}
        ],
    }
    path = write(tmp_path / "dev_ann.json", json.dumps(content))
    single = read_pairs(path, SST2)
    assert (single.original.texts, single.perturbed.texts) == (["bad"], ["b4d"])
    assert single.original.ids == ["sst2 7"]
    double = read_pairs(path, MNLI)
    # If only one text of a pair was attacked, the other text is the same in both versions.
    assert (double.original.texts, double.original.pairs) == (["p", "q"], ["h", "i"])
    assert (double.perturbed.texts, double.perturbed.pairs) == (["p", "q2"], ["h2", "i"])
    assert double.original.labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        (STSB, "x.tsv", "original", "needs a classification task; stsb is a regression task"),
        (SST2, "x.tsv", "original\tlabel\na\t1\n", "has no column 'perturbed'"),
        (SST2, "x.tsv", "original\tperturbed\tlabel\na\t\t1\n", "line 2: .*'perturbed' is empty"),
        (SST2, "x.csv", "original,perturbed,label\na,b,\n", "the label in column 'label' is empty"),
        (SST2, "x.tsv", "original\tperturbed\tlabel\na\tb\t2\n", "label '2' is not one of"),
        (SST2, "x.tsv", "original\tperturbed\tlabel\na\tb\n", "2 cells where the header has 3"),
        (MRPC, "x.tsv", "original\tperturbed\tlabel\na\tb\t1\n", "no column 'original_pair'"),
        (
            SST2,
            "x.tsv",
            "original\toriginal_pair\tperturbed\tlabel\na\tb\tc\t1\n",
            "no column 'perturbed_pair': pairs of texts need both columns",
        ),
        (SST2, "x.json", '{"sst2": [', "malformed JSON"),
        (
            SST2,
            "x.json",
            '{"qqp": [1], "sst2": []}',
            "has no rows of task sst2; it has rows of qqp",
        ),
        (SST2, "x.json", '{"sst2": [1]}', "sst2, row 0: not a JSON object"),
        (SST2, "x.json", '{"sst2": [{"label": 1}]}', "row 0: there is no text 'sentence'"),
        (
            SST2,
            "x.json",
            '{"sst2": [{"label": 1, "sentence": "a"}]}',
            "there is no original text; AdvGLUE's dev_ann.json has the original texts",
        ),
        (
            SST2,
            "x.json",
            '{"sst2": [{"label": 5, "sentence": "a", "original_sentence": "b"}]}',
            "label 5 is not from 0 to 1",
        ),
        (
            SST2,
            "x.json",
            r'{"sst2": [{"label": 1, "sentence": "\ud800", "original_sentence": "b"}]}',
            "row 0: the text 'sentence' holds an incomplete Unicode escape",
        ),
        (
            MRPC,
            "x.json",
            '{"mrpc": [{"label": 1, "sentence1": "a", "sentence2": "b", "original_sentence1": "c", '
            '"original_sentence2": 5}]}',
            "row 0: the original text 5 is no valid text",
        ),
        (SST2, "x.json", "[" * 9999, "malformed JSON"),
        (SST2, "x.txt", "", "none of the known extensions"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, task, name, text, message):
    with pytest.raises(InputError, match=message):
        read_pairs(write(tmp_path / name, text), task)


@pytest.mark.slow
def test_every_setting_is_evaluated_on_original_and_perturbed_texts(tmp_path, capsys):
    run = finished_run(tmp_path / "source")
    lines = [json.loads(line) for line in (run.parent / "dev.jsonl").read_text().splitlines()]
    # The words in reverse order stand for a perturbation.
    perturbed = [" ".join(reversed(line["text"].split())) for line in lines]
    rows = [
        {"original": line["text"], "perturbed": text, "label": line["label"]}
        for line, text in zip(lines, perturbed, strict=True)
    ]
    path = write(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    evaluate(options(run, perturbed=path, output=str(tmp_path / "out")), None)
    records = json.loads((tmp_path / "out" / "perturbed.json").read_text())["rows"]
    labels = np.array([("no", "yes").index(line["label"]) for line in lines])
    classifier = EarlyExitClassifier.from_pretrained(str(run), driver="loop")
    for record in records:
        name, patience = record["setting"].split()
        assert name == "patience"
        classifier.criterion = type(classifier.criterion)(int(patience))
        before, after = (
            classifier.predict(texts) for texts in ([line["text"] for line in lines], perturbed)
        )
        correct = before.labels == labels
        assert record["accuracy_original"] == pytest.approx(correct.mean())
        assert record["accuracy_perturbed"] == pytest.approx((after.labels == labels).mean())
        misled = (correct & (after.labels != labels)).sum() / correct.sum()
        assert record["misled"] == pytest.approx(misled)
        assert record["mean_exit_layer_perturbed"] == pytest.approx(after.exit_layers.mean())
    assert f"{path}: {len(rows)} pairs" in capsys.readouterr().out
    assert (tmp_path / "out" / "perturbed.csv").is_file()
    shutil.rmtree(run.parent)
