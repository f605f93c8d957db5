"""Rows of every length have the logits that transformers computes for them, however they are run.

`references/lengths` has, for a small random classifier of every family, the logits of a row of
every length up to 512 tokens (ModernBERT: 1,024) at every exit. A shorter table of positions gives
the same model for a smaller maximum length.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.exit_schedule import ExitSchedule
from helpers import REFERENCES
from pabee_jax import EarlyExitClassifier, FixedLayer
from pabee_jax.checkpoints.files import read_config_json, read_tensors
from pabee_jax.checkpoints.names import from_tensors
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.packing import packed
from pabee_jax.distributed import sharding
from pabee_jax.drivers.shapes import ChunkSizes, sequence_lengths
from pabee_jax.inference.engine import Engine, EngineConfig
from pabee_jax.models.config import ModelConfig

sys.path.insert(0, str(REFERENCES))
from rows import row_of_length

FOLDER = REFERENCES / "lengths"
FAMILIES = sorted(path.name for path in FOLDER.iterdir())
LONGEST = (100, 128, 200, 256, 384, 512)
TOLERANCE = 1e-4
LAYERS = 3
# Families whose table of positions starts with entries for padding.
_OFFSETS = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}


@pytest.fixture(autouse=True)
def without_old_programs(request):
    """Forget the programs of a slow test: those of all slow tests together take gigabytes."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


