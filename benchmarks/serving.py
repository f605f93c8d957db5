"""Latency under load: the engine beside full depth and early exit in batches, first in first out.

    python -m benchmarks.serving --model minilm,albert-base
    python -m benchmarks.serving --checkpoint runs/sst2 --data_dir glue

Rows arrive at random times (Poisson, or `--bursts`: in groups), whether or not earlier rows have
been answered. With `--model`, the weights are random and the exit layers are given, with a mean of
half of the depth; with `--checkpoint`, the rows are SST-2's dev set under the checkpoint's own
criterion. Three ways to answer:

    full    waiting rows run in one batch at full depth
    pools   waiting rows run in one call of `predict`, and are answered when the last has exited
    engine  pabee_jax.inference.engine: every row is answered when it exits

The load is relative to the rows per second of "pools" when all rows are there at once. "goodput" is
the rows per second that are answered within `--limit` times the median latency of "pools" at the
lowest load. The ways take turns. A second table shows the rows per second when all rows are there
at once: of one call of `predict`, of "pools" and of the engine.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import command_line, figures
from benchmarks.exit_schedule import ExitSchedule, ScheduledExit, binomial_exit_layers
from benchmarks.measure import Budget
from benchmarks.models import random_model
from pabee_jax import EarlyExitClassifier
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.criteria import ExitCriterion
from pabee_jax.data import glue
from pabee_jax.data.dataset import Dataset
from pabee_jax.inference.engine import Engine, EngineConfig

_MAX_LENGTH = 128
_MEAN_LENGTH, _LENGTH_SPREAD = 24, 0.5
_MAX_ROWS = 64  # Of a batch, and of the engine's pool.
_OFFLINE_ROWS = 512
_WAYS = ("full", "pools", "engine")
Submit = Callable[[int], concurrent.futures.Future]


@dataclasses.dataclass
class Workload:
    """Rows, and where they exit.

    Attributes:
        name: of the model.
        classifier: runs the batches.
        dataset: the rows; arrivals take them one after the other, and then from the first again.
        exit_layers: where each row exits; absent, the checkpoint's criterion decides.
    """

    name: str
    classifier: EarlyExitClassifier
    dataset: Dataset
    exit_layers: np.ndarray | None = None

    def __post_init__(self):
        self.criterion = self.classifier.criterion
        self.parts = [self.dataset.take(slice(row, row + 1)) for row in range(len(self.dataset))]

    def row(self, arrival: int) -> int:
        return arrival % len(self.dataset)

    def criterion_of_row(self, row: int) -> ExitCriterion:
        if self.exit_layers is None:
            return self.criterion
        return ScheduledExit(int(self.exit_layers[row]))

    def criterion_of_rows(self, rows: Sequence[int]) -> ExitCriterion:
        if self.exit_layers is None:
            return self.criterion
        # The schedule always has the same size, so that the program is compiled once.
        schedule = np.ones(_OFFLINE_ROWS, np.int32)
        schedule[: len(rows)] = self.exit_layers[list(rows)]
        return ExitSchedule(schedule)

    def predict(self, rows: Sequence[int], full: bool = False) -> None:
        """Run the rows in one call."""
        deepest = ScheduledExit(self.classifier.num_layers)
        self.classifier.criterion = deepest if full else self.criterion_of_rows(rows)
        self.classifier.predict(self.dataset.take(np.array(rows)))


def shaped_workload(name: str, dtype: str) -> Workload:
    """Return random rows whose lengths are log-normal, on random weights."""
    model = random_model(name, dtype)
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(_MEAN_LENGTH), _LENGTH_SPREAD, _OFFLINE_ROWS)
    lengths = np.clip(lengths, 4, _MAX_LENGTH).astype(int)
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.where(mask, random.integers(1, model.config.vocab_size, mask.shape), 0)
    rows = Dataset(ids.astype(np.int32), mask.astype(np.int8), np.zeros(mask.shape, np.int8))
    layers = model.config.num_hidden_layers
    classifier = EarlyExitClassifier(Pretrained(model, None, {}, ("0", "1"), _MAX_LENGTH))
    return Workload(
        name, classifier, rows, binomial_exit_layers(_OFFLINE_ROWS, (layers + 1) / 2, layers)
    )


def checkpoint_workload(options) -> Workload:
    """Return the first rows of SST-2's dev set, on a trained checkpoint."""
    classifier = EarlyExitClassifier.from_pretrained(str(options.checkpoint), dtype=options.dtype)
    texts = glue.task("sst2", options.data_dir).read("dev")["dev"].texts
    return Workload("SST-2", classifier, classifier.tokenize(texts[:_OFFLINE_ROWS]))


