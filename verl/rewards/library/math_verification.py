r"""Reward of mathematics: the answer has the value of the truth, by the library math-verify.

It runs in a worker process. Some expressions keep a computer algebra system busy for ever. A policy would
learn to write them if they kept an answer from its reward of 0, so an answer that stops the checker is wrong.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import re
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from verl.rewards.execution.own_limits import LIMIT_SIGNAL, OverLimitError, run_limited
from verl.rewards.failures import RewardFailure
from verl.rewards.library.answer_text import boxes as boxes_of
from verl.rewards.library.answer_text import (
    joined_boxes,
    marked_answer,
    named_answer,
    without_open_boxes,
    without_thoughts,
)
from verl.rewards.library.math_spelling import (
    MAX_CHARS,
    has_words,
    is_words,
    plain_math,
    plain_prose,
    text_key,
)
from verl.rewards.library.spellings import check_spellings, spellings

if TYPE_CHECKING:
    from verl.utils.sampling_types import Prompt

Extract = Literal["any", "marked", "boxed"]
# Last part of an answer without a box or mark in which an expression is looked for.
_TAIL_CHARS = 4000
# Longest text that may be an answer as a whole without a mark.
_MAX_BARE_CHARS = 200
_WHOLE = ("expression", "words")
_SHOWN_CHARS = 200
_MEMORY_BYTES = 1 << 30
_MISSING_PACKAGE = "need the package math-verify, which is not installed; pip install math-verify"
_DIGITS = re.compile(r"[0-9]+")
# Truths that were read, with their numbers replaced: another one of the same form can be read, too.
_READ_FORMS: set[tuple[str, float, str]] = set()
_INTEGER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,4000})")
# Left by a JSON text in which backslashes were not doubled: \b, \f, \t and \r begin commands of LaTeX.
_LOST_BACKSLASH = re.compile(r"[\x08\x0c]|\t(?:frac|ext|imes|heta|an\b)|\r(?:ight|angle|ho\b)")
# Ways in which a process ends by what it computes; others, such as a lack of memory of the machine, may have
# other causes.
_ENDED_BY_ANSWER = {-LIMIT_SIGNAL, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE}


@dataclass(frozen=True, eq=False)
class ParsedTruth:
    """A truth as math-verify reads it.

    Attributes:
        expressions: of SymPy; empty for a text that it cannot read.
        decimal_places: of a small number, down to its third digit that is not 0; else 0.
    """

    expressions: tuple[Any, ...]
    decimal_places: int = 0


@dataclass(frozen=True)
class FoundAnswer:
    """A final answer in the text of a policy.

    Attributes:
        text: what is compared, or where it is looked for.
        form: "expression": the text is one; "words": it is compared as a text alone; "prose": math-verify
            looks for an expression in it; "anchored": it takes only one behind words such as "answer is".
    """

    text: str
    form: Literal["expression", "words", "prose", "anchored"] = "expression"


def math_reward(
    response: str,
    answer: Any,
    *,
    extract: Extract = "any",
    boxes: Literal["last", "single"] = "last",
    thoughts: Literal["skip", "read"] = "skip",
    unreadable_truths: Literal["error", "text"] = "error",
    float_rounding: int = 6,
    strict: bool = True,
    timeout_s: float = 5.0,
) -> dict[str, Any]:
    r"""1 if the answer has the value of the truth, by math-verify, else 0.

    Args:
        response: text of the answer.
        answer: the truth: a number, an expression in LaTeX with or without `$`, a solution that holds it in
            its last `\boxed{}` or behind `####`, or a list of accepted ones.
        extract: "boxed": only the content of a box is an answer; "marked": also what stands in `<answer>`,
            behind `####` or behind words such as "answer is"; "any": also the last expression of the text.
            The first of these that there is counts.
        boxes: "last": the last box counts, and those that are listed with it where the truth is a list;
            "single": boxes with different contents are wrong.
        thoughts: "skip": what stands in `<think>` is no answer; "read": it is.
        unreadable_truths: "text": a truth that math-verify cannot read is compared as a text; "error": the
            run does not begin.
        float_rounding: decimal places to which a decimal number must agree, as in math-verify; more for a
            truth below 0.001, to its third digit.
        strict: names of variables matter, and a set is no tuple, as in math-verify.
        timeout_s: processor time for one answer in seconds; an answer that needs more is wrong.

    Returns:
        `score` and `acc` (1 or 0), `answer_found` (1 or 0), `checker_stopped` (1 if the answer was too long
        or took too long to compare), and the text `extracted_answer`.

    Raises:
        ValueError: the truth cannot be read.
        RuntimeError: the package is missing, or this is not the main thread of a process.
    """
    check_backslashes(answer)
    truths = [truth_text(text) for text in spellings(answer)]
    found = found_answers(response, extract=extract, boxes=boxes, thoughts=thoughts)
    shown = found[0].text if found and found[0].form in _WHOLE else ""
    is_right = equal_as_texts(found, truths)
    readable = tuple(one for one in found if len(one.text) <= MAX_CHARS)
    if is_right is None and readable:
        parsed = tuple(parsed_truth(text, timeout_s, unreadable_truths) for text in truths)
        is_right, read = verdict(
            readable, parsed, float_rounding=float_rounding, strict=strict, timeout_s=timeout_s
        )
        shown = shown if is_right is None else read
    return {
        "score": float(bool(is_right)),
        "acc": float(bool(is_right)),
        "answer_found": float(bool(shown) or is_right is None),
        "checker_stopped": float(is_right is None),
        "extracted_answer": shown[:_SHOWN_CHARS],
    }


def score_of_failure(failure: RewardFailure) -> dict[str, float] | None:
    """Value of an answer that ended the worker process; None if the answer may not be the cause."""
    if failure.exit_code not in _ENDED_BY_ANSWER:
        return None
    return {"score": 0.0, "acc": 0.0, "answer_found": 1.0, "checker_stopped": 1.0}


def prepare(*, timeout_s: float = 5.0, float_rounding: int = 6, **options: Any) -> None:
    """Check the package and the options before the first step.

    Raises:
        ValueError: the package is missing, or an option is out of its bounds.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"reward function 'math': {_MISSING_PACKAGE}")
    if not timeout_s > 0 or float_rounding < 0:
        raise ValueError(
            f"reward function 'math': need timeout_s above 0 and float_rounding of at least 0, got "
            f"{timeout_s} and {float_rounding}"
        )


