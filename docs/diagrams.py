"""Draws the two diagrams of early-exit.md: python docs/diagrams.py."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import patches
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
RUNS, SKIPPED, LEAVES = "#0072b2", "#e3e3e3", "#d55e00"


def layer_box(axis, x, y, color, width=0.9, height=0.8):
    axis.add_patch(
        patches.FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=color,
            edgecolor="none",
        )
    )


def draw_loop(path: Path) -> None:
    """Draw one text that leaves at layer 6 of 8, with patience 2."""
    predictions, counters, exit_layer = ["+", "-", "-", "+", "+", "+"], [0, 0, 1, 0, 1, 2], 6
    figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for layer in range(1, 9):
        runs = layer <= exit_layer
        layer_box(axis, layer, 1, RUNS if runs else SKIPPED)
        axis.text(
            layer,
            1,
            f"layer {layer}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if runs else "#777777",
        )
        if runs:
            axis.annotate("", (layer, 2.05), (layer, 1.42), arrowprops={"arrowstyle": "->"})
            leaves = layer == exit_layer
            color = LEAVES if leaves else "black"
            axis.text(
                layer,
                2.35,
                predictions[layer - 1],
                ha="center",
                va="center",
                fontsize=15,
                color=color,
            )
            axis.text(
                layer,
                2.95,
                counters[layer - 1],
                ha="center",
                va="center",
                fontsize=10,
                color=color,
                weight="bold" if leaves else "normal",
            )
    axis.text(0.35, 1, "text", ha="right", va="center", fontsize=10)
    axis.text(0.35, 2.35, "prediction", ha="right", va="center", fontsize=9)
    axis.text(0.35, 2.95, "counter", ha="right", va="center", fontsize=9)
    axis.text(
        exit_layer + 0.55,
        2.65,
        "patience 2 is reached:\nthe text leaves",
        ha="left",
        va="center",
        fontsize=9,
        color=LEAVES,
    )
    axis.text(7.5, 0.3, "not run", ha="center", fontsize=9, color="#777777")
    axis.set(xlim=(-0.7, 8.6), ylim=(0.1, 3.3))
    axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_pool(path: Path) -> None:
    """Draw eight texts that leave a pool at different layers."""
    exit_layers = [2, 5, 3, 8, 2, 4, 3, 6]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for row, exit_layer in enumerate(exit_layers):
        y = len(exit_layers) - row
        axis.text(0.4, y, f"text {row + 1}", ha="right", va="center", fontsize=9)
        for layer in range(1, 9):
            color = RUNS if layer < exit_layer else LEAVES if layer == exit_layer else SKIPPED
            layer_box(axis, layer, y, color, height=0.7)
        axis.text(exit_layer, y, "exit", ha="center", va="center", fontsize=8, color="white")
    for layer in range(1, 9):
        remaining = sum(exit_layer >= layer for exit_layer in exit_layers)
        axis.text(layer, 9.0, f"layer {layer}", ha="center", fontsize=9)
        axis.text(layer, 0.05, f"{remaining} of 8", ha="center", fontsize=9)
    axis.text(0.4, 0.05, "texts that run", ha="right", fontsize=9)
    axis.set(xlim=(-1.0, 8.6), ylim=(-0.2, 9.5))
    axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_loop(FOLDER / "early_exit_loop.png")
    draw_pool(FOLDER / "early_exit_pool.png")
