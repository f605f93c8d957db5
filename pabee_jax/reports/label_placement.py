"""Placement of the labels of markers, so that no label covers another label or a marker."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# The directions from a marker to its label in order of preference, and the gaps in points.
_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
_GAPS = (5.0, 14.0, 26.0)
_MARKER_SIZE = 6.0
# The free space at both sides of a label, in points: "8" and "4" must not read as "84".
_SIDE = 1.5
# Lines are sampled at this number of points per segment.
_SAMPLES = 40
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Label:
    """The label of a marker.

    Attributes:
        x, y: the coordinates of the marker in data units.
        text: the text of the label.
        color: the color of the text, which is the color of the marker.
    """

    x: float
    y: float
    text: str
    color: str


def place_labels(axes: Any, labels: Sequence[Label]) -> list[Any]:
    """Write each label next to its marker, where it covers as little as possible.

    Labels of one color whose markers overlap are joined to one label. Call last: the function
    measures what is drawn.

    Returns:
        The matplotlib annotations.
    """
    figure = axes.get_figure()
    figure.draw_without_rendering()  # Sets the size of the axes and of the texts.
    scale = figure.dpi / 72
    labels = _joined(axes, labels, _MARKER_SIZE * scale)
    centers = axes.transData.transform([(label.x, label.y) for label in labels])
    half = _MARKER_SIZE * scale / 2
    occupied: list[Box] = [(x - half, y - half, x + half, y + half) for x, y in centers]
    samples, frame = _samples(axes), axes.get_window_extent().extents
    annotations = []
    for label, (x, y) in zip(labels, centers, strict=True):
        annotation = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            color=label.color,
            zorder=6,
        )
        annotation.set_in_layout(False)
        extent = annotation.get_window_extent()
        size = (extent.width + 2 * _SIDE * scale, extent.height)
        offsets = [
            (right * (size[0] / 2 + gap * scale), up * (size[1] / 2 + gap * scale))
            for gap, (right, up) in itertools.product(_GAPS, _DIRECTIONS)
        ]
        boxes = [_box(x + right, y + up, size) for right, up in offsets]
        costs = [_cost(box, occupied, samples, frame) for box in boxes]
        best = int(np.argmin(costs))  # The first of equal costs.
        annotation.xyann = tuple(value / scale for value in offsets[best])
        occupied.append(boxes[best])
        annotations.append(annotation)
    return annotations


def _joined(axes, labels: Sequence[Label], distance: float) -> list[Label]:
    joined: list[Label] = []
    for label in labels:
        position = axes.transData.transform((label.x, label.y))
        for index, other in enumerate(joined):
            gap = position - axes.transData.transform((other.x, other.y))
            if other.color == label.color and np.hypot(*gap) < distance:
                joined[index] = dataclasses.replace(other, text=f"{other.text}, {label.text}")
                break
        else:
            joined.append(label)
    return joined


def _samples(axes) -> Float[np.ndarray, "points 2"]:
    """Return points on the lines of the axes, in pixels."""
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    return np.concatenate([path.interpolated(_SAMPLES).vertices for path in paths])


def _box(x: float, y: float, size: tuple[float, float]) -> Box:
    width, height = size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _cost(box: Box, occupied: Sequence[Box], samples: np.ndarray, frame: np.ndarray) -> float:
    """Return the cost of a place: covering a label or a marker is worse than crossing a line."""
    left, bottom, right, top = box
    covered = sum(
        max(0.0, min(right, other[2]) - max(left, other[0]))
        * max(0.0, min(top, other[3]) - max(bottom, other[1]))
        for other in occupied
    )
    outside = left < frame[0] or bottom < frame[1] or right > frame[2] or top > frame[3]
    crossed = (samples > (left, bottom)) & (samples < (right, top))
    return 1000 * covered + 1e6 * outside + crossed.all(axis=1).sum()