@functools.cache
def rows_up_to(family: str, longest: int) -> Dataset:
    """Return a row of every length: row i has i + 1 tokens."""
    rows = [row_of_length(family, length) for length in range(1, longest + 1)]
    ids, mask, types = (
        np.stack([np.pad(row[name][0], (0, longest - row[name].size)) for row in rows])
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    return Dataset(ids, mask.astype(np.int8), types.astype(np.int8))


@functools.cache
def recorded(family: str, pooling: str) -> np.ndarray:
    """Return the logits that transformers computes, (exits, lengths, classes)."""
    name = {"cls": "logits", "mean": "mean_logits"}[pooling]
    return np.load(FOLDER / family / "expected.npz")[name]


def classifier_of(
    family: str, longest: int, pooling: str = "cls", dtype: str = "float32", **options
) -> EarlyExitClassifier:
    """Return the recorded classifier, for rows of up to `longest` tokens."""
    positions = longest + _OFFSETS.get(family, 0)
    values = read_config_json(FOLDER / family)
    values = values | {"max_position_embeddings": positions, "exit_pooling": pooling}
    tensors = {
        name: tensor[:positions] if "position_embeddings" in name else tensor
        for name, tensor in read_tensors(FOLDER / family).items()
    }
    model, _ = from_tensors(tensors, ModelConfig.from_hugging_face(values, 3), dtype=dtype)
    for parameter in (model.classifiers.kernel, model.classifiers.bias):  # One head for all exits.
        parameter.set_value(jnp.broadcast_to(parameter[...][-1:], parameter.shape))
    pretrained = Pretrained(model, None, {}, ("0", "1", "2"), longest, trained_exits="all")
    return EarlyExitClassifier(pretrained, **options)


def calls(longest: int, lengths) -> list[np.ndarray]:
    """Return calls, as lists of lengths, that put every length into every kind of chunk.

    The first call has all rows, and runs in the large pool. The others are few rows, for the small
    pool: after two of the longest rows, the last row has a chunk for itself.
    """
    few = [[longest, longest, length] for length in lengths]
    few += [[length, 1, 1] for length in lengths]
    return [np.asarray(call) for call in [lengths, *few]]


def assert_logits(actual: np.ndarray, expected: np.ndarray, lengths: np.ndarray, case: str):
    """Compare the logits of rows, and name the lengths that differ."""
    difference = np.abs(actual - expected).reshape(len(lengths), -1).max(axis=1)
    wrong = lengths[difference > TOLERANCE]
    assert not len(wrong), f"{case}: rows of {wrong} tokens differ by up to {difference.max():.1e}"


def check_predict(classifier: EarlyExitClassifier, family: str, pooling: str, calls) -> None:
    """Compare rows that exit at layers 1 to 3 in turn."""
    rows, logits = rows_up_to(family, classifier.pretrained.max_length), recorded(family, pooling)
    for lengths in calls:
        exit_layers = (1 + lengths % LAYERS).astype(np.int32)
        # For as many rows in every call, so that the calls share a program.
        classifier.criterion = ExitSchedule(np.resize(exit_layers, max(len(rows), len(lengths))))
        predictions = classifier.predict(rows.take(lengths - 1))
        np.testing.assert_array_equal(predictions.exit_layers, exit_layers)
        expected = logits[exit_layers - 1, lengths - 1]
        assert_logits(predictions.logits, expected, lengths, f"{classifier} {lengths[:4]}...")


def check_every_exit(classifier: EarlyExitClassifier, family: str, pooling: str, calls) -> None:
    rows, logits = rows_up_to(family, classifier.pretrained.max_length), recorded(family, pooling)
    for lengths in calls:
        actual = classifier.all_exit_logits(rows.take(lengths - 1)).swapaxes(0, 1)
        expected = logits[:, lengths - 1].swapaxes(0, 1)
        assert_logits(actual, expected, lengths, f"{classifier} {lengths[:4]}...")


def check_engine(classifier: EarlyExitClassifier, family: str, pooling: str, lengths) -> None:
    """Compare rows that wait together, and rows that have the pool for themselves."""
    rows, logits = rows_up_to(family, classifier.pretrained.max_length), recorded(family, pooling)
    exit_layers = 1 + lengths % LAYERS

    def submitted(engine, length):
        row = rows.take(slice(length - 1, length))
        return engine.submit(row, FixedLayer(1 + int(length) % LAYERS))[0]

    with Engine(classifier, EngineConfig(max_waiting=len(lengths))) as engine:
        together = [future.result() for future in [submitted(engine, n) for n in lengths]]
        alone = [submitted(engine, length).result() for length in lengths]
        explained = engine.all_exit_logits(rows.take(lengths - 1))
    for answers in (together, alone):
        assert [answer.exit_layer for answer in answers] == exit_layers.tolist()
        actual = np.stack([answer.logits for answer in answers])
        expected = logits[exit_layers - 1, lengths - 1]
        assert_logits(actual, expected, lengths, "engine")
    actual, expected = (values.swapaxes(0, 1) for values in (explained, logits[:, lengths - 1]))
    assert_logits(actual, expected, lengths, "explanations")


def near_boundaries(longest: int) -> np.ndarray:
    """Return the lengths beside multiples of 8 that start a class, and beside powers of two."""
    steps = [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100, 120, 144, 176, 216, 264, 328, 408]
    steps += [128, 200, 256, 384, 512, 1024, longest]
    near = {length + change for length in steps for change in (-1, 0, 1)}
    return np.array(sorted(length for length in near if length <= longest))


@pytest.mark.parametrize(
    ("family", "longest", "pooling", "check"),
    [
        ("bert", 512, "mean", check_every_exit),
        ("mpnet", 200, "cls", check_predict),
    ],
)
def test_rows_at_every_boundary_equal_transformers(family, longest, pooling, check):
    """A short form of the test below. Before it, rows of 217 to 256 tokens were wrong."""
    driver = "full" if check is check_every_exit else "pool"
    classifier = shared_classifier(family, longest, pooling, driver)
    check(classifier, family, pooling, calls(longest, near_boundaries(longest)))


def test_few_rows_of_modernbert_equal_transformers():
    """Rows of up to 12 times the window of the local layers, in the small pool."""
    classifier = classifier_of("modernbert", 384, "mean", driver="full")
    few = calls(384, near_boundaries(384))[1:]
    check_every_exit(classifier, "modernbert", "mean", few)


# One family of each kind of computation at every maximum length, the others at the usual one.
_KINDS = ("bert", "roberta", "mpnet", "modernbert", "albert")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    ("family", "longest"),
    [
        *((family, longest) for family in _KINDS for longest in LONGEST),
        *((family, 512) for family in FAMILIES if family not in _KINDS),
    ],
)
def test_rows_of_every_length_equal_transformers(family, longest, pooling):
    every = calls(longest, np.arange(1, longest + 1))
    check_every_exit(classifier_of(family, longest, pooling, driver="full"), family, pooling, every)
    check_predict(classifier_of(family, longest, pooling, driver="pool"), family, pooling, every)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_rows_of_up_to_1024_tokens_equal_transformers(pooling):
    lengths = np.unique([*near_boundaries(1024), *range(1, 1025, 7)])
    for driver, check in (("full", check_every_exit), ("pool", check_predict)):
        classifier = classifier_of("modernbert", 1024, pooling, driver=driver)
        check(classifier, "modernbert", pooling, calls(1024, lengths))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_of_every_length_equal_transformers(family):
    """Few rows in `auto` and `full`, and all rows in `loop`, are padded."""
    lengths = np.arange(1, 129)
    pairs = [lengths, *lengths[:, None], *np.stack([lengths, lengths[::-1]], axis=1)]
    check_predict(classifier_of(family, 128, driver="loop"), family, "cls", pairs[:1])
    check_predict(classifier_of(family, 128, driver="auto"), family, "cls", pairs[1:])
    check_every_exit(classifier_of(family, 128, driver="full"), family, "cls", pairs[1:])


