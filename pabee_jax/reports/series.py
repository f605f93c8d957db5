"""Operating points grouped by criterion, for a plot with one line per criterion."""

import dataclasses
from collections.abc import Sequence

from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.criteria import ExitCriterion, Patience, describe, name_of


@dataclasses.dataclass(frozen=True)
class Series:
    """The operating points of one criterion.

    Attributes:
        title: the legend entry, which says what the labels are: "vote (number: votes)".
        points: the operating points in the given order.
        labels: the text next to the marker of each operating point.
        is_patience: whether the criterion is `Patience`.
    """

    title: str
    points: Sequence[OperatingPoint]
    labels: Sequence[str]
    is_patience: bool


def series_of(points: Sequence[OperatingPoint]) -> list[Series]:
    """Return one series per criterion name, the series of patience first."""
    by_name: dict[str, list[OperatingPoint]] = {}
    for point in points:
        by_name.setdefault(name_of(point.criterion), []).append(point)
    all_series = [_series(name, group) for name, group in by_name.items()]
    return sorted(all_series, key=lambda series: not series.is_patience)


def _series(name: str, points: Sequence[OperatingPoint]) -> Series:
    settings = [point.criterion for point in points]
    shared, labels = _split_fields([_fields(setting, name) for setting in settings])
    words = {label.rpartition(" ")[0] for label in labels}
    explanations = list(shared)
    if len(words) == 1:
        word = words.pop()
        if word and ", " not in word:
            labels = [label.rpartition(" ")[2] for label in labels]
            explanations.insert(0, f"number: {'value' if word == name else word}")
    title = f"{name} ({'; '.join(explanations)})" if explanations else name
    return Series(title, points, labels, isinstance(settings[0], Patience))


def _fields(setting: ExitCriterion, name: str) -> list[str]:
    """Return the fields of a setting as text: ["patience 2", "threshold 0.1"]."""
    return describe(setting).removeprefix(f"{name}, ").split(", ")


def _split_fields(fields: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Return the fields that all settings share, and the other fields of each setting as text.

    If the settings do not differ, the fields of the settings are not shared.
    """
    shared = [text for text in fields[0] if all(text in other for other in fields)]
    if any(len(texts) == len(shared) for texts in fields):
        shared = []
    others = [", ".join(text for text in texts if text not in shared) for texts in fields]
    return shared, others
