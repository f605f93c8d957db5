"""Random damage to files and arguments: an `InputError` of one line, or a right answer.

Every other exception is a failure. The examples are derandomized, so a failure repeats.
"""

import csv
import io
import json
import shutil
from typing import NamedTuple

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import load

from helpers import tiny_checkpoint
from pabee_jax.checkpoints.names import to_tensors
from pabee_jax.checkpoints.pretrained import load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.criteria import Patience
from pabee_jax.data import files
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.tokenization import encode, load_tokenizer
from pabee_jax.drivers.replay import replay
from pabee_jax.errors import InputError
from pabee_jax.inference.artifact import Artifact
from pabee_jax.inference.inputs import checked_texts, checked_tokens

# Examples per target: in every run of the suite, and with `-m slow` (about 17,000 in total, because
# the target "logits" has only 980 different examples).
FEW, MANY = 25, 2000


class Refused(NamedTuple):
    message: str


def attempt(call):
    """Return the result of `call`, or its InputError, which must be one short line."""
    try:
        return call()
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000
        message.encode()  # A message with half a surrogate pair could not be printed.
        return Refused(message)


any_text = st.text(st.characters(), max_size=5)  # With surrogates and control characters.
odd_numbers = st.sampled_from(
    [-1, 0, 1, 2, 16, 10**30, -(10**400), 1e30, -0.0, 0.5, 1.0, float("nan"), float("inf"), 2**31]
)
scalars = st.one_of(odd_numbers, st.none(), st.booleans(), any_text, st.integers(), st.floats())
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab01"), inner, max_size=2)
    ),
    max_leaves=5,
)

SNIPPETS = [
    *(b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b'"', b"\t", b",", b"\n", b"\r", b"\r\n"),
    *(b"\\ud800", b"9" * 5000, b"[1, 2]", b'{"a": 1}', b"NaN", b"null", b"1e999", b"[" * 3000),
    *(b'"text": 3, ', b"text", b"x" * 200_000, b" ", b"\xed\xa0\x80", b"\xff" * 8, b"\x7f"),
]
mutation = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "flip", "cut", "repeat"]),
    st.floats(0, 1),
    st.one_of(st.sampled_from(SNIPPETS), st.binary(min_size=1, max_size=8)),
)
mutations = st.lists(mutation, min_size=1, max_size=3)


def damaged(content: bytes, changes) -> bytes:
    for kind, position, snippet in changes:
        start = int(position * len(content))
        end = start + len(snippet)
        bit = bytes([content[start] ^ (1 << snippet[0] % 8)]) if start < len(content) else b""
        content = {
            "replace": content[:start] + snippet + content[end:],
            "insert": content[:start] + snippet + content[start:],
            "delete": content[:start] + content[end:],
            "flip": content[:start] + bit + content[start + 1 :],
            "cut": content[:start],
            "repeat": content[:end] + content[start:],
        }[kind]
    return content


# Files of examples.


def table_bytes(kind: str, rows) -> bytes:
    """Return a file with the columns "text" and "label", written by another library."""
    if kind == "parquet":
        buffer = io.BytesIO()
        texts, labels = zip(*rows, strict=True)
        parquet.write_table(pyarrow.table({"text": texts, "label": labels}), buffer)
        return buffer.getvalue()
    if kind == "jsonl":
        records = [dict(zip(("text", "label"), row, strict=True)) for row in rows]
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    text = io.StringIO(newline="")
    delimiter = "," if kind == "csv" else "\t"
    csv.writer(text, delimiter=delimiter).writerows([("text", "label"), *rows])
    return text.getvalue().encode(errors="surrogatepass")


ROWS = [
    ("a good film", "yes"),
    ('"quoted", caf\u00e9', "no"),
    ("", "yes"),
    ("two\u2028lines", "no"),
]


def check_examples(result):
    if isinstance(result, Refused):
        return
    assert len(result.texts) == len(result.labels) > 0
    assert all(isinstance(text, str) and text.encode() is not None for text in result.texts)
    assert np.isfinite(result.labels).all()


def read_examples(path, regression=False):
    return attempt(
        lambda: files.task(train=str(path), regression=regression).read("train")["train"]
    )


def damaged_table(folder, kind, changes, encoding, regression):
    content = table_bytes(kind, [(t, i) for i, (t, _) in enumerate(ROWS)] if regression else ROWS)
    if encoding and kind != "parquet":
        content = content.decode().encode(encoding, errors="replace")
    path = folder / f"damaged.{kind}"
    path.write_bytes(damaged(content, changes))
    check_examples(read_examples(path, regression))