class Batches:
    """Runs all waiting rows together, again and again; a row is answered with its batch."""

    def __init__(self, workload: Workload, full: bool):
        self._workload, self._full = workload, full
        self._waiting: collections.deque = collections.deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, arrival: int) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            self._waiting.append((self._workload.row(arrival), future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._is_closing:
                        return
                    self._changed.wait()
                count = min(_MAX_ROWS, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(count)]
            self._workload.predict([row for row, _ in batch], self._full)
            for _, future in batch:
                future.set_result(None)


class InEngine:
    """Submits rows to an engine."""

    def __init__(self, workload: Workload, layers_per_look: int):
        self._workload = workload
        config = EngineConfig(
            max_rows=_MAX_ROWS, layers_per_look=layers_per_look, max_waiting=100_000
        )
        self._engine = Engine(workload.classifier, config)
        self._engine.warmup(workload.criterion_of_row(0))
        self.close = self._engine.close

    def submit(self, arrival: int) -> concurrent.futures.Future:
        workload = self._workload
        row = workload.row(arrival)
        return self._engine.submit(workload.parts[row], workload.criterion_of_row(row))[0]


def latencies(submit: Submit, arrivals: np.ndarray) -> np.ndarray:
    """Submit row i at `arrivals[i]` seconds; return the seconds from its arrival to its answer."""
    start = time.monotonic()
    ends = np.empty(len(arrivals))

    def record(index: int) -> Callable:
        def on_done(_: concurrent.futures.Future) -> None:
            ends[index] = time.monotonic() - start

        return on_done

    futures = []
    for index, arrival in enumerate(arrivals):
        time.sleep(max(0.0, start + arrival - time.monotonic()))
        future = submit(index)
        future.add_done_callback(record(index))
        futures.append(future)
    concurrent.futures.wait(futures)
    time.sleep(0.01)  # A callback runs after the waiters are woken.
    return ends - arrivals


def arrivals_of(rate: float, rows: int, bursts: bool, seed: int) -> np.ndarray:
    """Return the times of arrival in seconds: one by one, or in groups of 1 to 32 rows."""
    random = np.random.default_rng(seed)
    if not bursts:
        return np.cumsum(random.exponential(1 / rate, rows))
    sizes = random.integers(1, 33, rows)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), rows) + 1]
    times = np.cumsum(random.exponential(sizes.mean() / rate, len(sizes)))
    return np.repeat(times, sizes)[:rows]


def measure(workload: Workload, options, seconds: float) -> tuple[list[dict], dict]:
    """Return a record per way and load, and the rows per second when all rows wait."""
    ways: dict[str, Batches | InEngine] = {
        "full": Batches(workload, True),
        "pools": Batches(workload, False),
        "engine": InEngine(workload, options.layers_per_look),
    }
    for criterion in (workload.criterion_of_rows(()), ScheduledExit(1)):
        workload.classifier.criterion = criterion
        for size in (1, 2, _MAX_ROWS, _OFFLINE_ROWS):
            workload.classifier.warmup(size, sorted({*map(int, workload.dataset.lengths)}))
    at_once = rows_per_second_at_once(workload, ways)
    per_run = seconds / (len(options.load) * len(_WAYS) * options.rounds)
    records, limit = [], None
    for load in options.load:
        rate = load * at_once["pools"]
        rows = int(np.clip(rate * per_run, 50, 5000))
        taken: dict[str, list[np.ndarray]] = {way: [] for way in _WAYS}
        spans = dict.fromkeys(_WAYS, 0.0)
        for seed in range(options.rounds):
            arrivals = arrivals_of(rate, rows, options.bursts, seed)
            for way, server in ways.items():
                of_round = latencies(server.submit, arrivals)
                taken[way].append(of_round)
                spans[way] += float((arrivals + of_round).max())
        for way in ("pools", "full", "engine"):
            seconds_of_rows = np.concatenate(taken[way])
            limit = limit or options.limit * float(np.median(seconds_of_rows))
            records.append(
                {
                    "model": workload.name,
                    "load": load,
                    "way": way,
                    "rows": rows * options.rounds,
                    "p50 ms": 1000 * float(np.median(seconds_of_rows)),
                    "p99 ms": 1000 * float(np.quantile(seconds_of_rows, 0.99)),
                    "rows/s": rows * options.rounds / spans[way],
                    "goodput": float((seconds_of_rows <= limit).sum()) / spans[way],
                }
            )
    for server in ways.values():
        server.close()
    return records, at_once


