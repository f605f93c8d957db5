"""What the figures of the benchmarks share: their width, panels, colors, and the bar chart."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Inches. At this width, the text of a figure is readable where the figure is 700 pixels wide.
_WIDTH = 7.6
_DPI = 140
# Colors of Okabe and Ito, which do not depend on color vision.
BLACK, GRAY, BLUE, ORANGE, GREEN = "#000000", "#777777", "#0072b2", "#d55e00", "#009e73"


def panels(count: int, height: float = 2.8, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, at most `columns` side by side, each `height` high."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.axis("off")
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    return figure, axes[:count]


def save(figure: Figure, path: Path, legend_columns: int = 3) -> None:
    """Write the figure with one legend below the panels, in which every label stands once."""
    entries = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if entries:
        figure.legend(
            entries.values(),
            entries,
            ncols=legend_columns,
            fontsize=9,
            frameon=False,
            loc="outside lower center",
        )
    figure.savefig(path, dpi=_DPI)


def draw_bars(
    path: Path,
    names: Sequence[str],
    values: Sequence[float],
    xlabel: str,
    number_format: str,
    colors: Sequence[str] | None = None,
) -> None:
    """Write a chart with one horizontal, labeled bar per name, the first name at the top."""
    figure, (axis,) = panels(1, height=0.45 * len(names) + 1)
    axis.grid(visible=False)
    axis.bar_label(
        axis.barh(names, values, color=colors or BLUE), fmt=number_format, padding=3, fontsize=9
    )
    axis.invert_yaxis()
    axis.set(xlabel=xlabel)
    save(figure, path)
