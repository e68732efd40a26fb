"""Numbers, durations and untrusted text in the form that the terminal shows."""

from __future__ import annotations

import math


def format_number(value: float) -> str:
    """About four digits in at most seven characters, the sign included."""
    size = abs(value)
    if not math.isfinite(value) or 0 < size < 5e-4 or size >= 1e12:
        return f"{value:.1e}" if value >= 0 else f"{value:.0e}"
    if size < 1e4:
        return f"{value:.{3 - int(math.log10(max(size, 1)))}f}"
    scale, letter = next(
        (scale, letter) for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if size >= scale
    )
    return f"{value / scale:.1f}{letter}"


def format_duration(seconds: float) -> str:
    """A duration for a sentence: 0.4 s, 45 s, 31 min, 2 h 05 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def format_countdown(seconds: float) -> str:
    """A duration for a narrow column: 4:05, 1:02:03 or 3d 04h; `-` if it is not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_bytes(num_bytes: float) -> str:
    """Human-readable bytes, with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """The text with control characters replaced by spaces, so that it cannot steer the terminal."""
    return "".join(c if c.isprintable() or (keep_newlines and c == "\n") else " " for c in text)
