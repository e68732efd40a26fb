"""JSON Lines files that a run appends to and truncates when it resumes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


def json_line(row: Mapping[str, object]) -> bytes:
    """One line of valid JSON in UTF-8; NaN and infinities become null."""
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str)
    # Half a character of a byte-level tokenizer decodes to a lone surrogate, which UTF-8 cannot hold but JSON
    # can escape.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def truncate_from_step(path: Path, first_step: int) -> bytes | None:
    """Remove the lines of steps from `first_step` on, and lines that are incomplete.

    Args:
        path: file whose lines have a `step` each; if it is absent, nothing happens.
        first_step: first step whose lines are removed.

    Returns:
        The last line that is kept, without its newline; None if none is.
    """
    if not path.exists():
        return None
    last = None
    shorter = path.with_suffix(".jsonl.part")
    with path.open("rb") as lines, shorter.open("wb") as kept:
        for line in lines:
            if _step(line, default=first_step) < first_step:
                last = line.rstrip(b"\n")
                kept.write(last + b"\n")
    # Replaced in one go: a run that is stopped before this line has lost nothing.
    os.replace(shorter, path)
    return last


def _finite(value: object) -> object:
    """The same value with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _step(line: bytes, *, default: int) -> int:
    """The step of a line; the default if it has none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return default
