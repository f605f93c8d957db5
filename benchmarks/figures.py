"""The bar chart that several benchmarks draw."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_bars(
    path: Path,
    names: Sequence[str],
    values: Sequence[float],
    xlabel: str,
    number_format: str,
    colors: Sequence[str] | None = None,
) -> None:
    """Write a chart with one horizontal, labeled bar per name, the first name at the top."""
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(names) + 1))
    axis.bar_label(axis.barh(names, values, color=colors), fmt=number_format, padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
