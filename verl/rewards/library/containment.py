"""Built-in reward `contains`: texts that an answer has, or must not have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from verl.rewards.library.extraction import Extract, extracted
from verl.rewards.library.normalization import unicode_plain
from verl.rewards.library.spellings import LISTS, check_spellings, spellings

# A comma between thousands: 1,234 is 1234.
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))(?<![0-9]{4},)")
# First code point of the scripts that are written without spaces between words.
_WITHOUT_SPACES = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xD7AF), (0xF900, 0xFAFF))


def contains(
    response: str,
    answer: Any = None,
    *,
    texts: list[str] | None = None,
    mode: Literal["any", "all"] = "any",
    not_contains: list[str] | None = None,
    ignore_case: bool = True,
    words: bool = True,
    extract: Extract = "after_think",
) -> dict[str, float]:
    """1 if the answer has the reference in it, or one of several, or all of them, else 0.

    Both are brought to one spelling of their characters, see `normalization.unicode_plain`.

    Args:
        response: text of the answer.
        answer: the reference, or a list of them; of a number every plain spelling counts.
        texts: looked for in place of the reference.
        mode: any: one of them is enough; all: each of them must be there.
        not_contains: with one of these the answer is wrong.
        ignore_case: upper and lower case are the same.
        words: a text counts only as a whole word or number: 5 is not in 15, 5.3 or -5.
        extract: part of the answer that is searched, by default without thoughts.

    Returns:
        `reward`; and `accuracy`, if the reference is looked for.
    """
    part = extracted(response, extract)
    found = _normal(part or "", ignore_case)
    wanted = [(text,) for text in texts] if texts else _required(answer)

    def has(text: str) -> bool:
        return has_text(found, _normal(text, ignore_case), words=words)

    there = [any(map(has, spelled)) for spelled in wanted]
    right = part is not None and (any(there) if mode == "any" else all(there))
    reward = float(right and not any(map(has, not_contains or ())))
    return {"reward": reward} if texts else {"reward": reward, "accuracy": reward}


def check_contains(prompt: Any, *, texts: list[str] | None = None, **_: Any) -> None:
    """As `spellings.check_spellings`, unless the options name the texts that are looked for."""
    if not texts:
        check_spellings(prompt)


def prepare_contains(
    *, texts: list[str] | None = None, not_contains: list[str] | None = None, **options: Any
) -> None:
    """Check the texts of the options.

    Raises:
        ValueError: one of them is empty, or the list of texts is.
    """
    if texts == []:
        raise ValueError("need at least one text in texts of the reward function 'contains', got none")
    if not all(unicode_plain(text) for text in (*(texts or ()), *(not_contains or ()))):
        raise ValueError("need texts that are not empty for the reward function 'contains', got an empty one")


def has_text(text: str, wanted: str, *, words: bool) -> bool:
    """True if a text occurs in another; with `words` neither inside a word nor inside a number."""
    return any(not words or _is_whole(text, start, start + len(wanted)) for start in _starts(text, wanted))


def _required(answer: Any) -> list[Sequence[str]]:
    """Spellings of each text that the reference stands for."""
    values = list(answer) if isinstance(answer, LISTS) else [answer]
    return [spellings(value) for value in values]


def _normal(text: str, ignore_case: bool) -> str:
    plain = _THOUSANDS.sub("", unicode_plain(text))
    return plain.casefold() if ignore_case else plain


def _starts(text: str, wanted: str) -> Iterator[int]:
    start = text.find(wanted) if wanted else -1
    while start >= 0:
        yield start
        start = text.find(wanted, start + 1)


def _is_whole(text: str, start: int, end: int) -> bool:
    first, last = text[start], text[end - 1]
    before, before_that = text[max(0, start - 1) : start], text[max(0, start - 2) : max(0, start - 1)]
    after, after_that = text[end : end + 1], text[end + 1 : end + 2]
    if before == after == "_" and not before_that.isalnum() and not after_that.isalnum():
        return True  # Markdown: _so_ or __so__
    if first.isdigit() and before == "-" and not before_that.isalnum():
        return False  # the sign of a number, not the dash of "3-5"
    if first.isdigit() and before in (".", ",") and (before_that.isdigit() or before_that in ("", " ")):
        return False
    if first == "-" and before.isalnum():
        return False
    if last.isdigit() and after in (".", ",") and after_that.isdigit():
        return False
    return not (_joined(before, first) or _joined(last, after))


def _joined(left: str, right: str) -> bool:
    """True if two neighbors belong to one word."""
    both = (left, right)
    return all(c and (c.isalnum() or c == "_") and not _has_no_spaces(c) for c in both)


def _has_no_spaces(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _WITHOUT_SPACES)
