"""Reward of GSM8K: the number of the answer is that of the truth."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from verl.rewards.library.answer_text import without_thoughts
from verl.rewards.library.spellings import check_spellings, spellings

if TYPE_CHECKING:
    from verl.utils.sampling_types import Prompt

# A number with or without thousands separators. Not part of a word, a fraction, a power of ten or a decimal
# comma: of those it would be another number.
_SIGN = r"(?P<sign>(?<![\w)\]])[-+\u2212])?(?:\\?[$\u20ac\u00a3]\s?(?P<inner>[-\u2212])?)?"
_WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
_END = r"(?![0-9]|[.,][0-9]|\s?/\s?[0-9]|[eE^][-+]?[0-9])"
_NUMBER = rf"{_SIGN}(?P<digits>(?<![\w.,/])(?:{_WHOLE})(?:\.[0-9]+)?|(?<![\w.,/])\.[0-9]+){_END}"
_ANYWHERE = re.compile(_NUMBER)
# As GSM8K ends its solutions; models also write none of the space, markup, or "Answer: x =". Behind the mark
# a space may stand between thousands, 1 234; other numbers side by side are none.
_MARKED_NUMBER = _NUMBER.replace(_WHOLE, rf"[0-9]{{1,3}}(?: [0-9]{{3}})+(?![0-9])|{_WHOLE}")
_MARKED = re.compile(
    rf"####[ \t*`(~=]*(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is|:)[ \t*]*)?(?:[a-z][ \t]*=[ \t]*)?"
    rf"(?:\\boxed\{{)?{_MARKED_NUMBER}(?!\s*(?:or|to|-|\u2013)\s*[0-9]|[ \t]+[0-9])",
    re.IGNORECASE,
)
# Between the thousands of a number: a space or comma of LaTeX, and spaces of Unicode.
_SPACED = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,;! ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")


def gsm8k(
    response: str,
    answer: Any,
    *,
    method: Literal["strict", "flexible"] = "strict",
    thoughts: Literal["skip", "read"] = "skip",
    format_score: float = 0.0,
) -> dict[str, Any]:
    """1 if the number of the answer is that of the truth, as verl's function of this name.

    Numbers are compared by value: 1,234 is 1234.00, and so is 1 234 behind the mark. A sign of currency
    before and of percent behind are ignored, and so is a period at the end.

    Args:
        response: text of the answer.
        answer: number, text of one, or solution of GSM8K that ends in `#### 72`; or a list of such.
        method: "strict": the number behind the last `####`; "flexible": the last number of the text.
        thoughts: "skip": what stands in `<think>` is no answer.
        format_score: reward of an answer that has a number in that place, but a wrong one.

    Returns:
        `score`, `acc` (1 or 0), `answer_found` (1 or 0) and the text `extracted_answer`.

    Raises:
        ValueError: the truth holds no number.
    """
    truths = {truth_number(text) for text in spellings(answer)}
    text = plain_digits(without_thoughts(response) if thoughts == "skip" else response)
    matches = list((_MARKED if method == "strict" else _ANYWHERE).finditer(text))
    found = _value(matches[-1]) if matches else None
    is_right = found in truths
    return {
        "score": 1.0 if is_right else format_score if matches else 0.0,
        "acc": float(is_right),
        "answer_found": float(bool(matches)),
        "extracted_answer": "" if found is None else f"{found:f}",
    }


def plain_digits(text: str) -> str:
    """The text with digits of all scripts as ASCII, and thousands that LaTeX separates by a comma."""
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    return _SPACED.sub(",", text)


def truth_number(text: str) -> Decimal:
    """The number of a truth: behind `####`, or else the one number of the text.

    Raises:
        ValueError: there is none, or several of them and no mark.
    """
    text = plain_digits(text)
    marked = list(_MARKED.finditer(text))
    found = marked[-1:] or list(_ANYWHERE.finditer(text))
    if len(found) != 1:
        raise ValueError(
            f"need a number, or a solution that ends in '#### NUMBER', got {text[-60:]!r} with {len(found)} "
            "numbers"
        )
    return _value(found[0])


def check_number(prompt: Prompt, **options: Any) -> None:
    """Raise ValueError, which names row and column, for a prompt whose truth holds no number."""
    check_spellings(prompt, truth_number)


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(re.sub("[, ]", "", match["digits"]))
    return -value if (match["sign"] or "") in ("-", "\u2212") or match["inner"] else value
