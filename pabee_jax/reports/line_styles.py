"""The colors, markers and legend entries of the plots' lines: patience first and strongest."""

import textwrap
from collections.abc import Sequence
from typing import Any

from pabee_jax.analysis.curves import Curve, grouped, is_patience

BLUE, RED, GRAY = "#1f5fa8", "#c8553d", "#888888"
# The colors of Okabe and Ito that differ from each other, and from patience's blue, for readers
# with any kind of color vision. Their yellow is left out: it is too light for a line on white.
_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", "*", ">")
_LINE_STYLES = ("-", "--", ":", "-.")
# A line has a marker at each of its points up to this number of points, else at about eight points.
_MOST_MARKERS = 20


def line_styles(for_patience: Sequence[bool]) -> list[dict[str, Any]]:
    """Return the properties of each line, as keyword arguments of `Axes.plot`.

    Args:
        for_patience: for each line, whether the line shows the patience criterion.
    """
    styles: list[dict[str, Any]] = []
    counts = {True: 0, False: 0}
    for is_strong in for_patience:
        index = counts[is_strong]
        counts[is_strong] += 1
        if is_strong:
            style = {"color": BLUE, "marker": "o", "linewidth": 2.8, "markersize": 6, "zorder": 4}
            line_style = _LINE_STYLES[index % len(_LINE_STYLES)]
        else:
            style = {"color": _COLORS[index % len(_COLORS)], "linewidth": 1.3, "zorder": 3}
            style |= {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4.5}
            line_style = _LINE_STYLES[index // len(_COLORS) % len(_LINE_STYLES)]
        styles.append(style | {"linestyle": line_style})
    return styles


def draw_curves(axes: Any, curves: Sequence[Curve], legend_width: int) -> int:
    """Draw one line per group of curves that coincide, and a dashed line at full depth.

    Args:
        axes: the matplotlib axes; its y axis is in percent.
        curves: one or more curves.
        legend_width: the number of characters after which the entries of the legend are wrapped.

    Returns:
        The number of text lines of the legend.
    """
    groups = grouped(curves)
    styles = line_styles([is_patience(group[0]) for group in groups])
    entries = [legend_entry([curve.name for curve in group], legend_width) for group in groups]
    for group, style, entry in zip(groups, styles, entries, strict=True):
        layers, scores = group[0].line
        every = 1 if len(layers) <= _MOST_MARKERS else len(layers) // 8
        axes.plot(layers, 100 * scores, label=entry, markevery=every, **style)
    full_depth = 100 * curves[0].ends[1]
    axes.axhline(full_depth, linestyle="--", color=GRAY, label="full depth", zorder=0)
    return 1 + sum(1 + entry.count("\n") for entry in entries)


def legend_entry(names: Sequence[str], width: int) -> str:
    """Return the names of a line as one text whose lines have at most `width` characters."""
    # A curve's name may hold a comma, as in "divergence, patience 1".
    separator = "; " if any(", " in name for name in names) else ", "
    return textwrap.fill(separator.join(names), width, break_long_words=False)
