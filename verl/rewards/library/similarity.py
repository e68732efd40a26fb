"""Built-in rewards of likeness: `similarity` to the reference, and `repetition` within an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field
from rapidfuzz import fuzz

from verl.rewards.library.extraction import Extract, extracted
from verl.rewards.library.normalization import squad, unicode_plain
from verl.rewards.library.spellings import spellings

Method = Literal["ratio", "partial", "token_sort", "token_set", "f1"]


def f1(text: str, reference: str) -> float:
    """F1 of the words that two texts have in common, each as often as it occurs in both.

    SQuAD, https://arxiv.org/abs/1606.05250, section 6.1. The texts are in `normalization.squad`'s form.
    """
    words, wanted = squad(text).split(), squad(reference).split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def similarity(
    response: str,
    answer: Any = None,
    *,
    method: Method = "ratio",
    threshold: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ignore_case: bool = True,
    extract: Extract = "after_think",
) -> dict[str, float]:
    """Likeness of the answer and the reference in [0, 1]; of several references the most alike counts.

    Args:
        response: text of the answer.
        answer: the reference, or a list of them.
        method: ratio: share of equal characters in their order, 1 - edits / characters of both, with
            insertions and deletions as edits; partial: that of the shorter text and the part of the longer
            one that is most alike; token_sort, token_set: that of the sorted words, or of the words that
            they have in common and the rest (rapidfuzz); f1: F1 of the words as in SQuAD.
        threshold: likeness from which the answer counts as right.
        ignore_case: upper and lower case are the same; always so in f1.
        extract: part of the answer that is compared, by default without thoughts; an answer that lacks the
            part has 0.

    Returns:
        `reward`, the likeness, and `accuracy`, 1 from the threshold on.
    """
    part = extracted(response, extract)
    if part is None:
        return {"reward": 0.0, "accuracy": 0.0}
    # To tell 1/3 of a threshold from a rounding error.
    best = round(max(_likeness(part, text, method, ignore_case) for text in spellings(answer)), 9)
    return {"reward": best, "accuracy": float(best >= threshold)}


def repetition(
    response: str,
    *,
    ngram: Annotated[int, Field(ge=1)] = 3,
    unit: Literal["words", "characters"] = "words",
    extract: Extract = "whole",
) -> float:
    """Penalty for repeated n-grams: different ones / all of them - 1, in (-1, 0]; 0 without repetition.

    Demystifying Long Chain-of-Thought Reasoning, https://arxiv.org/abs/2502.03373, section 4.3, as a share of
    the whole answer.

    Args:
        response: text of the answer.
        ngram: length of the n-grams.
        unit: they consist of words between white space, or of characters, for scripts without spaces.
        extract: part of the answer that is looked at.
    """
    part = unicode_plain(extracted(response, extract) or "").casefold()
    units = part.split() if unit == "words" else list(part)
    ngrams = [tuple(units[i : i + ngram]) for i in range(len(units) - ngram + 1)]
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def _likeness(text: str, reference: str, method: Method, ignore_case: bool) -> float:
    if method == "f1":
        return f1(text, reference)
    text, reference = unicode_plain(text), unicode_plain(reference)
    if ignore_case:
        text, reference = text.casefold(), reference.casefold()
    return _RATIOS[method](text, reference) / 100


_RATIOS: dict[str, Callable[[str, str], float]] = {
    "ratio": fuzz.ratio,
    "partial": fuzz.partial_ratio,
    "token_sort": fuzz.token_sort_ratio,
    "token_set": fuzz.token_set_ratio,
}
