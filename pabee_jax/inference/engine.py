"""The engine of a service: rows enter a pool on the device, and every row is answered as it exits.

Rows wait in a queue. One thread runs the pool: between two calls of a few layers it answers the
rows that have exited, and admits waiting rows (`pabee_jax.drivers.resident_pool` says when).
"""

import asyncio
import collections
import concurrent.futures
import copy
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from pabee_jax.criteria import ExitCriterion, as_arrays
from pabee_jax.data.dataset import Dataset
from pabee_jax.data.packing import blocks_that_fit, packed
from pabee_jax.drivers import resident_pool
from pabee_jax.drivers.ragged import RaggedBatch
from pabee_jax.drivers.resident_pool import ResidentRows
from pabee_jax.drivers.shapes import ChunkSizes
from pabee_jax.errors import InputError
from pabee_jax.inference.classifier import EarlyExitClassifier
from pabee_jax.inference.dispatch import Job, ragged_job, run_jobs
from pabee_jax.inference.inputs import Text, checked_texts
from pabee_jax.inference.planning import TOKENS_PER_ROW, backend
from pabee_jax.inference.programs import run_full_pool
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
        max_waiting: the most rows that wait for their answers: rows in tokenization, in the queue,
            in the pool, and in an explanation.
        max_waiting_bytes: the most bytes (UTF-8) of the texts of these rows. A call is accepted
            whatever its bytes if no other row waits.
        tokenizer_threads: threads that tokenize texts.
    """

    max_tokens: int | None = None
    max_rows: int | None = None
    layers_per_look: int = 1
    max_waiting: int = 1024
    max_waiting_bytes: int = 16_000_000
    tokenizer_threads: int = 2


class Overloaded(InputError):
    """Raised when as many rows wait, or as many bytes of texts, as the engine allows."""


class Closed(InputError):
    """Raised when the engine is closed."""


class Answer(NamedTuple):
    """The answer of one row.

    Attributes:
        logits: (C,) the logits of the row's exit.
        exit_layer: the layer, from 1, at which the row exited.
        queue_seconds: the time from the end of the tokenization to the admission into the pool.
        inference_seconds: the time from the admission to the answer.
        tokenization_seconds: the time from the call to the end of the tokenization; 0 for tokenized
            rows.
        exit_logits: (exits, C) the logits of every exit, if they were asked for.
    """

    logits: np.ndarray
    exit_layer: int
    queue_seconds: float
    inference_seconds: float
    tokenization_seconds: float = 0.0
    exit_logits: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A row that has not been answered.

    Attributes:
        on_leaving: called when the row leaves the engine, before its answer is set.
    """

    tokens: Dataset
    num_tokens: int
    criterion: ExitCriterion
    answer: concurrent.futures.Future
    on_leaving: Callable[[], None]
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
        num_waiting: the rows that wait for their answers, as `EngineConfig.max_waiting` counts
            them.
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
        self._sizes = defaults.small_sizes(longest)
        self.num_waiting = self._waiting_bytes = 0
        # The rows in the queue. Callers append rows, and only the engine's thread removes them.
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._pools: dict[type, _Pool] = {}
        # A tokenizer keeps the truncation of its last call, also for calls of other threads, and
        # calls differ in their truncation. So every thread takes a tokenizer for itself.
        self._tokenizers = queue.SimpleQueue()
        for _ in range(config.tokenizer_threads):
            own = copy.deepcopy(classifier.pretrained.tokenizer)
            self._tokenizers.put(dataclasses.replace(classifier.pretrained, tokenizer=own))
        self._tokenization = concurrent.futures.ThreadPoolExecutor(
            config.tokenizer_threads, "tokenizer"
        )
        self._explanation = concurrent.futures.ThreadPoolExecutor(1, "explanation")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
                takes, a token id is outside the vocabulary, or the engine is closed.
        """
        self._accept(len(tokens), 0)
        try:
            return self._enqueue(tokens, criterion, lambda: self._release(1, 0))
        except BaseException:
            self._release(len(tokens), 0)
            raise

    async def predict(
        self,
        texts: Sequence[Text],
        criterion: ExitCriterion | None = None,
        *,
        truncate: bool = True,
        truncation_side: str | None = None,
        all_exits: bool = False,
    ) -> list[Answer]:
        """Return the answers of texts or pairs, when the last of them has exited.

        Rows that are too many are refused before they are tokenized. If the call is cancelled, the
        rows that have not entered the pool are dropped.

        Args:
            texts: texts, and (text, text) pairs.
            criterion: decides when a row exits; absent, the criterion of the classifier.
            truncate: whether texts that are too long are truncated or refused.
            truncation_side: as in `Pretrained.encode`.
            all_exits: whether the answers have the logits of every exit.

        Raises:
            Overloaded: too many rows wait, or too many bytes of texts.
            TooManyTokens: a text is too long, and `truncate` is false.
            InputError: the criterion does not fit the model, the texts cannot be used, or the
                engine is closed.
        """
        start, (firsts, seconds) = time.monotonic(), checked_texts(texts)
        num_bytes = sum(len(text.encode()) for text in (*firsts, *seconds) if text)

        def encode() -> Dataset:
            pretrained = self._tokenizers.get()
            try:
                return pretrained.encode(
                    firsts, seconds, truncate=truncate, truncation_side=truncation_side
                )
            finally:
                self._tokenizers.put(pretrained)

        self._accept(len(firsts), num_bytes)
        try:
            tokens = await self._in_thread(self._tokenization, encode)
            tokenization = time.monotonic() - start
            # Cancelling the result of `gather` cancels the futures of the rows.
            rows = map(asyncio.wrap_future, self._enqueue(tokens, criterion))
            answers = await asyncio.gather(*rows)
            exit_logits: Sequence[np.ndarray | None] = [None] * len(answers)
            if all_exits:
                logits = await self._in_thread(self._explanation, self.all_exit_logits, tokens)
                exit_logits = list(logits.swapaxes(0, 1))
        finally:
            self._release(len(firsts), num_bytes)
        return [
            answer._replace(tokenization_seconds=tokenization, exit_logits=logits)
            for answer, logits in zip(answers, exit_logits, strict=True)
        ]

    def all_exit_logits(self, tokens: Dataset) -> Float[np.ndarray, "exits rows classes"]:
        """Return the logits of every exit, as `EarlyExitClassifier` does, with a single program."""
        config = self.classifier.config
        shape = len(tokens), config.num_hidden_layers, config.num_labels
        exit_logits = np.empty(shape, np.float32)
        for rows, logits in run_jobs(self._full_depth_jobs(tokens), self.classifier.mesh):
            exit_logits[rows] = logits
        return exit_logits.swapaxes(0, 1)

    def warmup(self, criterion: ExitCriterion | None = None, *, all_exits: bool = False) -> None:
        """Compile the programs for this class of criteria; absent, that of the classifier.

        Args:
            criterion: any setting of the class.
            all_exits: also compile the program of `all_exit_logits`.
        """
        token = np.full((1, 1), 1, np.int32)
        row = Dataset(token, token.astype(np.int8), np.zeros((1, 1), np.int8))
        for future in self._enqueue(row, criterion):
            future.result()
        if all_exits:
            self.all_exit_logits(row)

    def close(self) -> None:
        """Answer the rows in the queue and end the threads. Later calls are refused."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self._tokenization.shutdown()
        self._explanation.shutdown()

    def _accept(self, num_rows: int, num_bytes: int) -> None:
        """Count the rows and the bytes of a call, which must be released after its answer.

        Raises:
            Overloaded: too many rows wait, or too many bytes of texts.
            Closed: the engine is closed.
        """
        config = self.config
        with self._changed:
            if self._is_closing:
                raise Closed("the engine is closed")
            if self.num_waiting + num_rows > config.max_waiting:
                raise Overloaded(
                    f"the call has too many rows ({num_rows}): {self.num_waiting} rows wait, and "
                    f"at most {config.max_waiting} may"
                )
            if self.num_waiting and self._waiting_bytes + num_bytes > config.max_waiting_bytes:
                raise Overloaded(
                    f"the call has too many bytes of texts ({num_bytes}): {self._waiting_bytes} "
                    f"bytes wait, and at most {config.max_waiting_bytes} may"
                )
            self.num_waiting += num_rows
            self._waiting_bytes += num_bytes

    def _release(self, num_rows: int, num_bytes: int) -> None:
        with self._changed:
            self.num_waiting -= num_rows
            self._waiting_bytes -= num_bytes

    async def _in_thread(self, threads: concurrent.futures.Executor, function, *arguments) -> Any:
        """Return the result of a function that runs in one of the threads."""
        try:
            future = asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
        except RuntimeError:  # The threads have ended.
            raise Closed("the engine is closed") from None
        return await future

    def _enqueue(
        self,
        tokens: Dataset,
        criterion: ExitCriterion | None,
        on_leaving: Callable[[], None] = lambda: None,
    ) -> list["concurrent.futures.Future[Answer]"]:
        """Add rows to the queue; return their future answers.

        The event loop calls this method: it must not wait for the device or for a compilation.
        """
        criterion = self.classifier.criterion if criterion is None else criterion
        self.classifier.pretrained.check_criterion(criterion)
        if not len(tokens):
            return []
        longest, limit = int(tokens.lengths.max()), self.classifier.pretrained.max_length
        if longest > limit:  # It would wait forever, and the rows after it.
            raise InputError(f"a row has {longest} tokens, and at most {limit} are allowed")
        tokens = self.classifier.tokenize(tokens.resized(longest))
        now, setting = time.monotonic(), as_arrays(criterion)
        rows = [
            _Waiting(
                tokens.take(slice(row, row + 1)),
                int(num_tokens),
                setting,
                concurrent.futures.Future(),
                on_leaving,
                now,
            )
            for row, num_tokens in enumerate(tokens.lengths)
        ]
        with self._changed:
            if self._is_closing:
                raise Closed("the engine is closed")
            self._queue.extend(rows)
            self._changed.notify()
        return [row.answer for row in rows]

    def _full_depth_jobs(self, tokens: Dataset) -> Iterator[Job]:
        """Yield the rows in pools of the engine's sizes, which run all layers."""
        structure, parameters = self.classifier.structure_and_parameters
        mesh = self.classifier.mesh

        def run(batch, row):
            batch = RaggedBatch(**batch)
            return run_full_pool(structure, mesh, parameters, batch, sizes=self._sizes)

        for rows, part in blocks_that_fit([tokens], self.max_rows, self.max_tokens):
            sizes = self.max_rows, self.max_tokens, self._sizes.longest
            yield ragged_job(rows, part, *sizes, mesh, run)

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
            while not (self._queue or self.num_active):
                if self._is_closing:
                    return False
                self._changed.wait()
        return True

    def _admit(self) -> None:
        """Move waiting rows to their pools, in the order of their arrival, while they fit.

        No lock is held: the first row of a class of criteria compiles programs.
        """
        while self._queue:
            row = self._queue[0]
            pool = self._pool_of(row.criterion)
            if not pool.has_room(row):
                break
            self._queue.popleft()
            if row.answer.set_running_or_notify_cancel():
                pool.take(row)
            else:
                row.on_leaving()
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
            waiting = list(self._queue)
            self._queue.clear()
        failed = [row for row in waiting if row.answer.set_running_or_notify_cancel()]
        for pool in self._pools.values():
            failed += pool.rows.values()
            waiting += pool.rows.values()
        self._pools = {}
        for row in waiting:
            row.on_leaving()
        for row in failed:
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
                row.on_leaving()
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
