"""The table of the code's form, value beside goal: `make structure`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.step_trace import traced_figures
from tests.structure import MEASURES, Figure, Sources


def shown(figures: list[Figure]) -> str:
    """The table: value, goal, whether it is reached, and the first places where not."""
    width = max(len(figure.name) for figure in figures)
    rows = [f"{'measure':{width}}  {'value':>7}  {'goal':>5}  reached"]
    for f in figures:
        goal, mark = ("", "") if f.goal is None else (f"{f.goal:g}", "yes" if f.is_reached else "NO")
        more = f", and {len(f.places) - 4} more" if len(f.places) > 4 else ""
        note = "" if mark == "yes" else "  " + "; ".join(f.places[:4]) + more
        rows.append(f"{f.name:{width}}  {f.value:7g}  {goal:>5}  {mark:7}{note}".rstrip())
    return "\n".join(rows)


def main() -> int:
    """Print all figures; returns 1 if a goal is missed."""
    sources = Sources()
    with tempfile.TemporaryDirectory() as folder:
        figures = [*traced_figures(Path(folder)), *(measure(sources) for measure in MEASURES)]
    print(shown(figures))
    return int(not all(figure.is_reached for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
