"""Operating points from real runs of a classifier: each setting exits early, and can be timed."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from pabee_jax.analysis.operating_points import OperatingPoint, point_of
from pabee_jax.analysis.rows import Rows
from pabee_jax.criteria import ExitCriterion, Patience
from pabee_jax.data.task import Task
from pabee_jax.inference.classifier import EarlyExitClassifier

_TIMED_REPEATS = 3


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
            point_of(setting, found.exit_layers, found.logits, classifier.num_layers, task, rows)
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