def table_of_odd_values(folder, kind, rows, regression):
    """Cells of every type: those of a valid file must be read as they were written."""
    path = folder / f"odd.{kind}"
    try:
        path.write_bytes(table_bytes(kind, rows))
    except (pyarrow.ArrowException, ValueError, OverflowError, csv.Error):
        return  # The writer refuses these values.
    result = read_examples(path, regression)
    check_examples(result)
    texts = [text for text, _ in rows]
    # CSV has strings only, and csv.writer does not write the TSV that has no quotation marks.
    is_lossless = kind != "tsv" and all(isinstance(text, str) for text in texts)
    if is_lossless and not isinstance(result, Refused):
        assert result.texts == texts


# Checkpoints.

CONFIG_FIELDS = [
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "initializer_range", "hidden_act", "model_type"),
    *("early_exit", "id2label", "label2id", "problem_type", "num_labels", "exit_pooling"),
    *("exit_pooler", "position_embedding_type", "pad_token_id", "architectures", "embedding_size"),
]
criteria_values = st.fixed_dictionaries(
    {"criterion": st.sampled_from(["patience", "entropy", "vote", "patient_confidence"]) | scalars},
    optional={name: json_values for name in ("patience", "threshold", "votes", "odd")},
)
config_changes = st.dictionaries(
    st.sampled_from(CONFIG_FIELDS), json_values | criteria_values, min_size=1, max_size=3
)


def damaged_config(folder, changes):
    original = json.loads((folder / "checkpoint" / "config.json").read_text())
    directory = folder / "config"
    (directory / "config.json").write_text(json.dumps({**original, **changes}))
    result = attempt(lambda: load_pretrained(str(directory)))
    if isinstance(result, Refused):
        return
    weights = load((directory / "model.safetensors").read_bytes())
    loaded = to_tensors(result.model)
    assert weights.keys() == loaded.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(loaded[name], tensor)
    assert len(result.label_names) == 2 and all(isinstance(n, str) for n in result.label_names)
    assert 0 < result.model.config.layer_norm_eps < 1


def damaged_weights(folder, changes):
    content = (folder / "checkpoint" / "model.safetensors").read_bytes()
    path = folder / "weights" / "model.safetensors"
    path.write_bytes(damaged(content, changes))
    result = attempt(lambda: load_pretrained(str(path.parent)))
    if not isinstance(result, Refused):
        assert all(np.isfinite(tensor).all() for tensor in to_tensors(result.model).values())


def damaged_tokenizer(folder, changes, settings_changes):
    directory = folder / "tokenizer"
    vocabulary = (folder / "checkpoint" / "vocab.txt").read_bytes()
    (directory / "vocab.txt").write_bytes(damaged(vocabulary, changes) if changes else vocabulary)
    values = {"tokenizer_class": "BertTokenizer", **settings_changes}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))

    def encoded():
        return encode(load_tokenizer(directory), ["film good film", ""], None, 8)

    result = attempt(encoded)
    if not isinstance(result, Refused):
        lengths = result.attention_mask.sum(axis=1)
        expected = np.arange(result.attention_mask.shape[1]) < lengths[:, None]
        np.testing.assert_array_equal(result.attention_mask, expected)
        assert (lengths > 0).all() and result.input_ids.min() >= 0


tokenizer_settings = st.dictionaries(
    st.sampled_from(["padding_side", "truncation_side", "pad_token", "unk_token", "cls_token"])
    | st.sampled_from(["model_max_length", "do_lower_case", "tokenizer_class", "extra"]),
    json_values | st.sampled_from(["left", "right", "film", "[PAD]"]),
    max_size=2,
)

ARTIFACT = Artifact(
    platforms=("cpu",),
    sequence_length=8,
    dtype="float32",
    vocab_size=9,
    type_vocab_size=2,
    max_position_embeddings=8,
    num_labels=2,
    num_layers=2,
    label_names=("no", "yes"),
    criterion=Patience(1),
    trained_exits="all",
    jax_version="0.10",
    sha256={},
)


def damaged_artifact(folder, changes):
    (folder / "artifact.json").write_bytes(damaged(ARTIFACT.to_json().encode(), changes))
    result = attempt(lambda: Artifact.read(folder))
    assert isinstance(result, Refused) or result == ARTIFACT


# Arguments of `predict` and `replay`.

odd_objects = st.sampled_from([b"text", bytearray(b"t"), ("a", "b"), object(), {"a"}, 1j, np.str_])
inputs = st.recursive(
    st.one_of(scalars, odd_objects),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(any_text, inner, max_size=2)
    ),
    max_leaves=6,
)