def check_truth(
    prompt: Prompt,
    *,
    unreadable_truths: Literal["error", "text"] = "error",
    timeout_s: float = 5.0,
    **options: Any,
) -> None:
    """Raise ValueError, which names row and column, for a prompt whose truth cannot be compared."""

    def check(text: str) -> None:
        check_backslashes(prompt.answer)
        truth = truth_text(text)
        form = _DIGITS.sub("1", truth), timeout_s, unreadable_truths
        # Most truths of large sets are whole numbers, and of the others many have one form.
        if not _INTEGER.fullmatch(truth) and form not in _READ_FORMS:
            parsed_truth(truth, timeout_s, unreadable_truths)
            _READ_FORMS.add(form)

    check_spellings(prompt, check)


def found_answers(
    response: str, *, extract: Extract, boxes: Literal["last", "single"], thoughts: Literal["skip", "read"]
) -> list[FoundAnswer]:
    """Final answer of a text, with a second reading where it is a list of boxes; empty: there is none."""
    text = without_thoughts(response) if thoughts == "skip" else response
    if in_boxes := boxes_of(text):
        if boxes == "single" and len({box.content for box in in_boxes}) > 1:
            return []
        listed = list(dict.fromkeys(joined_boxes(text, in_boxes)))
        readings = [in_boxes[-1].content, ", ".join(listed)][: len(listed)]
        return [FoundAnswer(reading) for reading in readings if reading]
    if extract == "boxed":
        return []
    text = without_open_boxes(text)
    marked = marked_answer(text)
    if marked is not None:
        is_prose = has_words(plain_math(marked)) and not is_words(marked)
        return [FoundAnswer(marked, "prose" if is_prose else "expression")] if marked else []
    tail, named = text[-_TAIL_CHARS:].strip(), named_answer(text)
    if not tail:
        return []
    if extract == "marked":
        return [*_bare_answers([named]), FoundAnswer(tail, "anchored")]
    return [*_bare_answers([named, tail]), FoundAnswer(tail, "prose")]


def check_backslashes(answer: Any) -> None:
    """Raise ValueError for LaTeX whose backslashes were lost; `spellings` would strip what is left."""
    for text in answer if isinstance(answer, list | tuple) else [answer]:
        if isinstance(text, str) and _LOST_BACKSLASH.search(text):
            raise ValueError(
                f"need LaTeX, got {text[:60]!r}, whose backslash was read as a control character; write two "
                "backslashes in JSON and in Python"
            )


def truth_text(text: str) -> str:
    r"""Expression of a truth: of a solution the last box, or what stands behind `####` or "answer is".

    Raises:
        ValueError: it is empty or too long.
    """
    in_boxes = boxes_of(text)
    marked = None if in_boxes else marked_answer(text)
    named = named_answer(text) if has_words(text) else None
    found = ", ".join(dict.fromkeys(joined_boxes(text, in_boxes))) or marked or named or text
    if not 0 < len(plain_math(found)) <= MAX_CHARS:
        raise ValueError(f"need an expression of 1 to {MAX_CHARS} characters, got {len(plain_math(found))}")
    return found