@pytest.mark.parametrize(
    ("family", "longest", "pooling"),
    [
        ("albert", 128, "cls"),
        *(
            pytest.param(family, longest, pooling, marks=pytest.mark.slow)
            for family in FAMILIES
            for longest in (100, 512)
            for pooling in ("cls", "mean")
        ),
    ],
)
def test_the_engine_answers_rows_of_every_length_as_transformers(family, longest, pooling):
    check_engine(classifier_of(family, longest, pooling), family, pooling, near_boundaries(longest))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 200), min_size=3, max_size=40), layers=st.integers(1, LAYERS)
)
def test_rows_of_any_mixed_lengths_equal_transformers(lengths, layers):
    lengths = np.asarray(lengths)
    exit_layers = np.resize(np.arange(layers) + 1, len(lengths)).astype(np.int32)
    classifier = shared_classifier("mpnet", 200, "cls", "pool")
    classifier.criterion = ExitSchedule(np.resize(exit_layers, 200))
    predictions = classifier.predict(rows_up_to("mpnet", 200).take(lengths - 1))
    np.testing.assert_array_equal(predictions.exit_layers, exit_layers)
    expected = recorded("mpnet", "cls")[exit_layers - 1, lengths - 1]
    assert_logits(predictions.logits, expected, lengths, f"rows of {lengths.tolist()}")


@functools.cache
def shared_classifier(family: str, longest: int, pooling: str, driver: str):
    """Return a classifier whose programs several tests use."""
    return classifier_of(family, longest, pooling, driver=driver)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["full", "pool"])
