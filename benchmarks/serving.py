"""Latency under load: the engine beside full depth and early exit in batches, first in first out.

    python -m benchmarks.serving --model minilm,albert-base

Rows arrive at random times (Poisson, or --bursts: in groups), whether or not earlier rows have been
answered. The exit layers are given, with a mean of half of the depth. Three ways to answer:

    full    waiting rows run in one batch at full depth
    pools   waiting rows run in one pool, and are answered when the last of them has exited
    engine  pabee_jax.inference.engine: every row is answered when it exits

The load is relative to the rows per second of "pools" when all rows are there at once. "goodput" is
the rows per second that are answered within --limit times the median latency of "pools" at the
lowest load.
"""

import argparse
import collections
import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import command_line
from benchmarks.exit_schedule import ExitSchedule, binomial_exit_layers
from benchmarks.measure import Budget
from benchmarks.models import random_model
from pabee_jax import EarlyExitClassifier, FixedLayer
from pabee_jax.checkpoints.pretrained import Pretrained
from pabee_jax.data.dataset import Dataset
from pabee_jax.inference.engine import Engine, EngineConfig

_MAX_LENGTH = 128
_MEAN_LENGTH, _LENGTH_SPREAD = 24, 0.5
_MAX_ROWS = 64
_WAYS = ("full", "pools", "engine")
Answers = list[concurrent.futures.Future]
Submit = Callable[[int], concurrent.futures.Future]


def random_rows(model, rows: int, seed: int = 0) -> Dataset:
    """Return rows whose lengths are log-normal."""
    random = np.random.default_rng(seed)
    lengths = random.lognormal(np.log(_MEAN_LENGTH), _LENGTH_SPREAD, rows)
    lengths = np.clip(lengths, 4, _MAX_LENGTH).astype(int)
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.where(mask, random.integers(1, model.config.vocab_size, mask.shape), 0)
    return Dataset(ids.astype(np.int32), mask.astype(np.int8), np.zeros(mask.shape, np.int8))


class Batches:
    """Runs all waiting rows together, again and again; a row is answered with its batch."""

    def __init__(self, classifier: EarlyExitClassifier, rows: Dataset, exit_layers: np.ndarray):
        self._classifier, self._rows, self._exit_layers = classifier, rows, exit_layers
        self._waiting: collections.deque = collections.deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, row: int) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            self._waiting.append((row, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def predict(self, rows: Sequence[int]) -> None:
        # The schedule always has the same size, so that the program is compiled once.
        schedule = np.ones(_MAX_ROWS, np.int32)
        schedule[: len(rows)] = self._exit_layers[list(rows)]
        self._classifier.criterion = ExitSchedule(schedule)
        self._classifier.predict(self._rows.take(np.array(rows)))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._is_closing:
                        return
                    self._changed.wait()
                count = min(_MAX_ROWS, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(count)]
            self.predict([row for row, _ in batch])
            for _, future in batch:
                future.set_result(None)


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


def arrivals_of(rate: float, rows: int, bursts: bool, seed: int = 1) -> np.ndarray:
    """Return the times of arrival in seconds: one by one, or in groups of 1 to 32 rows."""
    random = np.random.default_rng(seed)
    if not bursts:
        return np.cumsum(random.exponential(1 / rate, rows))
    sizes = random.integers(1, 33, rows)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), rows) + 1]
    times = np.cumsum(random.exponential(sizes.mean() / rate, len(sizes)))
    return np.repeat(times, sizes)[:rows]


