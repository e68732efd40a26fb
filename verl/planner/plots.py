"""Plots of a reshard plan: bytes between ranks, and its cost against other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from verl.planner.traffic import Counts, ReshardCost


def draw(path: Path, between: Counts, costs: list[ReshardCost], model_bytes: int) -> None:
    """Write a picture: a heat map of the bytes between ranks, and bars of each method's traffic and memory.

    Args:
        path: of the picture; its suffix decides the format.
        between: bytes by sender and receiver, [N, N].
        costs: of the plan and of other methods.
        model_bytes: of all weights.
    """
    # Settings of the user's matplotlibrc must not change the sizes in the picture.
    with matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        senders, bars = figure.subplots(1, 2, width_ratios=(1, 1.2))
        _draw_map(figure, senders, between)
        _draw_bars(bars, costs, model_bytes)
        figure.legend(loc="outside lower right", ncols=2, fontsize=8)
        figure.savefig(path, dpi=150)


def _draw_map(figure: Figure, axes: Any, between: Counts) -> None:
    # Pairs that send nothing stay white.
    shown = np.ma.masked_equal(between / 1e9, 0)
    image = axes.imshow(shown, cmap="viridis_r", interpolation="nearest")
    axes.set(title="bytes between ranks", xlabel="receiving rank", ylabel="sending rank")
    axes.locator_params(integer=True)
    figure.colorbar(image, ax=axes, label="GB", shrink=0.85)


def _draw_bars(axes: Any, costs: list[ReshardCost], model_bytes: int) -> None:
    rows = np.arange(len(costs))
    height = 0.38
    for offset, values, label, color in (
        (-height / 2, [cost.received_bytes for cost in costs], "received by the busiest rank", "tab:blue"),
        (height / 2, [cost.peak_bytes for cost in costs], "peak memory of a rank", "tab:orange"),
    ):
        bars = axes.barh(
            rows + offset, [value / model_bytes for value in values], height, label=label, color=color
        )
        axes.bar_label(bars, [f"{value / 1e9:.3g} GB" for value in values], padding=3, fontsize=8)
    axes.set_yticks(rows, [cost.way for cost in costs])
    axes.invert_yaxis()
    axes.set(title="against other methods", xlabel="share of the model")
    axes.margins(x=0.18)
