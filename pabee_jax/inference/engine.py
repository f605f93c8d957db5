"""The engine of a service: rows enter a pool on the device, and every row is answered as it exits.

Rows wait in a queue. One thread runs the pool: between two calls of a few layers it answers the
rows that have exited, and admits waiting rows (`pabee_jax.drivers.resident_pool` says when).
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pabee_jax.criteria import ExitCriterion, as_arrays, check
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.packing import packed
from pabee_jax.drivers import resident_pool
from pabee_jax.drivers.resident_pool import ResidentRows
from pabee_jax.drivers.shapes import ChunkSizes
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.inputs import Text
from pabee_jax.inference.planning import TOKENS_PER_ROW, backend
from pabee_jax.models.parameters import Structure, merge


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The sizes of an engine.

    Attributes:
        max_tokens: the tokens of the pool; absent, a default for the device. At least twice the
            tokens of the longest row.
        max_rows: the rows of the pool; absent, one per 16 tokens.
        layers_per_look: how many layers run between two looks at the pool. Fewer layers answer
            rows earlier, and more layers need fewer calls.
        max_waiting: the most rows that wait.
        tokenizer_threads: threads that tokenize texts.
    """

    max_tokens: int | None = None
    max_rows: int | None = None
    layers_per_look: int = 1
    max_waiting: int = 1024
    tokenizer_threads: int = 2


class Overloaded(InputError):
    """Raised when as many rows wait as the engine allows."""


