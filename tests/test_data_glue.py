"""GLUE from TSV files and from the hub: same examples, and a message for every mistake.

The tests need no network. The last test needs GLUE's original files; all others invent rows.
"""

import http.server
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants

from pabee_jax.data import glue
from pabee_jax.errors import InputError

REAL = Path(__file__).parents[2] / "shared" / "glue"

# GLUE's published label names in the order of the hub's class ids, and their spelling in the TSV
# files.
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
LABELS = {
    "cola": (("unacceptable", "acceptable"), BINARY),
    "mnli": (NLI, NLI),
    "mrpc": (("not_equivalent", "equivalent"), BINARY),
    "qnli": (ENTAILMENT, ENTAILMENT),
    "qqp": (("not_duplicate", "duplicate"), BINARY),
    "rte": (ENTAILMENT, ENTAILMENT),
    "sst2": (("negative", "positive"), BINARY),
    "stsb": ((), ()),
    "wnli": (("not_entailment", "entailment"), BINARY),
}
METRICS = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
}
CLOSED_PORT = "http://127.0.0.1:9"  # Simulates a hub that cannot be reached.
FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}
# Header lines of the GLUE download, for files with labels and for test files. CoLA's files with
# labels have no header.
HEADERS = {
    "cola": ("", "index sentence"),
    "mnli": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse"
        " sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse"
        " sentence1_parse sentence2_parse sentence1 sentence2",
    ),
    "mrpc": ("Quality,#1 ID,#2 ID,#1 String,#2 String", "index,#1 ID,#2 ID,#1 String,#2 String"),
    "qnli": ("index question sentence label", "index question sentence"),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
    "rte": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
    "sst2": ("sentence label", "index sentence"),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "index genre filename year old_index source1 source2 sentence1 sentence2",
    ),
    "wnli": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
}
FIRST = {"#1 String", "sentence1", "question1", "sentence"}
SECOND = {"#2 String", "sentence2", "question2"}
LABEL = {"Quality", "label", "gold_label", "is_duplicate", "score"}


def columns(name, hidden=False):
    header = HEADERS[name][hidden]
    return header.split("," if "," in header else " ")


def cell(name, column, row, label):
    first, second = ({"question"}, {"sentence"}) if name == "qnli" else (FIRST, SECOND)
    if column in first:
        return f'the "first of {row}'  # An unpaired quotation mark: GLUE files are not quoted.
    if column in second:
        return f"second\u2028of\x85{row}"  # Unicode line separators inside a text.
    if column in LABEL:
        return label
    return str(row) if column in ("index", "id") else "-"


def write(folder, name, file, labels):
    """Write a file in GLUE's layout with one row per label; return its path."""
    hidden = file.startswith("test")
    if name == "cola" and not hidden:
        lines = [f'gj04\t{label}\t*\tthe "first of {row}' for row, label in enumerate(labels)]
    else:
        names = columns(name, hidden)
        lines = ["\t".join(names)]
        for row, label in enumerate(labels):
            lines.append("\t".join(cell(name, column, row, label) for column in names))
    byte_order_mark = "\ufeff" if name == "mrpc" else ""
    folder.mkdir(exist_ok=True)
    (folder / file).write_bytes((byte_order_mark + "\n".join(lines) + "\n").encode())
    return folder / file


def spellings(name):
    return LABELS[name][1] or ("0.000", "2.5", "5.000")


def parts(name, split):
    suffixes = ("_matched", "_mismatched") if name == "mnli" and split != "train" else ("",)
    return [split + suffix for suffix in suffixes]


def write_all(folder, name):
    for split in ("train", "dev", "test"):
        for part in parts(name, split):
            write(folder, name, f"{part}.tsv", spellings(name))


def hub_rows(name, part):
    """Return the rows of `write` as the hub stores them, in a real `datasets.Dataset`."""
    count = len(spellings(name))
    pair = {"mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence")}
    pair |= {"qqp": ("question1", "question2")}
    first, second = pair.get(name, ("sentence1", "sentence2"))
    rows = {"idx": list(range(count))}
    if name in ("cola", "sst2"):
        rows["sentence"] = [f'the "first of {row}' for row in range(count)]
    else:
        rows[first] = [f'the "first of {row}' for row in range(count)]
        rows[second] = [f"second\u2028of\x85{row}" for row in range(count)]
    if name == "stsb":
        rows["label"] = [0.0, 2.5, 5.0]
    else:
        rows["label"] = list(range(count))
    if part.startswith("test"):
        rows["label"] = [-1] * count
    dataset = datasets.Dataset.from_dict(rows)
    if LABELS[name][0]:
        dataset = dataset.cast_column("label", datasets.ClassLabel(names=list(LABELS[name][0])))
    return dataset


