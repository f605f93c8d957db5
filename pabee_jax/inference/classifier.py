"""`EarlyExitClassifier`: tokenizer + model + criterion + driver, from texts to predictions."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained
from pabee_jax.criteria import ExitCriterion, Patience, as_arrays, check, warn
from pabee_jax.data.batching import bucket_of, by_bucket, inference_buckets, prefetched
from pabee_jax.data.dataset import Dataset
from pabee_jax.distributed import sharding
from pabee_jax.drivers.replay import replay
from pabee_jax.drivers.shapes import next_power_of_two
from pabee_jax.errors import InputError
from pabee_jax.inference import compilation_cache as persistent_cache
from pabee_jax.inference import planning
from pabee_jax.inference.dispatch import Job, results
from pabee_jax.inference.inputs import Text, Tokens, checked_texts, checked_tokens
from pabee_jax.inference.predictions import Predictions, predictions_of
from pabee_jax.inference.programs import run_early_exit, run_full
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import in_compute_dtype, merge, split

_ROWS_PER_BLOCK = 256  # Texts that are tokenised at a time.


class _Source(NamedTuple):
    """Attributes:
    num_rows: rows in all.
    longest: no row has more tokens.
    buckets: the sequence lengths at which they run.
    blocks: the rows, a block at a time. Texts are tokenised when their block is asked for, which
        is while the device works on earlier ones.
    """

    num_rows: int
    longest: int
    buckets: tuple[int, ...]
    blocks: Iterable[Dataset]


class EarlyExitClassifier:
    """A BERT or ALBERT classifier whose rows leave as soon as the criterion allows.

    Attributes:
        pretrained: the checkpoint as it was read.
        driver: how the layers are run: "full" runs all and looks for the exit afterwards, "loop"
            stops a batch when its last row has left, "pool" computes only the rows that remain,
            "auto" takes "loop" for small batches and "pool" beyond.
        criterion: when a row leaves. Another one of the same class needs no recompilation.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        *,
        criterion: ExitCriterion | None = None,
        driver: str = "auto",
        mesh: Mesh | None = None,
        chunk_tokens: int | None = None,
    ):
        planning.check_driver(driver)
        planning.check_size("chunk_tokens", chunk_tokens)
        self.pretrained = pretrained
        self.driver = driver
        self.criterion = criterion or pretrained.criterion or Patience(0)
        self._mesh = mesh or sharding.make_mesh(1)
        self._chunk_tokens = chunk_tokens
        self._graph, parameters = split(in_compute_dtype(pretrained.model))
        self._parameters = sharding.replicate(parameters, self._mesh)

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
        chunk_tokens: int | None = None,
        compilation_cache: str | Path | None = None,
    ) -> "EarlyExitClassifier":
        """Reads a checkpoint of pabee_jax, of PyTorch PABEE, or a plain BERT or ALBERT.

        Args:
            criterion: absent, the checkpoint's own, else `Patience(0)`: no early exit.
            dtype: compute type of the encoder, "float32" or "bfloat16".
            mesh: devices over which batches are split; absent, the first device.
            num_labels: needed for a checkpoint without internal classifiers, which then start
                from `seed`.
            chunk_tokens: tokens (rows times sequence length) that run together in the `pool`
                driver; absent, a number that suits the device.
            compilation_cache: a directory that keeps compiled programs for the next process; from
                then on those of this whole process.

        Raises:
            InputError: see `pabee_jax.pretrained.load_pretrained`; an unknown driver or dtype; a
                size below 1; a cache directory that cannot be written.
        """
        planning.check_driver(driver)
        planning.check_size("chunk_tokens", chunk_tokens)
        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        if compilation_cache is not None:  # Before loading, which compiles as well.
            persistent_cache.enable(compilation_cache)
        pretrained = load_pretrained(path_or_hub_id, num_labels=num_labels, dtype=dtype, seed=seed)
        return cls(
            pretrained, criterion=criterion, driver=driver, mesh=mesh, chunk_tokens=chunk_tokens
        )

    @property
    def criterion(self) -> ExitCriterion:
        return self._criterion

    @criterion.setter
    def criterion(self, criterion: ExitCriterion) -> None:
        config = self.pretrained.model.config
        check(criterion, config.is_regression)
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
            batch_size: rows that run together; absent, 32, or where a pool may run `pool_rows`.

        Raises:
            InputError: nothing to predict, token ids that the model does not have, or a pool of
                `batch_size` rows that is larger than the memory that is free.
        """
        planning.check_size("batch_size", batch_size)
        if self.driver == "full":
            exits, logits = replay(self.criterion, self.all_exit_logits(inputs, batch_size))
            exits, logits = np.array(exits), np.array(logits)
        else:
            source = self._read(inputs)
            exits = np.empty(source.num_rows, np.int32)
            logits = np.empty(
                (source.num_rows, self.pretrained.model.config.num_labels), np.float32
            )
            jobs = self._early_exit_jobs(source, batch_size)
            for rows, (exit_layers, row_logits) in results(jobs, self._mesh):
                exits[rows], logits[rows] = exit_layers, row_logits
        return Predictions(predictions_of(logits), logits, exits, self.pretrained.label_names)

    def all_exit_logits(
        self, inputs: Sequence[Text] | Tokens | Dataset, batch_size: int | None = None
    ) -> Float[np.ndarray, "exits rows classes"]:
        """Every exit's logits in one pass: what `replay` needs for any criterion.

        Raises:
            InputError: as `predict`.
        """
        planning.check_size("batch_size", batch_size)
        size = batch_size or planning.DEFAULT_BATCH_SIZE
        source = self._read(inputs)
        config = self.pretrained.model.config
        found = np.empty((source.num_rows, config.num_hidden_layers, config.num_labels), np.float32)
        # One shape for all batches of a bucket.
        shape = next_power_of_two(min(size, source.num_rows))

        def run(batch, row):
            del row
            return run_full(self._graph, self._parameters, batch)

        batches = by_bucket(source.blocks, size, source.buckets)
        jobs = (Job(rows, part, shape, run) for rows, part in batches)
        for rows, logits in results(jobs, self._mesh):
            found[rows] = logits
        return found.swapaxes(0, 1)

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

    @functools.cached_property
    def pool_rows(self) -> int:
        """Rows of a pool over all devices when `predict` gets no batch size.

        Decided once, by the memory that is free when it is first asked for: another size would be
        another program.
        """
        return self._pool_plan(None, self.pretrained.max_length).rows

    def pool_plan(
        self, batch_size: int | None = None, sequence_length: int | None = None
    ) -> planning.PoolPlan:
        """Sizes of the pool for a batch size, and the memory it will take. Allocates nothing.

        Args:
            batch_size: rows; absent, `pool_rows`: as many as are good for speed and fit into a
                quarter of the memory that is free.
            sequence_length: absent, the longest that the checkpoint allows.

        Raises:
            InputError: a size below 1.
        """
        rows = self.pool_rows if batch_size is None else batch_size
        length = self.pretrained.max_length if sequence_length is None else sequence_length
        return self._pool_plan(rows, length)

    def warmup(self, batch_size: int | None = None) -> None:
        """Compiles every shape of the model that `predict` will use for texts with this batch size.

        (With driver "full" the replay is one more program, a small one, per number of rows.)
        """
        planning.check_size("batch_size", batch_size)
        most = batch_size or (self.pool_rows if self._pools else planning.DEFAULT_BATCH_SIZE)
        counts = {min(next_power_of_two(rows), most) for rows in range(1, most + 1)}
        if self._pools:
            limit = 0 if self.driver == "pool" else self._loop_rows
            counts = {rows for rows in counts if rows <= limit} | {min(limit, most)} - {0}
            counts |= {max(rows, min(limit + 1, most)) for rows in planning.pool_shapes(most)}
        for length in inference_buckets(self.pretrained.max_length):
            for rows in sorted(counts):
                # Rows without a token count as having left: nothing is computed for them.
                nothing = np.zeros((rows, length), np.int32)
                self.predict(Dataset(nothing, nothing, nothing), batch_size)

    def save_pretrained(self, directory: str | Path, *, for_pytorch: bool = False) -> None:
        """Writes the checkpoint, with the criterion chosen for it.

        With `for_pytorch` it is meant for PyTorch PABEE: an InputError says why if that cannot run
        the model (`exit_pooler=per_exit`, `exit_pooling=mean`).
        """
        chosen = dataclasses.replace(self.pretrained, criterion=self.criterion)
        save_pretrained(chosen, directory, for_pytorch=for_pytorch)

    def _pool_plan(self, rows: int | None, sequence_length: int) -> planning.PoolPlan:
        return planning.pool_plan(
            self.pretrained.model.config,
            self._mesh,
            sequence_length,
            bytes_per_value=self.pretrained.model.dtype.itemsize,
            rows=rows,
            chunk_tokens=self._chunk_tokens,
        )

    @property
    def _pools(self) -> bool:
        return self.driver in ("auto", "pool")

    def _takes_pool(self, rows: int) -> bool:
        return self.driver == "pool" or (self.driver == "auto" and rows > self._loop_rows)

    @property
    def _loop_rows(self) -> int:
        """Up to so many rows "auto" takes the loop."""
        return planning.backend(self._mesh).loop_rows * self._mesh.shape[sharding.DATA]

    def _read(self, inputs: Sequence[Text] | Tokens | Dataset) -> _Source:
        if isinstance(inputs, Dataset | Mapping):
            dataset = self.tokenize(inputs)
            count, longest, read = len(dataset), int(dataset.lengths.max()), dataset.take
        else:
            texts, pairs = checked_texts(inputs)
            count, longest = len(texts), 0

            def read(rows):
                return self.pretrained.encode(texts[rows], pairs[rows])

        starts = range(0, count, _ROWS_PER_BLOCK)
        blocks = (read(slice(start, start + _ROWS_PER_BLOCK)) for start in starts)
        if count > _ROWS_PER_BLOCK:
            blocks = prefetched(blocks)
        limit = self.pretrained.max_length
        return _Source(count, longest or limit, inference_buckets(max(longest, limit)), blocks)

    def _early_exit_jobs(self, source: _Source, batch_size: int | None) -> Iterator[Job]:
        """Every batch through `loop` or `pool`."""
        size = batch_size or (self.pool_rows if self._pools else planning.DEFAULT_BATCH_SIZE)
        if batch_size and self._takes_pool(min(size, source.num_rows)):
            shape = planning.pool_shape(min(size, source.num_rows), size)
            length = bucket_of(source.longest, source.buckets)
            planning.check_fits(self._pool_plan(shape, length), self._mesh)
        criterion = as_arrays(self.criterion)

        def run(batch, row, chunk_size=None):
            return run_early_exit(
                self._graph,
                self._mesh,
                self._parameters,
                batch,
                criterion,
                row,
                chunk_size=chunk_size,
            )

        for rows, part in by_bucket(source.blocks, size, source.buckets):
            if self._takes_pool(len(rows)):
                shape = planning.pool_shape(len(rows), size)
                pool = self._pool_plan(shape, part.input_ids.shape[1])
                in_chunks = functools.partial(run, chunk_size=pool.chunk_size)
                yield Job(rows, part, pool.rows, in_chunks)
            else:
                yield Job(rows, part, next_power_of_two(len(rows)), run)
