"""`EarlyExitClassifier`: tokenizer + model + criterion + driver, from texts to predictions."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from pabee_jax import parallel
from pabee_jax.criteria import ExitCriterion, Patience, as_arrays, warn
from pabee_jax.data.batching import assemble, length_grouped, sequence_buckets
from pabee_jax.data.inputs import Text, Tokens, checked_texts, checked_tokens
from pabee_jax.data.tokenization import Dataset
from pabee_jax.drivers.full import all_exit_logits
from pabee_jax.drivers.loop import early_exit
from pabee_jax.drivers.replay import replay
from pabee_jax.errors import InputError
from pabee_jax.evaluation.metrics import predictions_of
from pabee_jax.model import EarlyExitModel, in_compute_dtype, merge, split
from pabee_jax.pretrained import Pretrained, load_pretrained, save_pretrained

DRIVERS = ("auto", "full", "loop")
DEFAULT_BATCH_SIZE = 32
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_BATCHES_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Answers in the order of the inputs.

    Attributes:
        labels: (N,) int class ids, or float32 scores for regression.
        logits: (N, C) float32, of the exit at which each row left.
        exit_layers: (N,) int, from 1.
        label_names: class names by class id; empty for regression.
    """

    labels: Shaped[np.ndarray, " rows"]
    logits: Float[np.ndarray, "rows classes"]
    exit_layers: Int[np.ndarray, " rows"]
    label_names: tuple[str, ...]


