"""Files of JSON lines that a run appends to: one line, and what stays of a file when a run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


def json_line(row: Mapping[str, object]) -> bytes:
    """One line of valid JSON in UTF-8; numbers that JSON does not have are null."""
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str)
    # Half a character of a byte-level tokenizer becomes a lone surrogate, which UTF-8 cannot hold but JSON
    # can escape.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def truncate_from_step(path: Path, first_step: int) -> bytes | None:
    """Removes the lines of steps that will be written again, and a last line that was cut off.

    Args:
        path: of lines with a `step` each; nothing happens if it is absent.
        first_step: the first step whose lines go.

    Returns:
        The last line that stays, without its end; None if none does.
    """
    if not path.exists():
        return None
    last = None
    shorter = path.with_suffix(".jsonl.part")
    with path.open("rb") as lines, shorter.open("wb") as kept:
        for line in lines:
            if _step_of(line, otherwise=first_step) < first_step:
                last = line.rstrip(b"\n")
                kept.write(last + b"\n")
    # Replaced in one go: a run that is stopped here loses nothing.
    os.replace(shorter, path)
    return last


def _finite(value: object) -> object:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _step_of(line: bytes, *, otherwise: int) -> int:
    """The step of a line, or `otherwise` if it has none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return otherwise
