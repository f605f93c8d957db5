"""What each setting of a criterion costs and gives, over one dataset."""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from pabee_jax.classifier import EarlyExitClassifier
from pabee_jax.criteria import ExitCriterion, Patience
from pabee_jax.data.task import Examples, Task
from pabee_jax.data.tokenization import Dataset
from pabee_jax.drivers.replay import replay
from pabee_jax.evaluation import metrics
from pabee_jax.predictions import predictions_of

_TIMED_REPEATS = 3
# What float32 allows: matrix products of different sizes differ by about 2e-6.
MARGIN = 1e-5


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of all parts of a split, one part after the other.

    Attributes:
        dataset: tokenised.
        texts: what a person would read; a pair as one text.
        ids, kinds: see `Examples`; kinds is None when the task has none.
        parts: which rows belong to which part ("dev", or MNLI's two).
    """

    dataset: Dataset
    texts: Sequence[str]
    ids: Sequence[str]
    kinds: Sequence[str] | None
    parts: Mapping[str, slice]

    @classmethod
    def of(cls, examples: Mapping[str, Examples], classifier: EarlyExitClassifier) -> "Rows":
        """Joins and tokenises the parts of a split."""
        values = list(examples.values())
        bounds = np.cumsum([0, *map(len, values)])
        texts = [text for part in values for text in part.texts]
        pairs = None
        if values[0].pairs is not None:
            pairs = [pair for part in values for pair in part.pairs or ()]
        labels = None
        if all(part.labels is not None for part in values):
            labels = np.concatenate([part.labels for part in values])
        dataset = classifier.tokenize(list(zip(texts, pairs, strict=True)) if pairs else texts)
        return cls(
            dataset=dataclasses.replace(dataset, labels=labels),
            texts=texts
            if pairs is None
            else [" | ".join(pair) for pair in zip(texts, pairs, strict=True)],
            ids=[id_ for part in values for id_ in part.ids],
            kinds=[kind for part in values for kind in part.kinds or ()] or None,
            parts={
                name: slice(start, stop)
                for name, start, stop in zip(examples, bounds, bounds[1:], strict=False)
            },
        )

    def take(self, chosen: Int[np.ndarray, " some"]) -> "Rows":
        """Some of the rows, by their ascending indices."""
        return Rows(
            dataset=self.dataset.take(chosen),
            texts=[self.texts[index] for index in chosen],
            ids=[self.ids[index] for index in chosen],
            kinds=None if self.kinds is None else [self.kinds[index] for index in chosen],
            parts={
                name: slice(*np.searchsorted(chosen, (where.start, where.stop)).tolist())
                for name, where in self.parts.items()
            },
        )


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """One setting on one dataset: a row of the table.

    Attributes:
        criterion: the setting.
        exit_layers: (N,) int, from 1.
        logits: (N, C) of the exits that were taken.
        metrics: by name, fractions; empty without labels.
        num_layers: L.
        milliseconds: per example, if it was timed.
        wall_clock_speedup: measured time at full depth over measured time here, if timed.
    """

    criterion: ExitCriterion
    exit_layers: Int[np.ndarray, " rows"]
    logits: Float[np.ndarray, "rows classes"]
    metrics: Mapping[str, float]
    num_layers: int
    milliseconds: float | None = None
    wall_clock_speedup: float | None = None

    @property
    def mean_exit_layer(self) -> float:
        return float(self.exit_layers.mean())

    @property
    def layers_saved(self) -> float:
        """1 - mean exit layer / L: what the original's code prints as "Speed Up"."""
        return 1 - self.mean_exit_layer / self.num_layers

    @property
    def layer_speedup(self) -> float:
        """L / mean exit layer."""
        return self.num_layers / self.mean_exit_layer


def replayed(
    logits: Float[np.ndarray, "exits rows classes"],
    settings: Sequence[ExitCriterion],
    task: Task,
    rows: Rows,
) -> list[OperatingPoint]:
    """Every setting from one pass over the data."""
    return [
        _point(setting, *map(np.asarray, replay(setting, logits)), len(logits), task, rows)
        for setting in settings
    ]


def run(
    classifier: EarlyExitClassifier,
    settings: Sequence[ExitCriterion],
    task: Task,
    rows: Rows,
    batch_size: int | None,
) -> list[OperatingPoint]:
    """Every setting by really leaving early, one run each."""
    points = []
    for setting in settings:
        classifier.criterion = setting
        found = classifier.predict(rows.dataset, batch_size)
        points.append(
            _point(setting, found.exit_layers, found.logits, classifier.num_layers, task, rows)
        )
    return points


def timed(
    points: Sequence[OperatingPoint],
    classifier: EarlyExitClassifier,
    rows: Rows,
    batch_size: int | None,
) -> list[OperatingPoint]:
    """Adds measured times: the median of three runs over all rows, after one that compiles.

    `predict` returns arrays on the host, so each run is complete when the clock is read. The
    settings take turns, so that a slow moment of the machine does not fall on one of them.
    """
    settings = [Patience(0), *(point.criterion for point in points)]
    seconds = np.empty((_TIMED_REPEATS, len(settings)))
    for repeat in range(-1, _TIMED_REPEATS):
        for index, setting in enumerate(settings):
            classifier.criterion = setting
            started = time.perf_counter()
            classifier.predict(rows.dataset, batch_size)
            seconds[repeat, index] = time.perf_counter() - started
    full_depth, *medians = np.median(seconds, axis=0)
    return [
        dataclasses.replace(
            point,
            milliseconds=1000 * float(median) / len(rows.dataset),
            wall_clock_speedup=float(full_depth / median),
        )
        for point, median in zip(points, medians, strict=True)
    ]


def agreement(
    found: Sequence[OperatingPoint], expected: Sequence[OperatingPoint], logits: np.ndarray
) -> str:
    """How many exits differ from those that the full pass says, in a sentence.

    Products of different batch sizes round differently, so a row may leave elsewhere when it hangs
    on a close decision; no other row may.
    """
    exits = moved = close = 0
    for one, other in zip(found, expected, strict=True):
        elsewhere = one.exit_layers != other.exit_layers
        exits, moved = exits + len(elsewhere), moved + int(elsewhere.sum())
        close += int((elsewhere & hangs_on_rounding(other.criterion, logits)).sum())
    return (
        f"{moved} of {exits} exits are at another layer than in the full pass ({close} of them "
        f"hang on a decision closer than {MARGIN:g})"
    )


def hangs_on_rounding(
    criterion: ExitCriterion, logits: Float[np.ndarray, "exits rows classes"]
) -> Bool[np.ndarray, " rows"]:
    """Which rows leave elsewhere, or answer another class, when logits move by `MARGIN`.

    One class after the other is moved up and down, at all exits alike and at every second one the
    other way: a decision hangs on one exit's logits, or on those of two neighbours.
    """
    exit_layers, answers = map(np.asarray, replay(criterion, logits))
    alternating = np.where(np.arange(len(logits)) % 2, 1, -1)
    found = np.zeros(logits.shape[1], bool)
    for signs, one_class in itertools.product(
        (1, -1, alternating, -alternating), range(logits.shape[2])
    ):
        moved = logits.copy()
        moved[:, :, one_class] += MARGIN * np.reshape(signs, (-1, 1))
        moved_layers, moved_answers = map(np.asarray, replay(criterion, moved))
        found |= moved_layers != exit_layers
        if logits.shape[2] > 1:
            found |= predictions_of(moved_answers) != predictions_of(answers)
    return found


def mean_exit_by_kind(point: OperatingPoint, kinds: Sequence[str]) -> dict[str, float]:
    """The mean exit layer of each kind of example, in order of first appearance."""
    each = np.asarray(kinds)
    return {kind: float(point.exit_layers[each == kind].mean()) for kind in dict.fromkeys(kinds)}


def _point(setting, exit_layers, logits, num_layers, task: Task, rows: Rows) -> OperatingPoint:
    return OperatingPoint(setting, exit_layers, logits, metrics_of(logits, task, rows), num_layers)


def metrics_of(
    logits: Float[np.ndarray, "rows classes"], task: Task, rows: Rows
) -> dict[str, float]:
    """The task's metrics; with several parts each name says its part (accuracy_matched)."""
    labels = rows.dataset.labels
    if labels is None:
        return {}
    result = {}
    for part, where in rows.parts.items():
        suffix = f"_{part.partition('_')[2]}" if len(rows.parts) > 1 else ""
        values = metrics.compute(task.metrics, logits[where], labels[where])
        result |= {f"{name}{suffix}": value for name, value in values.items()}
    return result