class EarlyExitClassifier:
    """A BERT or ALBERT classifier whose rows leave as soon as the criterion allows.

    Attributes:
        pretrained: the checkpoint as it was read.
        driver: how the layers are run: "full" runs all and looks for the exit afterwards, "loop"
            stops a batch when its last row has left, "auto" picks the faster ("loop").
        criterion: when a row leaves. Another one of the same class needs no recompilation.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        criterion: ExitCriterion | None = None,
        driver: str = "auto",
        mesh: Mesh | None = None,
    ):
        check_driver(driver)
        self.pretrained = pretrained
        self.driver = driver
        self.criterion = criterion or pretrained.criterion or Patience(0)
        self._mesh = mesh or parallel.make_mesh(1)
        self._graph, parameters = split(in_compute_dtype(pretrained.model))
        self._parameters = parallel.replicate(parameters, self._mesh)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str,
        *,
        criterion: ExitCriterion | None = None,
        driver: str = "auto",
        dtype: str = "float32",
        mesh: Mesh | None = None,
        num_labels: int | None = None,
        seed: int = 0,
    ) -> "EarlyExitClassifier":
        """Reads a checkpoint of pabee_jax, of PyTorch PABEE, or a plain BERT or ALBERT.

        Args:
            criterion: absent, the checkpoint's own, else `Patience(0)`: no early exit.
            dtype: compute type of the encoder, "float32" or "bfloat16".
            mesh: devices over which batches are split; absent, the first device.
            num_labels: needed for a checkpoint without internal classifiers, which then start
                from `seed`.

        Raises:
            InputError: see `pabee_jax.pretrained.load_pretrained`; an unknown driver or dtype.
        """
        check_driver(driver)
        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        pretrained = load_pretrained(path_or_hub_id, num_labels=num_labels, dtype=dtype, seed=seed)
        return cls(pretrained, criterion=criterion, driver=driver, mesh=mesh)

    @property
    def criterion(self) -> ExitCriterion:
        return self._criterion

    @criterion.setter
    def criterion(self, criterion: ExitCriterion) -> None:
        config = self.pretrained.model.config
        warn(criterion, config.num_hidden_layers, config.is_regression)
        self._criterion = criterion

    @property
    def model(self) -> EarlyExitModel:
        """The model as it runs here, for `pabee_jax.early_exit` in a program of one's own."""
        return merge(self._graph, self._parameters)

    @property
    def num_layers(self) -> int:
        return self.pretrained.model.config.num_hidden_layers

    def predict(
        self, inputs: Sequence[Text] | Tokens | Dataset, batch_size: int | None = None
    ) -> Predictions:
        """Predicts texts, pairs of texts, or tokenised rows.

        Args:
            inputs: a list of texts and (text, text) pairs; or a dict of `input_ids` and optionally
                `attention_mask` and `token_type_ids`, each (N, S) int.
            batch_size: rows that run together; absent, 32.

        Raises:
            InputError: nothing to predict, or token ids that the model does not have.
        """
        dataset = self.tokenize(inputs)
        config = self.pretrained.model.config
        if self.driver == "full":
            exits, logits = replay(self.criterion, self.all_exit_logits(dataset, batch_size))
            exits, logits = np.array(exits), np.array(logits)
        else:
            exits = np.empty(len(dataset), np.int32)
            logits = np.empty((len(dataset), config.num_labels), np.float32)
            criterion = as_arrays(self.criterion)

            def run(batch):
                return _run_loop(self._graph, self._parameters, batch, criterion)

            for rows, (exit_layers, row_logits) in self._batches(dataset, batch_size, run):
                exits[rows] = exit_layers[: len(rows)]
                logits[rows] = row_logits[: len(rows)]
        return Predictions(predictions_of(logits), logits, exits, self.pretrained.label_names)

    def all_exit_logits(
        self, inputs: Sequence[Text] | Tokens | Dataset, batch_size: int | None = None
    ) -> Float[np.ndarray, "exits rows classes"]:
        """Every exit's logits in one pass: what `replay` needs for any criterion.

        Raises:
            InputError: as `predict`.
        """
        dataset = self.tokenize(inputs)
        config = self.pretrained.model.config
        shape = (config.num_hidden_layers, len(dataset), config.num_labels)
        result = np.empty(shape, np.float32)

        def run(batch):
            return _run_full(self._graph, self._parameters, batch)

        for rows, logits in self._batches(dataset, batch_size, run, same_shape=True):
            result[:, rows] = logits[:, : len(rows)]
        return result

    def tokenize(self, inputs: Sequence[Text] | Tokens | Dataset) -> Dataset:
        """Checked arrays of token ids; a `Dataset` is taken as it is.

        Raises:
            InputError: as `predict`.
        """
        if isinstance(inputs, Dataset):
            return inputs
        if isinstance(inputs, Mapping):
            return checked_tokens(inputs, self.pretrained.model.config)
        texts, pairs = checked_texts(inputs)
        return self.pretrained.encode(texts, pairs)

    def warmup(self, batch_size: int | None = None) -> None:
        """Compiles every shape of the model that `predict` will use for texts with this batch size.

        (With driver "full" the replay is one more program, a small one, per number of rows.)
        """
        size = _checked_batch_size(batch_size)
        sizes = {_next_power_of_two(rows) for rows in range(1, size + 1)}
        for length in sequence_buckets(self.pretrained.max_length):
            for rows in sizes:
                ones = np.ones((rows, length), np.int32)
                self.predict(Dataset(ones, ones, 0 * ones), rows)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the checkpoint, with the criterion chosen for it."""
        chosen = dataclasses.replace(self.pretrained, criterion=self.criterion)
        save_pretrained(chosen, Path(directory))

    def _batches(
        self, dataset: Dataset, batch_size: int | None, run: Callable, same_shape: bool = False
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Runs every batch and yields (row indices, results on the host, padding rows included).

        A few batches are dispatched ahead, so that the host prepares the next one while the
        device works. Rows round up to a power of two, which bounds the shapes to compile; with
        `same_shape` all batches of a bucket have one shape.
        """
        size = _checked_batch_size(batch_size)
        devices = self._mesh.shape[parallel.DATA]
        longest = max(self.pretrained.max_length, dataset.input_ids.shape[1])
        running = collections.deque()
        for rows, length in length_grouped(dataset.lengths, size, sequence_buckets(longest)):
            count = _next_power_of_two(min(size, len(dataset)) if same_shape else len(rows))
            count = math.ceil(count / devices) * devices
            batch = assemble(dataset, rows, count, length)
            batch = {name: batch[name] for name in MODEL_INPUTS}
            running.append((rows, run(parallel.shard_batch(batch, self._mesh))))
            if len(running) > _BATCHES_AHEAD:
                rows, result = running.popleft()
                yield rows, jax.device_get(result)
        for rows, result in running:
            yield rows, jax.device_get(result)


# The structure is static and the parameters are a plain dict: two models of one shape share their
# programs, and flattening a tree of modules, which costs milliseconds, is not part of a call.
@functools.partial(jax.jit, static_argnums=0)
def _run_full(graph, parameters, batch):
    return all_exit_logits(merge(graph, parameters), batch)


@functools.partial(jax.jit, static_argnums=0)
def _run_loop(graph, parameters, batch, criterion):
    return early_exit(merge(graph, parameters), batch, criterion)


def check_driver(driver: str) -> None:
    """Raises InputError for an unknown driver."""
    if driver not in DRIVERS:
        raise InputError(f"unknown driver {driver!r}; known are {', '.join(DRIVERS)}")


def _next_power_of_two(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


def _checked_batch_size(batch_size: int | None) -> int:
    if batch_size is None:
        return DEFAULT_BATCH_SIZE
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    return batch_size