class Answer(NamedTuple):
    """The answer of one row.

    Attributes:
        logits: (C,) the logits of the row's exit.
        exit_layer: the layer, from 1, at which the row exited.
        queue_seconds: the time from the call to the admission into the pool.
        inference_seconds: the time from the admission to the answer.
    """

    logits: np.ndarray
    exit_layer: int
    queue_seconds: float
    inference_seconds: float


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A row that has not been answered."""

    tokens: Dataset
    num_tokens: int
    criterion: ExitCriterion
    answer: concurrent.futures.Future
    arrival: float
    admission: float = 0.0


class Engine:
    """Answers rows as they exit. Use it as a context manager, or call `close`.

    Rows with settings of one class of criteria share a pool; a new class compiles its programs at
    its first row.

    Attributes:
        classifier: the model, the tokenizer and the default criterion.
        config: the given sizes.
        max_tokens, max_rows: the tokens and the rows of a pool.
        tokenizers: the threads that tokenize texts.
    """

    def __init__(self, classifier: EarlyExitClassifier, config: EngineConfig | None = None):
        """Start the engine.

        Args:
            classifier: the model, the tokenizer and the default criterion.
            config: the sizes.
        """
        self.classifier = classifier
        self.config = config = config or EngineConfig()
        defaults, longest = backend(classifier.mesh), classifier.pretrained.max_length
        self.max_tokens = max(config.max_tokens or defaults.engine_tokens, 2 * longest)
        self.max_rows = config.max_rows or self.max_tokens // TOKENS_PER_ROW
        chunk_tokens = max(self.max_tokens // 2, longest)
        self._sizes = ChunkSizes.of(
            chunk_tokens, longest, defaults.smallest_engine_chunk, block_factor=2
        )
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._pools: dict[type, _Pool] = {}
        self.tokenizers = concurrent.futures.ThreadPoolExecutor(
            config.tokenizer_threads, "tokenizer"
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_waiting(self) -> int:
        """The rows that wait for their admission."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """The rows in the pools."""
        return sum(len(pool.rows) for pool in list(self._pools.values()))

    def submit(
        self, tokens: Dataset, criterion: ExitCriterion | None = None
    ) -> list["concurrent.futures.Future[Answer]"]:
        """Queue tokenized rows; return the future answer of every row. All rows wait, or none.

        A future that is cancelled before its row is admitted costs nothing.

        Raises:
            Overloaded: too many rows wait.
            InputError: the criterion does not fit the model, a row has more tokens than the model
                takes, or the engine is closed.
        """
        criterion = self.classifier.criterion if criterion is None else criterion
        config = self.classifier.config
        check(criterion, config.num_hidden_layers, config.num_labels)
        longest, limit = int(tokens.lengths.max(initial=0)), self.classifier.pretrained.max_length
        if longest > limit:  # It would wait forever, and the rows after it.
            raise InputError(f"a row has {longest} tokens, and at most {limit} are allowed")
        now, setting = time.monotonic(), as_arrays(criterion)
        rows = [
            _Waiting(
                tokens.take(slice(row, row + 1)),
                int(num_tokens),
                setting,
                concurrent.futures.Future(),
                now,
            )
            for row, num_tokens in enumerate(tokens.lengths)
        ]
        with self._changed:
            if self._is_closing:
                raise InputError("the engine is closed")
            if len(self._waiting) + len(rows) > self.config.max_waiting:
                raise Overloaded(
                    f"{len(self._waiting)} rows wait, and at most {self.config.max_waiting} may"
                )
            self._waiting.extend(rows)
            self._changed.notify()
        return [row.answer for row in rows]

    async def predict(
        self, texts: Sequence[Text], criterion: ExitCriterion | None = None
    ) -> list[Answer]:
        """Return the answers of texts or pairs, when the last of them has exited.

        Raises:
            Overloaded, InputError: as `submit`, and as `EarlyExitClassifier.predict`.
        """
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self.tokenizers, self.classifier.tokenize, texts)
        return await self.answers(tokens, criterion)

    async def answers(
        self, tokens: Dataset, criterion: ExitCriterion | None = None
    ) -> list[Answer]:
        """Return the answers of tokenized rows; if it is cancelled, waiting rows are dropped.

        Raises:
            Overloaded, InputError: as `submit`.
        """
        # Cancelling the result of `gather` cancels the futures of the rows.
        return await asyncio.gather(*map(asyncio.wrap_future, self.submit(tokens, criterion)))

    def warmup(self, criterion: ExitCriterion | None = None) -> None:
        """Compile the programs for this class of criteria; absent, that of the classifier."""
        token = np.full((1, 1), 1, np.int32)
        row = Dataset(token, token.astype(np.int8), np.zeros((1, 1), np.int8))
        for future in self.submit(row, criterion):
            future.result()

    def close(self) -> None:
        """Answer the rows that wait and end the threads. Later calls are refused."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self.tokenizers.shutdown()

    def _run(self) -> None:
        while self._has_work():
            try:
                self._admit()
                for pool in list(self._pools.values()):
                    if pool.rows:
                        pool.advance(self.config.layers_per_look)
            except Exception as error:
                # A failure of the device must not leave callers waiting.
                self._fail(error)

    def _has_work(self) -> bool:
        """Wait for work; return whether there is any."""
        with self._changed:
            while not (self._waiting or self.num_active):
                if self._is_closing:
                    return False
                self._changed.wait()
        return True

    def _admit(self) -> None:
        """Move waiting rows to their pools, in the order of their arrival, while they fit."""
        with self._changed:
            while self._waiting:
                row = self._waiting[0]
                pool = self._pool_of(row.criterion)
                if not pool.has_room(row):
                    break
                self._waiting.popleft()
                if row.answer.set_running_or_notify_cancel():
                    pool.take(row)
        for pool in self._pools.values():
            pool.admit()

    def _pool_of(self, criterion: ExitCriterion) -> "_Pool":
        kind = type(criterion)
        if kind not in self._pools:
            model = self.classifier.structure_and_parameters
            self._pools[kind] = _Pool(model, criterion, self.max_rows, self.max_tokens, self._sizes)
        return self._pools[kind]

    def _fail(self, error: Exception) -> None:
        """Give the error to every row, also to those that wait: the next try may fail as well."""
        with self._changed:
            rows = [row for row in self._waiting if row.answer.set_running_or_notify_cancel()]
            self._waiting.clear()
        for pool in self._pools.values():
            rows += pool.rows.values()
        self._pools = {}
        for row in rows:
            row.answer.set_exception(error)