@pytest.mark.parametrize("devices", [1, 8])
def test_ten_thousand_rows_equal_transformers(driver, devices):
    """More rows than a pool holds, and more than a block of the tokenizer."""
    lengths = np.random.default_rng(0).integers(1, 65, 10_000)
    classifier = classifier_of("bert", 128, driver=driver, mesh=sharding.make_mesh(devices))
    check = check_every_exit if driver == "full" else check_predict
    check(classifier, "bert", "cls", [lengths])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_eight_devices_run_rows_of_every_length_as_transformers(family):
    classifier = classifier_of(family, 512, driver="pool", mesh=sharding.make_mesh(8))
    every = calls(512, np.arange(1, 513))
    check_predict(classifier, family, "cls", every[::9])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_agrees_with_transformers_at_every_length(family):
    """Rows whose two highest logits differ by more than the rounding have the same class."""
    classifier = classifier_of(family, 512, dtype="bfloat16", driver="full")
    rows, expected = rows_up_to(family, 512), recorded(family, "cls")[:, :512]
    actual = classifier.all_exit_logits(rows)
    ordered = np.sort(expected, axis=2)
    is_clear = ordered[..., -1] - ordered[..., -2] > 0.2
    assert is_clear.mean() > 0.5
    agree = (actual.argmax(axis=2) == expected.argmax(axis=2))[is_clear]
    assert agree.mean() > 0.99, f"{(~agree).sum()} of {agree.size} clear predictions differ"
    assert np.abs(actual - expected).mean() < 0.05


@pytest.mark.parametrize(
    ("family", "length"),
    [
        ("bert", 256),
        *(
            pytest.param(family, length, marks=pytest.mark.slow)
            for family in FAMILIES
            for length in (100, 512)
        ),
    ],
)
def test_an_exported_program_equals_transformers_at_every_length(family, length, tmp_path):
    pytest.importorskip("flatbuffers")
    from pabee_jax.export import export, load

    classifier = classifier_of(family, length, criterion=FixedLayer(1))
    export(classifier, tmp_path, platforms="cpu")
    program, rows = load(tmp_path), rows_up_to(family, length)
    tokens = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask}
    if classifier.config.type_vocab_size > 1:
        tokens["token_type_ids"] = rows.token_type_ids
    for layer in range(1, LAYERS + 1):
        predictions = program.predict(tokens, FixedLayer(layer), batch_size=64)
        expected = recorded(family, "cls")[layer - 1, :length]
        assert_logits(predictions.logits, expected, np.arange(1, length + 1), "exported program")


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_onnx_model_equals_transformers_at_every_length(family, pooling, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    from pabee_jax.inference.onnx_model import export_onnx

    length = 128
    classifier = classifier_of(family, length, pooling, criterion=FixedLayer(1))
    export_onnx(classifier, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    rows = rows_up_to(family, length)
    names = [value.name for value in session.get_inputs()]
    tokens = {name: rows[name].astype(np.int64) for name in names if name != "layer"}
    for layer in range(1, LAYERS + 1):
        _, logits = session.run(None, tokens | {"layer": np.int32(layer)})
        expected = recorded(family, pooling)[layer - 1, :length]
        assert_logits(logits, expected, np.arange(1, length + 1), "ONNX Runtime")


@given(
    chunk=st.integers(1, 2000),
    longest=st.integers(1, 1100),
    step=st.sampled_from([8, 16, 64]),
    growth=st.sampled_from([1.25, 2.0]),
)
def test_every_row_has_a_length_class_and_fits_into_a_block(chunk, longest, step, growth):
    lengths = sequence_lengths(longest, step, growth)
    assert lengths[-1] == longest and list(lengths) == sorted(set(lengths))
    sizes = ChunkSizes.of(chunk, longest)
    assert sizes.longest == longest <= sizes.block_tokens


def test_sizes_and_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="299 tokens cannot hold a row of 300"):
        ChunkSizes((256, 64), (8, 300), 299)
    with pytest.raises(ValueError, match="chunks must descend"):
        ChunkSizes((256, 512), (8, 100), 512)
    with pytest.raises(ValueError, match="classes must ascend"):
        ChunkSizes((512, 256), (100, 8), 512)
    rows = rows_up_to("bert", 128)
    with pytest.raises(ValueError, match="a row has 128 tokens; the program is for 100"):
        packed(rows, 1, 128, 10_000, 100)
    with pytest.raises(ValueError, match="a row of 128 tokens does not fit into 127"):
        rows.resized(127)
