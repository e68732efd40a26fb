"""Curves and tables of answers for the terminal, and curves as PNG files."""

from __future__ import annotations

import importlib
import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from verl.monitoring.formatting import format_number, printable

_MAX_SAMPLE_CHARS = 600
# Bits of the eight dots of a braille character, https://www.unicode.org/charts/PDF/U2800.pdf.
_BRAILLE_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def terminal_curve(
    series: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    width: int = 72,
    height: int = 14,
    title: str = "",
) -> str:
    """A plot of curves as plain text: one in braille dots, several with a letter each and a legend.

    Values are at 1, 2, ... from left to right. Gaps of values that are not finite are interpolated. If there
    are more values than dots, neighbours are averaged.

    Args:
        series: values of one curve, or of several by name.
        width: characters of a line, labels included.
        height: lines of the plot, without title, axis and legend.
        title: a line above the plot.

    Returns:
        Lines without a final newline.
    """
    curves = dict(series) if isinstance(series, Mapping) else {"": series}
    finite = [value for values in curves.values() for value in values if math.isfinite(value)]
    if not finite:
        return f"{title}: no finite values".removeprefix(": ")
    low, high = min(finite), max(finite)
    if low == high:
        low, high = low - 0.5, high + 0.5
    labels = {
        0: format_number(high),
        height // 2: format_number(high - (high - low) * (height // 2) / max(height - 1, 1)),
        height - 1: format_number(low),
    }
    margin = max(len(label) for label in labels.values())
    columns = max(width - margin - 2, 1)
    cells = [[" "] * columns for _ in range(height)]
    longest, letters = max(len(values) for values in curves.values()), string.ascii_lowercase
    for index, values in enumerate(curves.values()):
        # A character holds 4 x 2 dots.
        dots = _rasterize(values, longest, low=low, high=high, shape=(height * 4, columns * 2))
        codes = np.einsum("aibj,ij->ab", dots.reshape(height, 4, columns, 2).astype(int), _BRAILLE_BITS)
        for row, column in zip(*np.nonzero(codes), strict=True):
            braille = chr(0x2800 + int(codes[row, column]))
            cells[row][column] = braille if len(curves) == 1 else letters[index % 26]
    lines = [title] if title else []
    lines += [f"{labels.get(row, ''):>{margin}} ┤{''.join(line)}".rstrip() for row, line in enumerate(cells)]
    lines.append(f"{'':>{margin}} └{'─' * columns}")
    lines.append(f"{'':>{margin}}  1{longest:>{max(columns - 1, 1)}}")
    if len(curves) > 1:
        lines.append("   ".join(f"{letters[index % 26]} {name}" for index, name in enumerate(curves)))
    return "\n".join(lines)


def _rasterize(
    values: Sequence[float], longest: int, *, low: float, high: float, shape: tuple[int, int]
) -> np.ndarray:
    """[rows, columns] bool, the dots of the polyline through the values; row 0 is at `high`."""
    rows, columns = shape
    dots = np.zeros(shape, dtype=bool)
    given = np.asarray(values, dtype=np.float64)
    positions = np.flatnonzero(np.isfinite(given))
    if not len(positions):
        return dots
    heights = given[positions]
    places = positions.astype(np.float64) * (columns - 1) / max(longest - 1, 1)
    if longest > columns:
        bins = np.round(places).astype(int)
        counts = np.bincount(bins, minlength=columns)
        heights = (np.bincount(bins, weights=heights, minlength=columns) / np.maximum(counts, 1))[counts > 0]
        places = np.flatnonzero(counts).astype(np.float64)
    first, last = math.floor(places[0]), math.ceil(places[-1])
    line = np.interp(np.arange(first, last + 1), places, heights)
    levels = np.round((high - line) / (high - low) * (rows - 1)).astype(int)
    previous = levels[0]
    for column, level in enumerate(levels, start=first):
        # The column is filled from the previous level on, so that steep parts stay connected.
        dots[min(previous, level) : max(previous, level) + 1, column] = True
        previous = level
    return dots


def save_curve(
    path: Path, steps: Sequence[float], values: Sequence[float], *, title: str, ylabel: str
) -> None:
    """Write a PNG of values over steps; needs no display and leaves matplotlib's global state alone."""
    # Imported only where a picture is drawn: it takes longer than all else that a command imports.
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(7, 4), dpi=150, layout="constrained"
    )
    axes = figure.subplots()
    axes.plot(steps, values, linewidth=1.5)
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def samples_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """A table of answers, given rows with `prompt`, `response`, `reference` and `reward`, all optional."""
    table = Table(show_lines=True)
    for title in ("prompt", "answer", "reference"):
        table.add_column(title, overflow="fold")
    table.add_column("reward", justify="right")
    for row in rows:
        texts = [str(row.get(key, "") or "") for key in ("prompt", "response", "reference")]
        shown = [text[:_MAX_SAMPLE_CHARS] + "…" * (len(text) > _MAX_SAMPLE_CHARS) for text in texts]
        reward = row.get("reward")
        cells = [Text(printable(text, keep_newlines=True)) for text in shown]
        table.add_row(*cells, Text(format_number(reward) if isinstance(reward, (int, float)) else ""))
    return table