class _Pool:
    """The host's side of a resident pool.

    Attributes:
        rows: the active rows by ticket.
    """

    def __init__(
        self,
        model: tuple[Structure, Any],
        criterion: ExitCriterion,
        max_rows: int,
        max_tokens: int,
        sizes: ChunkSizes,
    ):
        self.rows: dict[int, _Waiting] = {}
        self._new: list[int] = []  # The tickets of the rows that are not on the device yet.
        self._num_tokens = 0  # Of `rows`.
        self._next_ticket = 0
        self._model = model
        self._takes_rows_any_time = resident_pool.shares_all_layers(merge(*model))
        self._max_rows, self._max_tokens, self._sizes = max_rows, max_tokens, sizes
        self._state = _empty(
            *model, criterion, max_rows=max_rows, max_tokens=max_tokens, sizes=sizes
        )

    def has_room(self, row: _Waiting) -> bool:
        """Return whether the pool takes one more row."""
        is_on_device = len(self.rows) > len(self._new)
        if is_on_device and not self._takes_rows_any_time:
            return False
        fits = self._num_tokens + row.num_tokens <= self._max_tokens
        return fits and len(self.rows) < self._max_rows

    def take(self, row: _Waiting) -> None:
        """Add a row, which `admit` sends to the device."""
        row.admission = time.monotonic()
        self._num_tokens += row.num_tokens
        self.rows[self._next_ticket] = row
        self._new.append(self._next_ticket)
        self._next_ticket = (self._next_ticket + 1) % 2**31

    def admit(self) -> None:
        """Send the rows that were taken to the device."""
        if not self._new:
            return
        rows = [self.rows[ticket] for ticket in self._new]
        width = max(row.tokens.input_ids.shape[1] for row in rows)
        dataset = functools.reduce(
            Dataset.concatenated, (row.tokens.resized(width) for row in rows)
        )
        sizes = self._max_rows, self._max_tokens, self._sizes.longest
        batch, places = packed(dataset, 1, *sizes)
        ticket = np.full(self._max_rows, -1, np.int32)
        ticket[places] = self._new
        settings = [rows[0].criterion] * self._max_rows
        for row, place in zip(rows, places, strict=True):
            settings[place] = row.criterion
        self._new = []
        criterion = jax.tree.map(lambda *leaves: np.stack(leaves), *settings)
        self._state = _admit(*self._model, self._state, batch, ticket, criterion, sizes=self._sizes)

    def advance(self, num_layers: int) -> None:
        """Run layers, and answer the rows that have exited."""
        self._state = _advance(*self._model, self._state, np.int32(num_layers), sizes=self._sizes)
        exits = self._state.exits
        ticket, done, exit_layer, logits = jax.device_get(
            (self._state.ticket, exits.done, exits.exit_layer, exits.logits)
        )
        now = time.monotonic()
        for index in np.flatnonzero(done):
            row = self.rows.pop(int(ticket[index]), None)
            if row is not None:  # Rows that do not exist, and rows that were answered before.
                self._num_tokens -= row.num_tokens
                waited, ran = row.admission - row.arrival, now - row.admission
                answer = Answer(logits[index], int(exit_layer[index]), waited, ran)
                row.answer.set_result(answer)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_rows", "max_tokens", "sizes"))
def _empty(structure: Structure, parameters: Any, criterion, **sizes: Any) -> ResidentRows:
    return resident_pool.empty(merge(structure, parameters), criterion, **sizes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="sizes", donate_argnums=2)
def _admit(
    structure: Structure, parameters: Any, rows: ResidentRows, new, ticket, criterion, *, sizes
) -> ResidentRows:
    model = merge(structure, parameters)
    return resident_pool.admit(model, rows, new, ticket, criterion, sizes=sizes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="sizes", donate_argnums=2)
def _advance(
    structure: Structure, parameters: Any, rows: ResidentRows, num_layers, *, sizes
) -> ResidentRows:
    return resident_pool.advance(merge(structure, parameters), rows, num_layers, sizes=sizes)