@pytest.fixture
def hub(monkeypatch):
    """Replace `datasets.load_dataset` by `hub_rows`; return the list of calls."""
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED_PORT)
    calls = []

    def load_dataset(path, name):
        calls.append((path, name))
        part_names = [part for split in ("train", "dev", "test") for part in parts(name, split)]
        return datasets.DatasetDict(
            {part.replace("dev", "validation"): hub_rows(name, part) for part in part_names}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", LABELS)
def test_labels_and_metrics_are_those_that_glue_publishes(name):
    task = glue.task(name)
    assert (task.label_names, task.submission_labels) == LABELS[name]
    assert task.metrics == METRICS.get(name, ("accuracy",))
    assert task.is_regression == (name == "stsb")
    assert set(glue.GLUE_TASKS) == set(LABELS)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_files_and_hub_give_the_same_examples(tmp_path, hub, name, split):
    write_all(tmp_path, name)
    from_files = glue.task(name, str(tmp_path)).read(split)
    from_hub = glue.task(name).read(split)
    assert list(from_files) == list(from_hub) == parts(name, split)
    for part, examples in from_files.items():
        hub_examples = from_hub[part]
        assert examples.texts == hub_examples.texts, "TSV files and hub give different texts"
        assert examples.pairs == hub_examples.pairs
        assert examples.ids == hub_examples.ids == ["0", "1", "2"][: len(examples)]
        if split == "test":
            for labels in (examples.labels, hub_examples.labels):
                assert labels is None, "the labels of test splits must be hidden"
            continue
        expected = [0, 2.5, 5] if name == "stsb" else list(range(len(examples)))
        for labels in (examples.labels, hub_examples.labels):
            assert labels.dtype == (np.float32 if name == "stsb" else np.int32)
            assert labels.tolist() == expected, "class ids must follow the hub's label order"


def test_a_task_loads_from_the_hub_once_when_its_first_split_is_read(hub):
    task = glue.task("mrpc")
    assert hub == []
    task.read("train"), task.read("dev")
    assert hub == [("nyu-mll/glue", "mrpc")]


def test_without_a_network_one_sentence_is_raised_within_seconds(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED_PORT)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", CLOSED_PORT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    previous = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    start = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be reached.*--config\.data_dir=DIR") as error:
        glue.task("rte").read("dev")
    assert time.monotonic() - start < 10, (
        "the hub client's retries take over 20 s: skip them if the hub cannot be reached"
    )
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "the hub client must not log its retries"
    assert previous == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_the_reason_of_a_reachable_hub_is_reported(monkeypatch, tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")

    def load_dataset(path, name):
        assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
        raise ValueError("the reason of the hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with server, pytest.raises(InputError, match=r"rte from the hub \(the reason of the hub\)"):
        glue.task("rte").read("dev")


def test_a_missing_datasets_package_is_reported_with_data_dir_as_alternative(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install datasets.*--config\.data_dir=DIR"):
        glue.task("rte").read("dev")


def test_data_dir_may_be_the_parent_of_the_tasks_folder(tmp_path):
    for name in LABELS:
        write_all(tmp_path / FOLDERS.get(name, name.upper()), name)
    for name in LABELS:
        assert len(glue.task(name, str(tmp_path)).read("train")["train"]) == len(spellings(name))


def test_only_the_requested_split_is_read(tmp_path):
    write(tmp_path, "rte", "dev.tsv", ["entailment"])
    (tmp_path / "train.tsv").write_text("not a GLUE file\n")
    assert len(glue.task("rte", str(tmp_path)).read("dev")["dev"]) == 1


def test_windows_line_ends_and_a_missing_last_line_end_are_accepted(tmp_path):
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\r\none\t1\r\ntwo\t0")
    examples = glue.task("sst2", str(tmp_path)).read("dev")["dev"]
    assert examples.texts == ["one", "two"] and examples.labels.tolist() == [1, 0]


def test_ids_are_the_index_column_of_the_file(tmp_path):
    (tmp_path / "test.tsv").write_text("index\tsentence\n17\tone\n4\ttwo\n")
    assert glue.task("cola", str(tmp_path)).read("test")["test"].ids == ["17", "4"]


def test_the_quality_column_of_an_mrpc_test_file_is_ignored(tmp_path):
    path = write(tmp_path, "mrpc", "dev.tsv", BINARY).rename(tmp_path / "test.tsv")
    examples = glue.task("mrpc", str(path.parent)).read("test")["test"]
    assert len(examples) == 2 and examples.labels is None


def test_qqp_skips_short_rows_and_logs_their_number_and_lines(tmp_path, caplog):
    path = write(tmp_path, "qqp", "train.tsv", ("0", "1", "0", "1"))
    lines = path.read_text().split("\n")
    lines[2], lines[4] = "1\t-\t-\tonly one question", ""
    path.write_text("\n".join(lines[:5] + lines[4:]) + "5\t-\t-\tone\ttwo\t1\n")
    with caplog.at_level("WARNING", logger="absl"):
        examples = glue.task("qqp", str(tmp_path)).read("train")["train"]
    assert examples.labels.tolist() == [0, 0, 1]
    (record,) = caplog.records
    assert "skipped 3 rows" in record.getMessage()
    assert "lines 3, 5, 6" in record.getMessage()


def error_of(tmp_path, name, content, split="dev"):
    """Return the message that reading a file with this content raises."""
    file = f"{split}_matched.tsv" if name == "mnli" else f"{split}.tsv"
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        glue.task(name, str(tmp_path)).read(split)
    assert file in str(error.value), "the message must name the file"
    return str(error.value)


@pytest.mark.parametrize("name", sorted(set(LABELS) - {"qqp"}))
def test_a_short_row_is_reported_with_file_and_line(tmp_path, name):
    file = write(tmp_path, name, f"{parts(name, 'dev')[0]}.tsv", spellings(name)[:2])
    content = file.read_text().removesuffix("\n").rpartition("\t")[0]
    line = 2 if name == "cola" else 3
    assert f"line {line}: fewer than" in error_of(tmp_path, name, content)


@pytest.mark.parametrize("name", sorted(LABELS))
def test_a_wrong_label_is_reported_with_its_line_and_the_valid_labels(tmp_path, name):
    valid_label = spellings(name)[0]
    file = write(tmp_path, name, f"{parts(name, 'dev')[0]}.tsv", (valid_label, "other"))
    message = error_of(tmp_path, name, file.read_bytes())
    assert f"line {2 if name == 'cola' else 3}:" in message and "'other'" in message
    valid_labels = "a number from 0 to 5" if name == "stsb" else ", ".join(spellings(name))
    assert valid_labels in message


@pytest.mark.parametrize("score", ["5.001", "-0.1", "nan", "inf", "", "1e999"])
def test_an_stsb_score_that_is_not_from_0_to_5_is_refused(tmp_path, score):
    file = write(tmp_path, "stsb", "dev.tsv", (score,))
    assert "line 2" in error_of(tmp_path, "stsb", file.read_bytes())


def test_a_file_without_rows_columns_or_utf8_is_refused(tmp_path):
    assert "is empty" in error_of(tmp_path, "cola", "")
    assert "no rows" in error_of(tmp_path, "sst2", "sentence\tlabel\n")
    assert "no rows" in error_of(tmp_path, "qqp", "\t".join(columns("qqp")) + "\nbroken\n")
    message = error_of(tmp_path, "sst2", "phrase\tlabel\none\t1\n")
    assert "'sentence'" in message and "'phrase', 'label'" in message
    assert "line 2: not UTF-8" in error_of(tmp_path, "sst2", b"sentence\tlabel\ncaf\xe9\t1\n")


def test_a_missing_file_is_reported_with_the_folders_that_were_searched(tmp_path):
    with pytest.raises(InputError, match="train.tsv") as error:
        glue.task("mrpc", str(tmp_path)).read("train")
    assert f"{tmp_path} nor in {tmp_path / 'MRPC'}" in str(error.value)
    with pytest.raises(InputError, match="no directory .*absent"):
        glue.task("mrpc", str(tmp_path / "absent"))


def test_an_unknown_task_or_split_is_reported_with_the_known_names():
    with pytest.raises(InputError, match="cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli"):
        glue.task("sst")
    with pytest.raises(InputError, match="train, dev or test"):
        glue.task("sst2").read("validation")


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("mrpc", "train", 3668),
        ("mrpc", "dev", 408),
        ("sst2", "dev", 872),
        ("stsb", "dev", 1500),
        ("cola", "dev", 1043),
        ("cola", "test", 1063),
    ],
)
def test_real_files_have_the_published_row_counts(name, split, rows):
    if not REAL.is_dir():
        pytest.skip("needs GLUE's original TSV files in shared/glue")
    examples = glue.task(name, str(REAL)).read(split)[split]
    assert len(examples) == len(set(examples.ids)) == rows
    assert all(examples.texts)