def measure(name: str, options, seconds: float) -> list[dict]:
    """Return a record per way and load."""
    model = random_model(name, options.dtype)
    pretrained = Pretrained(model, None, {}, ("0", "1"), _MAX_LENGTH)
    layers = model.config.num_hidden_layers
    probe = random_rows(model, 512)
    exit_layers = binomial_exit_layers(512, (layers + 1) / 2, layers)
    pool = EarlyExitClassifier(pretrained)
    batches = Batches(pool, probe, exit_layers)
    for _ in range(2):  # The first time compiles.
        start = time.monotonic()
        for first in range(0, 512, _MAX_ROWS):
            batches.predict(range(first, first + _MAX_ROWS))
        capacity = 512 / (time.monotonic() - start)
    batches.close()
    per_run = seconds / (len(options.load) * len(_WAYS))
    records, limit = [], None
    for load in options.load:
        rate = load * capacity
        rows = int(np.clip(rate * per_run, 50, 5000))
        dataset = random_rows(model, rows, seed=2)
        scheduled = binomial_exit_layers(rows, (layers + 1) / 2, layers, seed=3)
        arrivals = arrivals_of(rate, rows, options.bursts)
        for way in ("pools", "full", "engine"):
            if way == "engine":
                settings = [FixedLayer(int(layer)) for layer in scheduled]
                config = EngineConfig(
                    max_tokens=options.max_tokens,
                    max_rows=_MAX_ROWS,
                    new_rows=_MAX_ROWS,
                    layers_per_look=options.layers_per_look,
                    max_waiting=rows,
                )
                engine = Engine(EarlyExitClassifier(pretrained), config)
                engine.warmup(FixedLayer(1))
                parts = [dataset.take(slice(row, row + 1)) for row in range(rows)]

                def submit(row, engine=engine, parts=parts, settings=settings):
                    return engine.submit(parts[row], settings[row])[0]

                close = engine.close
            else:
                depth = np.full(rows, layers, np.int32) if way == "full" else scheduled
                server = Batches(pool, dataset, depth)
                server.predict(range(min(rows, _MAX_ROWS)))
                submit, close = server.submit, server.close
            taken = latencies(submit, arrivals)
            close()
            limit = limit or options.limit * float(np.median(taken))
            span = float(arrivals[-1] + taken[-1])
            records.append(
                {
                    "model": name,
                    "load": load,
                    "way": way,
                    "rows": rows,
                    "p50 ms": 1000 * float(np.median(taken)),
                    "p99 ms": 1000 * float(np.quantile(taken, 0.99)),
                    "rows/s": rows / span,
                    "goodput": float((taken <= limit).sum()) / span,
                    "capacity of pools": capacity,
                }
            )
    return records


def draw(path, records: list[dict]) -> None:
    """Draw the median and the 99th percentile against the load, one panel per model."""
    models = list(dict.fromkeys(record["model"] for record in records))
    figure, axes = plt.subplots(
        1, len(models), figsize=(5 * len(models), 4), squeeze=False, layout="constrained"
    )
    colors = {"full": "#888888", "pools": "#c8553d", "engine": "#1f5fa8"}
    for axis, model in zip(axes[0], models, strict=True):
        for way in _WAYS:
            chosen = [r for r in records if (r["model"], r["way"]) == (model, way)]
            loads = [record["load"] for record in chosen]
            for name, style in (("p50 ms", "-o"), ("p99 ms", "--s")):
                values = [record[name] for record in chosen]
                axis.plot(loads, values, style, color=colors[way], label=f"{way}, {name[:3]}")
        axis.set(xlabel="load, of the capacity of pools", yscale="log", title=model)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("latency in ms")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options) -> None:
    budget = Budget(options.budget_minutes, len(options.model))
    records = []
    for name in options.model:
        of_model = measure(name, options, budget.next_case())
        print()
        command_line.print_records(of_model, list(of_model[0]))
        records += of_model
    draw(options.output / "serving.png", records)
    command_line.save(options.output, "serving", options, records)


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
    command_line.add_dtype(parser)
    command_line.add_budget(parser, 10)
    parser.add_argument("--load", type=_loads, default=[0.3, 0.5, 0.7, 0.85, 1.0])
    parser.add_argument("--bursts", action="store_true", help="rows arrive in groups")
    parser.add_argument("--limit", type=float, default=5.0, help="latency limit of the goodput")
    parser.add_argument("--max_tokens", type=command_line.positive_integer, default=1024)
    parser.add_argument("--layers_per_look", type=command_line.positive_integer, default=1)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
