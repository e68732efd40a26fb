"""Texts that stand for a reference answer, and its check before the first step.

Worker processes import this module, so it loads no torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from verl.rewards.library.normalization import NORMALIZATIONS, Normalize

if TYPE_CHECKING:
    from verl.utils.sampling_types import Prompt

LISTS = (list, tuple, set, frozenset)
# Keys of the accepted answers in the `ground_truth` of search and question-answering sets.
_LIST_KEYS = ("target", "ground_truth")
REMEDY = "write the reference as a text, or give a reward function of your own, which gets the value as it is"


def spellings(reference: Any) -> tuple[str, ...]:
    """Texts that stand for a reference answer, stripped of surrounding white space.

    A text stands for itself. Numbers: 42.0, which a column of whole numbers becomes when a row is empty, is
    "42" or "42.0"; Decimal("1.50") is "1.50" or "1.5"; a fraction is "3/4". True is "true" or "True". A date
    is "2024-05-01", a time of day behind it follows after "T" or a space. A list has the spellings of all its
    elements, and a dict with the one key `target` or `ground_truth` those of its value.

    Raises:
        ValueError: any other value (None, NaN, an empty list, a list in a list, another dict, bytes).
    """
    value = reference.tolist() if isinstance(reference, np.ndarray | np.generic) else reference
    if isinstance(value, dict):
        # A table has nulls for the keys that other rows have.
        given = {key: item for key, item in value.items() if item is not None}
        if len(given) == 1 and next(iter(given)) in _LIST_KEYS:
            return spellings(next(iter(given.values())))
    elif isinstance(value, LISTS):
        if value and not any(isinstance(item, (*LISTS, dict, np.ndarray)) for item in value):
            return tuple(dict.fromkeys(text for item in value for text in spellings(item)))
    elif texts := _texts(value):
        return tuple(dict.fromkeys(text.strip() for text in texts))
    shown = repr(value)
    kind = "none" if value is None else f"{type(reference).__name__} {shown[:60]}"
    raise ValueError(f"need a reference answer with a plain spelling, got {kind}")


def check_spellings(prompt: Prompt, check: Callable[[str], object] | None = None) -> None:
    """Check each spelling of the reference answer of a prompt.

    Args:
        prompt: the prompt.
        check: raises ValueError for a text that cannot be compared.

    Raises:
        ValueError: it has none, an empty one, or one that `check` refuses; names row and column.
    """
    try:
        for text in spellings(prompt.answer):
            if not text:
                raise ValueError("need a reference answer that is not empty, got an empty text")
            if check is not None:
                check(text)
    except ValueError as error:
        raise ValueError(
            f"{place_of(prompt)}: {error}; name the column that holds it in data.answer_key, leave the row "
            f"out, {REMEDY}"
        ) from error


def check_normal_spellings(prompt: Prompt, *, normalize: Normalize = "none", **_: Any) -> None:
    """As `check_spellings`; something must be left of the reference when it is normalized."""

    def check(text: str) -> None:
        if not NORMALIZATIONS[normalize](text):
            raise ValueError(
                f"need a reference of which normalize {normalize} leaves something, got {text!r}"
            )

    check_spellings(prompt, check)


def place_of(prompt: Prompt) -> str:
    """Row and column of the reference answer, in words."""
    return f"row {prompt.index} of {prompt.source or 'the data'}, {_column_of(prompt)}"


def _column_of(prompt: Prompt) -> str:
    layout = prompt.columns.get("reward_model")
    if isinstance(layout, dict) and layout.get("ground_truth") is prompt.answer:
        return "column 'reward_model.ground_truth'"
    same = [name for name, value in prompt.columns.items() if value is prompt.answer is not None]
    return f"column {same[0]!r}" if same else "column 'answer' (or the one of data.answer_key)"


def _texts(value: Any) -> tuple[str, ...]:
    """Plain spellings of one value; none if it has none."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bool):
        return (str(value).lower(), str(value))
    if isinstance(value, int | Fraction):
        return (str(value),)
    if isinstance(value, float):
        return _float_texts(value)
    if isinstance(value, Decimal):
        return (format(value, "f"), format(value.normalize(), "f")) if value.is_finite() else ()
    if isinstance(value, datetime.datetime):
        date = (value.date().isoformat(),) if value.time() == datetime.time() and not value.tzinfo else ()
        return (*date, value.isoformat(), value.isoformat(sep=" "))
    return (value.isoformat(),) if isinstance(value, datetime.date | datetime.time) else ()


def _float_texts(value: float) -> tuple[str, ...]:
    if not np.isfinite(value):
        return ()
    if value.is_integer():
        return (str(int(value)), repr(value))
    # A column of fp32 holds 0.1 as 0.10000000149011612, which nobody wrote; one of fp16 0.0999755859375.
    with np.errstate(over="ignore", under="ignore"):
        shorter = [str(kind(value)) for kind in (np.float32, np.float16) if float(kind(value)) == value]
    texts = dict.fromkeys([repr(value), *shorter])
    return tuple(dict.fromkeys([*texts, *(format(Decimal(text), "f") for text in texts)]))  # 1e-07, too
