"""Sampled answers as a few lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl.monitoring.formatting import format_number

_MAX_CHARS = 600
# Lines of a sample: title and key in its row.
_PARTS = (("prompt", "prompt_text"), ("answer", "response_text"), ("reference", "reference"))


def sample_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each answer in a few lines: prompt and answer with their special tokens, reference and reward.

    Args:
        rows: of `verl.trainer.evaluation.sample_row`.
    """
    lines = []
    for row in rows:
        parts = [(title, row[key]) for title, key in _PARTS if row.get(key) is not None]
        if row.get("turns"):
            parts = [*_turn_parts(row["turns"]), *(part for part in parts if part[0] == "reference")]
        shown = [(title, one_line(str(text))) for title, text in parts]
        if row.get("truncated"):
            last = max((i for i, (title, _) in enumerate(shown) if title == "answer"), default=-1)
            shown = [(title, text + " (cut off)" * (i == last)) for i, (title, text) in enumerate(shown)]
        reward = row.get("reward")
        if isinstance(reward, (int, float)):
            shown.append(("reward", format_number(reward)))
        elif row.get("outcome") != "ok":  # an answer that nothing rewards is no failure
            shown.append(("reward", f"none: {_failure(row)}"))
        lines += [f"  {title:9}  {text}" for title, text in shown] + [""]
    return lines


def different_samples(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """A few rows, the first of each prompt before others."""
    firsts = {row.get("group"): row for row in reversed(rows)}
    return [*reversed(firsts.values())][:count]


def _turn_parts(turns: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Runs of tokens of an episode: what the policy wrote, which is trained on, and what it was given."""
    shown = [("answer" if turn["trained"] else "given", turn["text"]) for turn in turns]
    return [("prompt", shown[0][1]), *shown[1:]] if shown else []


def _failure(row: Mapping[str, Any]) -> str:
    return one_line(f"{row.get('outcome', '')} {row.get('detail', '')}".strip())


def one_line(text: str) -> str:
    """The text with visible line ends and without control characters, cut in its middle."""
    text = text.replace("\n", "\\n")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = _MAX_CHARS // 2
    return text if len(text) <= _MAX_CHARS else f"{text[:half]} ... {text[-half:]}"
