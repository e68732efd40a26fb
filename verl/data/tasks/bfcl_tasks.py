"""Rows and files of the multi-turn part of the Berkeley Function Calling Leaderboard, `task:bfcl/NAME`.

https://gorilla.cs.berkeley.edu/leaderboard.html; the data are in the PyPI package bfcl-eval.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# In front of the name of a category, behind `task:`.
PREFIX = "bfcl/"
CATEGORIES = tuple(f"multi_turn_{kind}" for kind in ("base", "miss_func", "miss_param", "long_context"))
# All of them, 200 episodes each.
ALL = "multi_turn"
# The package pins libraries of all engines, none of which is needed here.
INSTALL = "pip install --no-deps bfcl-eval && pip install mpmath"


def bfcl_rows(name: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows {prompt, id, data_source}, the same in both splits, for `agent.environment: bfcl:NAME`.

    Args:
        name: one of `CATEGORIES`, or multi_turn for all 800.
        options: `size`, the first rows of each category.

    Raises:
        ValueError: no such name or option, or the package is missing.
    """
    size = options.get("size")
    if unknown := sorted(options.keys() - {"size"}):
        raise ValueError(f"task:{PREFIX}{name} has the option size alone, got {', '.join(unknown)}")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"task:{PREFIX}{name}: need a whole number from 1 for size, got {size!r}")
    return [
        {"prompt": entry["question"][0], "id": entry["id"], "data_source": f"bfcl/{category}"}
        for category in categories_of(name)
        for entry in list(map(json.loads, lines_of(f"BFCL_v4_{category}.json")))[:size]
    ]


def categories_of(name: str) -> tuple[str, ...]:
    """The categories of a name.

    Raises:
        ValueError: no such name.
    """
    if name not in (*CATEGORIES, ALL):
        raise ValueError(f"need {ALL} or one of {', '.join(CATEGORIES)} of bfcl, got {name!r}")
    return CATEGORIES if name == ALL else (name,)


def lines_of(name: str) -> Iterator[str]:
    """Lines of a data file of the package.

    Raises:
        ValueError: the package is missing.
    """
    package = importlib.util.find_spec("bfcl_eval")
    if package is None or package.origin is None:
        raise ValueError(f"bfcl needs the package bfcl_eval: {INSTALL}")
    with (Path(package.origin).parent / "data" / name).open(encoding="utf-8") as lines:
        yield from lines


def entry_of(name: str, entry_id: str) -> dict[str, Any]:
    """The entry of that id in a data file.

    Raises:
        ValueError: there is none.
    """
    for line in lines_of(name):
        if line.startswith(f'{{"id": "{entry_id}"'):
            entry: dict[str, Any] = json.loads(line)
            return entry
    raise ValueError(f"there is no entry {entry_id!r} in {name} of bfcl-eval")
