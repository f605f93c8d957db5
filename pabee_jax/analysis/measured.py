"""Operating points measured with a driver that skips layers, with optional timing."""

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
    """Run the classifier over all rows once per setting, and return the operating points.

    The function overwrites `classifier.criterion`.
    """
    points = []
    for setting in settings:
        classifier.criterion = setting
        predictions = classifier.predict(rows.dataset, batch_size)
        points.append(
            point_of(
                setting,
                predictions.exit_layers,
                predictions.logits,
                classifier.num_layers,
                task,
                rows,
            )
        )
    return points


def timed(
    points: Sequence[OperatingPoint],
    classifier: EarlyExitClassifier,
    rows: Rows,
    batch_size: int | None,
) -> list[OperatingPoint]:
    """Return the operating points with their wall-clock times.

    The time of a setting is the median of three runs over all rows, after one run that compiles.
    `predict` returns arrays on the host, so a run is complete when the clock is read. The settings
    are interleaved, so that a temporary slowdown of the machine affects all settings. The function
    overwrites `classifier.criterion`.
    """
    settings = [Patience(0), *(point.criterion for point in points)]
    seconds = np.empty((_TIMED_REPEATS, len(settings)))
    for repeat in range(-1, _TIMED_REPEATS):
        for index, setting in enumerate(settings):
            classifier.criterion = setting
            start_time = time.perf_counter()
            classifier.predict(rows.dataset, batch_size)
            seconds[repeat, index] = time.perf_counter() - start_time
    full_depth, *medians = np.median(seconds, axis=0)
    return [
        dataclasses.replace(
            point,
            milliseconds=1000 * float(median) / len(rows.dataset),
            wall_clock_speedup=float(full_depth / median),
        )
        for point, median in zip(points, medians, strict=True)
    ]