@functools.lru_cache(maxsize=4096)
def parsed_truth(text: str, timeout_s: float, unreadable: Literal["error", "text"] = "error") -> ParsedTruth:
    """A truth as math-verify reads it.

    Raises:
        ValueError: math-verify cannot read it.
    """
    written = plain_math(text)
    library = math_verify()
    config = [library.LatexExtractionConfig()]

    def parse() -> ParsedTruth:
        read = library.parse(f"\\boxed{{{written}}}", config, parsing_timeout=None)
        expressions = tuple(value for value in read if not isinstance(value, str))
        return ParsedTruth(expressions, max(map(_decimal_places, expressions), default=0))

    # Elsewhere, as for a trainer on a thread of a program, no limit is possible; truths are trusted.
    is_main = threading.current_thread() is threading.main_thread()
    try:
        parsed = run_limited(parse, cpu_s=timeout_s, memory_bytes=_MEMORY_BYTES) if is_main else parse()
    except OverLimitError:
        parsed = ParsedTruth(())
    if not parsed.expressions and unreadable == "error" and not is_words(written):
        raise ValueError(
            f"math-verify cannot read the truth {text[:80]!r}; correct it, or set the option "
            "unreadable_truths: text to compare such truths as texts"
        )
    return parsed


def equal_as_texts(found: Sequence[FoundAnswer], truths: Sequence[str]) -> bool | None:
    """True if an answer is equal to a truth as a text, False if their numbers differ, None if undecided."""
    if not found:
        return False
    answers = [text_key(one.text) for one in found if one.form in _WHOLE]
    keys = [text_key(text) for text in truths]
    if any(text in keys for text in answers):
        return True
    numbers = [int(text.replace(",", "")) for text in [*answers, *keys] if _INTEGER.fullmatch(text)]
    if len(numbers) < len(found) + len(keys):
        return None
    return not set(numbers[: len(answers)]).isdisjoint(numbers[len(answers) :])


# Siblings often have one answer; one that hangs the checker is to do so once.
@functools.lru_cache(maxsize=2048)
def verdict(
    found: tuple[FoundAnswer, ...],
    truths: tuple[ParsedTruth, ...],
    *,
    float_rounding: int,
    strict: bool,
    timeout_s: float,
) -> tuple[bool | None, str]:
    """True if one of the answers is one of the truths, None if that takes too long; and the text read."""
    compare = functools.partial(compared, found, truths, float_rounding=float_rounding, strict=strict)
    try:
        return run_limited(compare, cpu_s=timeout_s, memory_bytes=_MEMORY_BYTES)
    except (OverLimitError, MemoryError):
        importlib.import_module("sympy.core.cache").clear_cache()  # It may hold what was too large.
        return None, ""


def compared(
    found: Sequence[FoundAnswer], truths: Sequence[ParsedTruth], *, float_rounding: int, strict: bool
) -> tuple[bool, str]:
    """True if math-verify holds one of the answers for one of the truths; and the text that it read."""
    library = math_verify()
    golds = [gold for truth in truths for gold in truth.expressions]
    places = max([float_rounding, *(truth.decimal_places for truth in truths)])
    shown = found[0].text if found[0].form in _WHOLE else ""
    for one in found:
        if one.form == "words":
            continue
        is_whole = one.form == "expression"
        text = f"\\boxed{{{plain_math(one.text)}}}" if is_whole else plain_prose(one.text)
        read = library.parse(text, _configs(library, has_anchor=one.form == "anchored"), parsing_timeout=None)
        texts = [one.text] if is_whole else [text for text in read if isinstance(text, str)]
        if library.verify(golds, read, float_rounding=places, strict=strict, timeout_seconds=None):
            return True, "".join(texts[-1:])
        shown = shown or "".join(texts[-1:])
    return False, shown


@functools.cache
def math_verify() -> ModuleType:
    """The library, loaded once in each worker process.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        library = importlib.import_module("math_verify")
    except ImportError as error:
        raise RuntimeError(f"{_MISSING_PACKAGE} ({error})") from error
    # It warns that its own time limits are off; they are those of `run_limited`.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return library


def _decimal_places(expression: Any) -> int:
    """Places at which a number below 0.001 is compared: at the six of math-verify it would be equal to 0."""
    try:
        value = abs(float(expression)) if expression.is_number else 1.0
    except (TypeError, ValueError, OverflowError, AttributeError):  # no real number; sets have no `is_number`
        return 0
    return math.ceil(-math.log10(value)) + 3 if 0 < value < 1e-3 else 0


def _bare_answers(texts: Sequence[str | None]) -> list[FoundAnswer]:
    """Texts that are an answer as a whole: math-verify finds no words, and of x^2+1 only a part."""
    short = [text for text in texts if text and len(text) <= _MAX_BARE_CHARS and "\n" not in text]
    words = [FoundAnswer(text, "words") for text in short if is_words(plain_math(text))]
    return words + [FoundAnswer(text) for text in short if not has_words(plain_math(text))]


@functools.cache
def _configs(library: ModuleType, *, has_anchor: bool) -> list[Any]:
    return [
        library.LatexExtractionConfig(try_extract_without_anchor=not has_anchor),
        library.ExprExtractionConfig(try_extract_without_anchor=not has_anchor),
    ]