def rows_per_second_at_once(workload: Workload, ways) -> dict:
    """Return the rows per second of one call, of the pools and of the engine, in turns."""
    rows, samples = len(workload.dataset), collections.defaultdict(list)
    for _ in range(3):
        start = time.monotonic()
        workload.predict(range(rows))
        samples["one call"].append(time.monotonic() - start)
        for way in ("pools", "engine"):
            start = time.monotonic()
            concurrent.futures.wait([ways[way].submit(row) for row in range(rows)])
            samples[way].append(time.monotonic() - start)
    medians = {way: statistics.median(values) for way, values in samples.items()}
    return {"model": workload.name, **{way: rows / value for way, value in medians.items()}}


def draw(path, records: list[dict]) -> None:
    """Draw the median and the 99th percentile against the load, one panel per model."""
    records = [record for record in records if "load" in record]
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, axes = figures.panels(len(models), height=3.4)
    colors = {"full": figures.GRAY, "pools": figures.ORANGE, "engine": figures.BLUE}
    markers = {"full": "^", "pools": "s", "engine": "o"}
    for axis, model in zip(axes, models, strict=True):
        for way in _WAYS:
            chosen = [r for r in records if (r["model"], r["way"]) == (model, way)]
            loads = [record["load"] for record in chosen]
            for name, style in (("p50 ms", "-"), ("p99 ms", "--")):
                values = [record[name] for record in chosen]
                axis.plot(
                    loads,
                    values,
                    style,
                    marker=markers[way],
                    color=colors[way],
                    label=f"{way}, {name[:3]}",
                )
        axis.set(xlabel="load (1: the capacity of pools)", yscale="log", title=model)
        axis.set_ylabel("latency in milliseconds")
    figures.save(figure, path)


def main(options) -> None:
    if options.checkpoint:
        names, workloads = ["SST-2"], [checkpoint_workload(options)]
    else:
        names = options.model
        workloads = (shaped_workload(name, options.dtype) for name in options.model)
    budget = Budget(options.budget_minutes, len(names))
    records, at_once = [], []
    for workload in workloads:
        of_model, rates = measure(workload, options, budget.next_case())
        print()
        command_line.print_records(of_model, list(of_model[0]))
        print("\nrows/s when all rows are there at once:")
        command_line.print_records([rates], list(rates))
        records += of_model
        at_once.append(rates)
    name = "serving_bursts" if options.bursts else "serving"
    draw(options.output / f"{name}.png", records)
    command_line.save(options.output, name, options, records + at_once)


def _loads(text: str) -> list[float]:
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = [0.0]
    if min(loads) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of shares")
    return loads


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    command_line.add_shapes(parser, "minilm,albert-base")
    parser.add_argument("--checkpoint", help="a trained checkpoint of SST-2")
    parser.add_argument("--data_dir", help="directory of GLUE's task directories")
    command_line.add_dtype(parser)
    command_line.add_budget(parser, 10)
    command_line.add_rounds(parser, 2)
    command_line.add_compilation_cache(parser)
    parser.add_argument("--load", type=_loads, default=[0.3, 0.5, 0.7, 0.85, 1.0])
    parser.add_argument("--bursts", action="store_true", help="rows arrive in groups")
    parser.add_argument("--limit", type=float, default=5.0, help="latency limit of the goodput")
    parser.add_argument("--layers_per_look", type=command_line.positive_integer, default=1)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