def texts_of_predict(folder, values):
    del folder
    result = attempt(lambda: checked_texts(values))
    if not isinstance(result, Refused):
        expected = [(value, None) if isinstance(value, str) else tuple(value) for value in values]
        assert list(zip(*result, strict=True)) == expected


token_arrays = st.one_of(
    st.lists(st.lists(st.integers(-1, 9), max_size=3), max_size=3),
    st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=1, max_size=2),
    st.tuples(
        st.sampled_from([(2, 2), (0, 2), (2, 0), (2,), (), (1, 2, 2), (2, 9)]),
        st.sampled_from(["i4", "u8", "i1", "?", "f4", "O", "U1", "c8", "M8[s]"]),
    ).map(lambda drawn: np.ones(*drawn) if drawn[1] != "M8[s]" else np.zeros(*drawn)),
    json_values,
)
token_inputs = st.dictionaries(
    st.sampled_from(["input_ids", "attention_mask", "token_type_ids", "attention_masks"])
    | scalars.filter(lambda value: value == value),
    token_arrays,
    max_size=4,
)


def tokens_of_predict(folder, values, as_dataset):
    del folder
    names = ("input_ids", "attention_mask", "token_type_ids")
    if as_dataset:
        values = Dataset(*(values.get(name, [[1, 1]]) for name in names))
    result = attempt(lambda: checked_tokens(values, ARTIFACT))
    if isinstance(result, Refused):
        return
    for name in names:
        given_values = getattr(values, name, None) if as_dataset else values.get(name)
        if given_values is not None:
            np.testing.assert_array_equal(getattr(result, name), np.asarray(given_values))
    assert result.input_ids.max() < 9 and result.input_ids.min() >= 0


shapes = st.sampled_from([(2, 2, 2), (3, 1, 2), (2, 2, 1), (0, 2, 2), (2, 2), (2, 0, 2), ()])


def logits_of_replay(folder, shape, dtype, value, patience):
    del folder
    with np.errstate(over="ignore"):
        logits = np.full(shape, value if dtype.startswith("f") else 1).astype(dtype)
    result = attempt(lambda: replay(Patience(patience), logits))
    if not isinstance(result, Refused):
        # All exits agree. For regression, the threshold of 0 allows no agreement.
        layers, rows, classes = shape
        expected = layers
        if patience and classes > 1:
            expected = min(layers, patience + 1)
        assert result[0].tolist() == [expected] * rows


pairs = st.tuples(any_text, any_text | st.none())
kinds = st.sampled_from(["csv", "tsv", "jsonl", "parquet"])
cells = st.one_of(st.just("text"), any_text, json_values)
TARGETS = {
    "damaged table": (
        damaged_table,
        dict(
            kind=kinds,
            changes=mutations,
            encoding=st.sampled_from(["", "", "", "utf-8-sig", "utf-16", "latin-1"]),
            regression=st.booleans(),
        ),
    ),
    "odd values": (
        table_of_odd_values,
        dict(
            kind=kinds,
            rows=st.lists(st.tuples(cells | any_text, cells), min_size=1, max_size=3),
            regression=st.booleans(),
        ),
    ),
    "config": (damaged_config, dict(changes=config_changes)),
    "weights": (damaged_weights, dict(changes=mutations)),
    "tokenizer": (
        damaged_tokenizer,
        dict(changes=st.just([]) | mutations, settings_changes=tokenizer_settings),
    ),
    "artifact": (damaged_artifact, dict(changes=mutations)),
    "texts": (texts_of_predict, dict(values=inputs | st.lists(any_text | pairs, max_size=3))),
    "tokens": (tokens_of_predict, dict(values=token_inputs, as_dataset=st.booleans())),
    "logits": (
        logits_of_replay,
        dict(
            shape=shapes,
            dtype=st.sampled_from(["f4", "f8", "f2", "i8", "?", "U1", "c8"]),
            value=st.sampled_from([0.5, float("nan"), float("inf"), 1e39]),
            patience=st.integers(0, 4),
        ),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished checkpoint of two classes, and copies to damage."""
    folder = tmp_path_factory.mktemp("fuzz")
    plain = tiny_checkpoint(folder / "plain", ["film", "good"])
    save_pretrained(load_pretrained(str(plain), num_labels=2), folder / "checkpoint")
    shutil.copytree(folder / "checkpoint", folder / "config")
    shutil.copytree(folder / "checkpoint", folder / "weights")
    (folder / "tokenizer").mkdir()
    return folder


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_gives_an_input_error_or_a_right_answer(folder, target, examples):
    run, arguments = TARGETS[target]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**arguments)
    def check(**values):
        run(folder, **values)

    check()
