"""`EarlyExitClassifier`: predicts texts with a tokenizer, a model, a criterion and a driver."""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from tqdm import tqdm

from pabee_jax.checkpoints.pretrained import Pretrained, load_pretrained
from pabee_jax.checkpoints.saving import save_pretrained
from pabee_jax.criteria import ExitCriterion, Patience, as_arrays, warn
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.tokenization import Tokenizer
from pabee_jax.distributed import sharding
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.drivers.replay import replay
from pabee_jax.errors import InputError, shown
from pabee_jax.inference import compilation_cache as persistent_cache
from pabee_jax.inference import planning
from pabee_jax.inference.dispatch import Job, run_jobs
from pabee_jax.inference.inputs import Text, Tokens
from pabee_jax.inference.jobs import Programs, every_job, padded_jobs, pool_jobs, rows_of_loop
from pabee_jax.inference.predictions import Predictions, predictions_of
from pabee_jax.inference.programs import run_full, run_full_pool, run_loop, run_pool
from pabee_jax.inference.row_source import RowSource, row_source, tokenize
from pabee_jax.models.config import ModelConfig
from pabee_jax.models.encoder import EarlyExitModel
from pabee_jax.models.parameters import Structure, in_compute_dtype, merge, on_host, split


class EarlyExitClassifier:
    """A classifier whose rows exit as soon as the criterion allows.

    A classifier can be pickled. The copy runs on the first device of the process that unpickles it.

    Attributes:
        pretrained: the checkpoint as loaded.
        driver: how the layers run. "full" runs all layers and applies the criterion afterwards.
            "loop" stops a batch when its last row has exited. "pool" computes only the rows that
            have not exited. "auto" uses "loop" for small batches and "pool" for larger batches.
            In "full", as in "pool", many rows run without padding.
        criterion: decides when a row exits. Setting another criterion of the same class does not
            recompile.
        mesh: the devices over which the rows are sharded.

    Example:
        >>> classifier = EarlyExitClassifier.from_pretrained("runs/mrpc", criterion=Patience(2))
        >>> predictions = classifier.predict(["a text", ("a text", "and its pair")])
        >>> predictions.labels.shape, predictions.exit_layers.shape, predictions.logits.shape
        ((2,), (2,), (2, 2))
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
        if mesh is not None and not isinstance(mesh, Mesh):
            raise InputError(f"mesh is {shown(mesh)}; it must be a jax.sharding.Mesh")
        self.pretrained = pretrained
        self.driver = driver
        self.criterion = criterion or pretrained.criterion or Patience(0)
        self.mesh = mesh or sharding.first_device()
        self._chunk_tokens = chunk_tokens
        self._plans: dict[int, tuple[planning.PoolPlan, planning.PoolPlan]] = {}
        self._structure, parameters = split(in_compute_dtype(pretrained.model))
        self._parameters = sharding.replicate(parameters, self.mesh)
        if pretrained.model.dtype != np.float32:
            # `save_pretrained` needs the float32 parameters, but the device does not.
            model = on_host(pretrained.model)
            self.pretrained = dataclasses.replace(pretrained, model=model)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike,
        *,
        criterion: ExitCriterion | None = None,
        driver: str = "auto",
        dtype: str = "float32",
        mesh: Mesh | None = None,
        revision: str | None = None,
        num_labels: int | None = None,
        seed: int = 0,
        chunk_tokens: int | None = None,
        compilation_cache: str | Path | None = None,
    ) -> "EarlyExitClassifier":
        """Load a checkpoint of pabee_jax, of PyTorch PABEE or of Hugging Face.

        Args:
            path_or_hub_id: a checkpoint directory, or a Hugging Face hub id.
            criterion: absent, the criterion stored in the checkpoint, else `Patience(0)`, with
                which no row exits early.
            driver: "auto", "full", "loop" or "pool"; see `EarlyExitClassifier`.
            dtype: compute type of the encoder, "float32" or "bfloat16".
            mesh: devices over which batches are sharded; absent, the first device of this process.
            revision: branch, tag or commit of a repository on the hub; absent, its main branch.
            num_labels: required for a checkpoint without internal classifiers and without
                classification head. The classifiers are then initialized randomly.
            seed: seed of the random initialization.
            chunk_tokens: tokens that run together in the `pool` driver; absent, a default for the
                kind of device.
            compilation_cache: a directory in which compiled programs are stored for later
                processes. It applies to the whole process, from this call on.

        Raises:
            InputError: as `pabee_jax.checkpoints.pretrained.load_pretrained`; the criterion may use
                exits that were never trained; the driver or dtype is unknown; a size is below 1;
                the cache directory cannot be written.
        """
        planning.check_driver(driver)
        planning.check_size("chunk_tokens", chunk_tokens)
        if dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype is {dtype!r}; it must be float32 or bfloat16")
        if compilation_cache is not None:  # Before loading, because loading compiles as well.
            persistent_cache.enable(compilation_cache)
        pretrained = load_pretrained(
            path_or_hub_id, revision=revision, num_labels=num_labels, dtype=dtype, seed=seed
        )
        return cls(
            pretrained, criterion=criterion, driver=driver, mesh=mesh, chunk_tokens=chunk_tokens
        )

    def __repr__(self) -> str:
        config = self.config
        return (
            f"EarlyExitClassifier({config.family}, {config.num_hidden_layers} layers, "
            f"{self.criterion}, driver={self.driver!r})"
        )

    @property
    def criterion(self) -> ExitCriterion:
        return self._criterion

    @criterion.setter
    def criterion(self, criterion: ExitCriterion) -> None:
        config = self.pretrained.model.config
        self.pretrained.check_criterion(criterion)
        warn(criterion, config.num_hidden_layers, config.is_regression)
        self._criterion = criterion

    @property
    def model(self) -> EarlyExitModel:
        """The model with its parameters on the mesh, for custom programs with `early_exit`."""
        return merge(self._structure, self._parameters)

    @property
    def structure_and_parameters(self) -> tuple[Structure, dict[str, Any]]:
        """The model in two parts, for a compiled program: `merge` joins them."""
        return self._structure, self._parameters

    def __reduce__(self):
        # Neither devices nor the memory of a device can be pickled.
        keywords = {
            "criterion": self.criterion,
            "driver": self.driver,
            "chunk_tokens": self._chunk_tokens,
        }
        return functools.partial(type(self), **keywords), (self.pretrained,)

    @property
    def config(self) -> ModelConfig:
        """The architecture of the model."""
        return self.pretrained.model.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The Hugging Face tokenizer; None if the checkpoint has no tokenizer."""
        return self.pretrained.tokenizer

    @property
    def num_layers(self) -> int:
        """The number of encoder layers, each of which has an exit."""
        return self.config.num_hidden_layers

    def predict(
        self, inputs: Sequence[Text] | Tokens | Dataset, batch_size: int | None = None
    ) -> Predictions:
        """Predict texts, pairs of texts, or tokenized rows.

        Args:
            inputs: a list of texts and (text, text) pairs; or a dict of `input_ids` and optionally
                `attention_mask` and `token_type_ids`, each (N, S) int; or a `Dataset`.
            batch_size: the largest number of rows that run together, for the driver "loop" rounded
                down to a power of two; absent, 32 for "loop", and as many as `pool_plan` says for
                the other drivers.

        Returns:
            The predictions of the N inputs, in their order.

        Raises:
            InputError: `inputs` is empty, the model does not have a token id, or `inputs` are texts
                and the checkpoint has no tokenizer.
        """
        planning.check_size("batch_size", batch_size)
        if self.driver == "full":
            exit_layers, logits = replay(self.criterion, self.all_exit_logits(inputs, batch_size))
        else:
            source = row_source(self.pretrained, inputs)
            exit_layers = np.empty(source.num_rows, np.int32)
            logits = np.empty((source.num_rows, self.config.num_labels), np.float32)
            jobs = self._jobs(self.driver, source, batch_size)
            for rows, (batch_exit_layers, batch_logits) in run_jobs(jobs, self.mesh):
                exit_layers[rows], logits[rows] = batch_exit_layers, batch_logits
        label_names = self.pretrained.label_names
        return Predictions(predictions_of(logits), logits, exit_layers, label_names)

    def map_columns(
        self, batch: Mapping[str, Sequence | np.ndarray], text: str = "text", text_pair: str = ""
    ) -> dict[str, np.ndarray]:
        """Predict a batch of columns, for `datasets.Dataset.map(..., batched=True)` and Ray Data.

        Args:
            batch: columns by name.
            text: the name of the column of the texts.
            text_pair: the name of the column of the second texts; empty for single texts.

        Returns:
            The columns of `Predictions.columns`.

        Raises:
            InputError: a column is missing, or as `predict`.
        """
        for name in (text, text_pair):
            if name and name not in batch:
                raise InputError(f"there is no column {name!r}: there are {', '.join(batch)}")
        texts: Any = list(batch[text])
        if text_pair:
            texts = list(zip(texts, batch[text_pair], strict=True))
        return self.predict(texts).columns()

    def all_exit_logits(
        self, inputs: Sequence[Text] | Tokens | Dataset, batch_size: int | None = None
    ) -> Float[np.ndarray, "exits rows classes"]:
        """Return the logits of every exit, from which `replay` computes the exits of any criterion.

        Args:
            inputs: as in `predict`.
            batch_size: as in `predict`, for the driver "full".

        Returns:
            (exits, N, classes) float32; for regression, one score instead of the classes.

        Raises:
            InputError: as `predict`.
        """
        planning.check_size("batch_size", batch_size)
        source, config = row_source(self.pretrained, inputs), self.config
        exit_logits = np.empty(
            (source.num_rows, config.num_hidden_layers, config.num_labels), np.float32
        )
        jobs = self._jobs("full", source, batch_size)
        for rows, batch_logits in run_jobs(jobs, self.mesh):
            exit_logits[rows] = batch_logits
        return exit_logits.swapaxes(0, 1)

    def tokenize(self, inputs: Sequence[Text] | Tokens | Dataset) -> Dataset:
        """Tokenize texts, or check tokenized rows; return a `Dataset` unchanged.

        Raises:
            InputError: as `predict`.
        """
        return tokenize(self.pretrained, inputs)

    def pool_plan(self) -> planning.PoolPlan:
        """Return the sizes of the pool in which many rows run, and its memory. Allocates nothing.

        The sizes are computed once, from the memory that is free at that time, because other sizes
        would compile another program.
        """
        return self._pool_plans(self.pretrained.max_length)[-1]

    def warmup(self, batch_size: int | None = None, lengths: Sequence[int] | None = None) -> None:
        """Compile every program that `predict` uses for texts with this batch size.

        A terminal shows a progress bar.

        Exception: with driver "full", `predict` also compiles the small program of `replay`, once
        per number of rows (rounded up to a power of two).

        Args:
            batch_size: as in `predict`.
            lengths: numbers of tokens; only the programs for texts of these lengths are compiled.
                Absent, the programs for all lengths.

        Raises:
            InputError: `lengths` is not a list of numbers from 1 to the length to which texts are
                truncated.
        """
        planning.check_size("batch_size", batch_size)
        limit = self.pretrained.max_length
        if lengths is not None:
            planning.check_lengths(lengths, limit)
        plans = () if self.driver == "loop" else self._pool_plans(limit)
        jobs = every_job(
            self.driver, self._programs(self.driver), self.mesh, limit, plans, batch_size, lengths
        )
        for job in tqdm(jobs, "compiling", unit="program", disable=None):
            collections.deque(run_jobs([job], self.mesh), maxlen=0)

    def save_pretrained(self, directory: str | Path, *, for_pytorch: bool = False) -> None:
        """Save the checkpoint together with the current criterion.

        Args:
            directory: where to write the checkpoint.
            for_pytorch: write a checkpoint that PyTorch PABEE can load.

        Raises:
            InputError: `directory` cannot be written; or `for_pytorch` is set and PyTorch PABEE
                cannot run the model (`exit_pooler=per_exit`, `exit_pooling=mean`).
        """
        pretrained = dataclasses.replace(self.pretrained, criterion=self.criterion)
        save_pretrained(pretrained, directory, for_pytorch=for_pytorch)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the checkpoint, with the current criterion and a model card, to the hub.

        Args:
            repo_id: the repository, "name" or "owner/name"; it is created if needed.
            private: whether a new repository is private.
            token: an access token of the hub; absent, that of `hf auth login`.

        Returns:
            The address of the repository.

        Raises:
            InputError: the hub refuses the upload or cannot be reached.
        """
        from pabee_jax.checkpoints.hub import push_to_hub

        pretrained = dataclasses.replace(self.pretrained, criterion=self.criterion)
        return push_to_hub(pretrained, repo_id, private=private, token=token)

    def _pool_plans(self, longest: int) -> tuple[planning.PoolPlan, planning.PoolPlan]:
        """Return the small and the large pool for rows of up to `longest` tokens."""
        if longest not in self._plans:
            self._plans[longest] = planning.pool_plans(
                self.config,
                self.mesh,
                longest,
                bytes_per_value=self.pretrained.model.dtype.itemsize,
                chunk_tokens=self._chunk_tokens,
            )
        return self._plans[longest]

    def _jobs(self, driver: str, source: RowSource, batch_size: int | None) -> Iterator[Job]:
        programs = self._programs(driver)
        if driver == "loop":
            size = rows_of_loop(batch_size)
            return padded_jobs(programs, self.mesh, source.blocks, source.limit, size)
        plans, pads_few_rows = self._pool_plans(source.limit), driver != "pool"
        return pool_jobs(programs, self.mesh, source, plans, batch_size, pads_few_rows)

    def _programs(self, driver: str) -> Programs:
        model = (self._structure, self.mesh, self._parameters)
        if driver == "full":
            return Programs(
                padded=lambda batch, row: run_full(*model, batch),
                ragged=lambda plan, batch, row: run_full_pool(
                    *model, RaggedBatch(**batch), sizes=plan.sizes
                ),
            )
        criterion = as_arrays(self.criterion)
        return Programs(
            padded=lambda batch, row: run_loop(*model, batch, criterion, row),
            ragged=lambda plan, batch, row: run_pool(
                *model, RaggedBatch(**batch), criterion, row, sizes=plan.sizes
            ),
        )
