"""The part of an answer that a reward compares: the common option `extract`."""

from __future__ import annotations

from typing import Literal

from verl.rewards.library.answer_text import boxes, without_thoughts

Place = Literal["whole", "answer_tag", "boxed", "last_line", "after_think"]
# One place, text behind a mark, or several of them, each within what the one before has left.
Extract = Place | dict[Literal["after"], str] | list[Place | dict[Literal["after"], str]]


def extracted(text: str, extract: Extract) -> str | None:
    r"""The part of an answer that is compared, stripped of surrounding white space.

    Args:
        text: the answer.
        extract: `whole`; `answer_tag`, inside the last `<answer>...</answer>`; `boxed`, inside the last
            complete `\boxed{...}` or `\fbox{...}`; `last_line`, the last line that is not blank;
            `after_think`, behind the last `</think>`, and the text before a `<think>` that is not closed;
            `{after: TEXT}`, behind the last TEXT; or a list of these, one after the other.

    Returns:
        The part; None if the answer does not have it.
    """
    if isinstance(extract, list):
        part: str | None = text
        for step in extract:
            part = None if part is None else extracted(part, step)
        return part
    if isinstance(extract, dict):
        _, found, rest = text.rpartition(extract["after"])
        return rest.strip() if found else None
    if extract == "answer_tag":
        return between(text, "<answer>", "</answer>")
    if extract == "boxed":
        return last_boxed(text)
    if extract == "last_line":
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else None
    if extract == "after_think":
        return without_thoughts(text).strip()
    return text.strip()


def between(text: str, start: str, end: str) -> str | None:
    """The text between the last pair of two marks; None if there is no pair."""
    last = text.rfind(end)
    first = text.rfind(start, 0, last) if last >= 0 else -1
    return text[first + len(start) : last].strip() if first >= 0 else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}`; None if there is none."""
    found = boxes(text)
    return found[-1].content if found else None
