"""Tests of the plots: what a reader can tell apart, checked on the drawn figures."""

import itertools

import numpy as np
import pytest
from matplotlib.transforms import Bbox

from pabee_jax.analysis.curves import Curve
from pabee_jax.analysis.operating_points import OperatingPoint
from pabee_jax.criteria import Divergence, Entropy, ExitCriterion, Margin, Patience, Vote
from pabee_jax.reports import plots

LAYERS = 12
PATIENCE_BLUE = "#1f5fa8"


def curve(name, setting, layers, scores):
    settings = [setting] * len(layers)
    return Curve(name, settings, np.array(layers), np.array(scores), (0.5, 0.9), LAYERS)


def point(setting: ExitCriterion, mean_exit_layer: int, score: float) -> OperatingPoint:
    exit_layers = np.full(4, mean_exit_layer)
    return OperatingPoint(setting, exit_layers, np.zeros((4, 2)), {"accuracy": score}, LAYERS)


def lines_of(figure):
    """Return the lines of the figure without the dashed line at full depth."""
    (axes,) = figure.axes
    return [line for line in axes.lines if line.get_label() != "full depth"]


def legend_texts(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_curves_that_coincide_share_a_line_and_patience_is_first_and_strongest():
    confident = ([9.0, 6.0, 3.0], [0.9, 0.88, 0.8])
    figure = plots.curves_figure(
        [
            curve("margin", Margin(0.5), *confident),
            curve("divergence, patience 1", Divergence(1, 0.1), [9.0, 4.0], [0.85, 0.7]),
            # A repeated point, and a difference by rounding, do not change the curve.
            curve("entropy", Entropy(0.5), [9.0, 6.0, 6.0, 3.0], [0.9, 0.88, 0.88, 0.8 + 1e-9]),
            curve("patience", Patience(1), [8.0, 5.0], [0.9, 0.8]),
            curve("vote", Vote(2), [8.0, 5.0], [0.9, 0.79]),
        ],
        "accuracy",
        "title",
    )
    assert legend_texts(figure) == [
        *("patience", "margin, entropy", "divergence, patience 1", "vote", "full depth")
    ]
    patience, *others = lines_of(figure)
    assert patience.get_color() == PATIENCE_BLUE
    assert patience.get_linewidth() > max(line.get_linewidth() for line in others)
    assert patience.get_zorder() > max(line.get_zorder() for line in others)
    assert PATIENCE_BLUE not in {line.get_color() for line in others}


def test_two_lines_differ_in_color_and_line_style_or_marker():
    names = [f"criterion {index}" for index in range(20)]
    curves = [
        curve(name, Entropy(0.5), [6.0], [0.6 + index / 100]) for index, name in enumerate(names)
    ]
    curves += [curve(f"patience, {p}", Patience(p), [6.0], [0.5 + p / 100]) for p in (1, 2, 3)]
    lines = lines_of(plots.curves_figure(curves, "accuracy", "title"))
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == 23


@pytest.mark.parametrize("count", [1, 12, 40])
def test_the_legend_is_not_larger_than_the_plot(count):
    curves = [
        curve(f"patient_confidence, patience {index}", Entropy(0.5), [6.0], [0.5 + index / 100])
        for index in range(count)
    ]
    figure = plots.curves_figure(curves, "accuracy", "title")
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    window, box = axes.get_window_extent(), legend.get_window_extent()
    assert box.height <= figure.bbox.height and box.width < window.width
    assert not Bbox.intersection(window, box), "the legend covers the plot"


def test_no_line_connects_points_of_different_criteria():
    points = [
        point(Entropy(0.3), 6, 0.8),
        point(Patience(0), 12, 0.9),
        point(Entropy(0.6), 4, 0.7),
        point(Vote(2), 3, 0.75),
        point(Patience(1), 2, 0.6),
    ]
    figure = plots.tradeoff_figure(points, "title")
    drawn = [set(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines_of(figure)]
    # The layer speed-up is 12 / mean exit layer.
    assert drawn == [{(1, 90), (6, 60)}, {(2, 80), (3, 70)}, {(4, 75)}]
    assert len({line.get_marker() for line in lines_of(figure)}) == 3
    assert legend_texts(figure) == [
        *("patience (number: value)", "entropy (number: threshold)", "vote (number: votes)"),
        "full depth",
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "1", "0.3", "0.6", "2"]


def test_labels_do_not_overlap_and_settings_that_coincide_share_a_label():
    layers_and_scores = [
        *((12, 0.9), (3, 0.83), (4, 0.86), (5, 0.89), (6, 0.9), (7, 0.901), (8, 0.9), (12, 0.9))
    ]
    points = [point(Patience(p), *values) for p, values in enumerate(layers_and_scores)]
    points += [point(Vote(v), v + 1, score) for v, score in ((2, 0.83), (3, 0.861), (4, 0.885))]
    figure = plots.tradeoff_figure(points, "title")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} >= {"0, 7", "1", "2", "3", "4", "5", "6"}
    boxes = [text.get_window_extent() for text in axes.texts]
    for first, second in itertools.combinations(boxes, 2):
        assert not Bbox.intersection(first, second), (
            f"the labels at {first.extents} and {second.extents} overlap"
        )
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_the_settings_of_one_point_are_in_the_order_of_their_numbers():
    figure = plots.tradeoff_figure([point(Patience(p), LAYERS, 0.9) for p in (0, 3, 23)], "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0, 3, 23"]


@pytest.mark.parametrize(
    "points",
    [
        [point(Patience(3), 6, 0.8)],
        [point(Patience(0), 12, float("nan")), point(Patience(1), 12, float("nan"))],
        [point(Divergence(1, 0.1), 6, 0.8), point(Divergence(2, 0.1), 8, 0.8)],
    ],
    ids=["one point", "undefined metric", "one metric"],
)
def test_a_plot_of_few_or_undefined_points_is_written(tmp_path, points):
    # The title holds half of a surrogate pair and dollar signs, which the name of a run may hold.
    plots.plot_tradeoff(tmp_path / "plot.png", points, "\ud800 $x$")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
