"""Built-in reward `choice`: the option of a multiple-choice question that an answer names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

import numpy as np

from verl.rewards.library.extraction import Extract, between, extracted, last_boxed
from verl.rewards.library.normalization import loose, unicode_plain, without_markup
from verl.rewards.library.spellings import place_of
from verl.utils.sampling_types import Prompt

Truth = Literal["auto", "letter", "index", "text"]
# Columns that hold the options of a question: MMLU, ARC, CommonsenseQA; MMLU-Pro, MedQA; HellaSwag.
_COLUMNS = ("choices", "options", "endings")
_LIST = (list, tuple, np.ndarray)
_MARKS = re.compile(r"\*\*|__|`|\$|\\[()\[\]]|\\text\w*\{([^{}]*)\}")


class ChoiceOptions(NamedTuple):
    """ChoiceOptions of a question.

    Attributes:
        labels: letters or numbers, upper case.
        texts: of the options, in the same order; empty if the data has none.
    """

    labels: tuple[str, ...] = tuple(ascii_uppercase)
    texts: tuple[str, ...] = ()


def choice(
    response: str,
    answer: Any = None,
    *,
    truth: Truth = "auto",
    first_index: Literal[0, 1] = 0,
    options_key: str | None = None,
    extract: Extract = "whole",
    **columns: Any,
) -> dict[str, Any]:
    """1 if the answer names the right option of a multiple-choice question, by its letter or text; else 0.

    In this order, the first that is there decides: the last `boxed`, the last `<answer>`, the last sentence
    such as "the answer is (B)", "Answer: B" or "B is correct"; an answer or a last line that is a letter,
    such as "B." or "**(B)** Paris", or the text of an option; letters at the start of lines; letters in
    brackets. If that names two options, the answer is wrong.

    Args:
        response: text of the answer.
        answer: the truth, see `right_label`.
        truth: form of the truth; auto: whichever fits.
        first_index: number of the first option, if the truth is a number: 0 in MMLU and HellaSwag.
        options_key: column with the options, a list of texts, {"A": text, ...}, or {"text": [...], "label":
            [...]}; none: choices, options or endings, if there is one.
        extract: part of the answer that is read.
        columns: of the row.

    Returns:
        The reward and the accuracy, and the label that the answer names as `chosen`.
    """
    known = row_options(columns, options_key)
    part = extracted(response, extract)
    chosen = None if part is None else chosen_label(part, known)
    right = float(chosen is not None and chosen == right_label(answer, known, truth, first_index))
    return {"score": right, "acc": right, "chosen": chosen or ""}


def check_choice(
    prompt: Prompt,
    *,
    truth: Truth = "auto",
    first_index: Literal[0, 1] = 0,
    options_key: str | None = None,
    **_: Any,
) -> None:
    """Check that the truth of a prompt names one of its options.

    Raises:
        ValueError: it names none, or two, read as a number and as a text.
    """
    try:
        right_label(prompt.answer, row_options(prompt.columns, options_key), truth, first_index)
    except ValueError as error:
        raise ValueError(f"{place_of(prompt)}: {error}") from error


def row_options(columns: Mapping[str, Any], options_key: str | None) -> ChoiceOptions:
    """ChoiceOptions of the question of a row.

    Raises:
        ValueError: the row does not have the column `options_key`, or a column of another form.
    """
    names = _COLUMNS if options_key is None else (options_key,)
    given = next((columns[name] for name in names if columns.get(name) is not None), None)
    if options_key is not None and given is None:
        raise ValueError(f"need the options of the question in the column {options_key!r}, got none")
    return options_of(given)


def options_of(given: Any) -> ChoiceOptions:
    """ChoiceOptions of a question from its column; without one, the letters from A to Z.

    Raises:
        ValueError: the column has another form.
    """
    if given is None:
        return ChoiceOptions()
    if isinstance(given, Mapping):
        filled = {key: value for key, value in given.items() if value is not None}
        if "text" in filled and isinstance(filled["text"], _LIST):
            texts = [str(text) for text in filled["text"]]
            labels = [str(label) for label in filled.get("label", ascii_uppercase[: len(texts)])]
        else:
            labels, texts = list(map(str, filled)), [str(text) for text in filled.values()]
    elif isinstance(given, _LIST) and not any(isinstance(text, (Mapping, *_LIST)) for text in given):
        texts = [re.sub(r"^\s*\(?([A-Z])[.):]\s+", "", str(text)) for text in given]
        labels = list(ascii_uppercase[: len(texts)])
    else:
        raise ValueError(
            f"need options as a list of texts, {{letter: text}} or {{text: [...], label: [...]}}, got "
            f"{type(given).__name__} {str(given)[:60]!r}"
        )
    if not texts or len(labels) != len(texts):
        raise ValueError(f"need one label for each of some options, got {len(labels)} and {len(texts)}")
    return ChoiceOptions(tuple(label.strip().upper() for label in labels), tuple(texts))


def right_label(answer: Any, known: ChoiceOptions, truth: Truth = "auto", first_index: int = 0) -> str:
    """Label of the right option.

    Args:
        answer: a letter such as "B", "(B)" or "b."; the number of the option, from `first_index` on, as a
            number or as digits; or the text of an option.
        known: the options.
        truth: "letter", "index" or "text": only read it so.
        first_index: number of the first option.

    Raises:
        ValueError: it names no option, or two of them.
    """
    value = answer.item() if isinstance(answer, np.generic) else answer
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found: dict[str, str] = {}
    if isinstance(value, str):
        letter = without_markup(value).strip("()[]").upper()
        if letter in known.labels:
            found["letter"] = letter
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip().isdigit():
        index = int(value) - first_index
        # A label such as "1" is a label, and no index.
        if 0 <= index < len(known.labels) and "letter" not in found:
            found["index"] = known.labels[index]
    if value is not None and known.texts:
        same = [i for i, text in enumerate(known.texts) if loose(text) == loose(str(value))]
        if len(same) == 1:
            found["text"] = known.labels[same[0]]
    read = found if truth == "auto" else {k: label for k, label in found.items() if k == truth}
    if len(set(read.values())) == 1:
        return next(iter(read.values()))
    named = ", ".join(known.labels) if known.texts else "A to Z, since the row has no column of options"
    if read:
        both = " and ".join(f"the {kind} of {label}" for kind, label in read.items())
        raise ValueError(
            f"need a truth that names one option, got {answer!r}, which is {both}; say which: {{name: "
            f"choice, truth: {next(iter(read))}}}"
        )
    raise ValueError(
        f"need a truth that is a letter ({named}), the number of an option from {first_index} on, or its "
        f"text, got {answer!r}; name the column that holds it in data.answer_key, and the column of the "
        f"options {', '.join(_COLUMNS)} or as options_key"
    )


def chosen_label(text: str, known: ChoiceOptions) -> str | None:
    """Label of the one option that an answer names; None if it names none, or more than one."""
    for inner in (last_boxed(text), between(text, "<answer>", "</answer>")):
        if inner is not None:
            return _only(_labels_in(inner, known))
    lines = [unicode_plain(_MARKS.sub(r"\1", line)) for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    whole, find = "\n".join(lines), _patterns(known.labels)
    if stated := _last_statement(whole, known, find):
        return _only(stated)
    if labels := _labels_alone(whole, known) or _labels_alone(lines[-1], known):
        return _only(labels)
    starts = {label for line in lines for label in _labels_at_start(line, find)}
    brackets = {_label(m) for m in find["bracket"].finditer(whole)}
    return _only(starts or brackets)


def _only(labels: set[str]) -> str | None:
    return next(iter(labels)) if len(labels) == 1 else None


def _label(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()


def _labels_in(part: str, known: ChoiceOptions) -> set[str]:
    """Labels that a marked part names: it is the text of an option, or begins with a letter or several."""
    plain = unicode_plain(_MARKS.sub(r"\1", without_markup(part)))
    return _labels_of_text(plain, known) or _labels_at_start(plain, _patterns(known.labels))


def _labels_alone(text: str, known: ChoiceOptions) -> set[str]:
    """Labels in a text of nothing else than the text of an option, or letters, or a letter with its text."""
    if same := _labels_of_text(text, known):
        return same
    find = _patterns(known.labels)
    match = find["start"].match(text)
    if not match:
        return set()
    end, labels = match.end(), {_label(match)}
    while further := find["further"].match(text, end):
        end = further.end()
        labels.add(_label(further))
    rest = text[end:].lstrip(" .):-")
    return labels if not rest or _labels_of_text(rest, known) == labels else set()


def _labels_of_text(text: str, known: ChoiceOptions) -> set[str]:
    return {known.labels[i] for i, option in enumerate(known.texts) if loose(option) == loose(text)}


def _labels_at_start(text: str, find: Mapping[str, re.Pattern[str]]) -> set[str]:
    match = find["start"].match(text)
    return {_label(match)} | _further(text, match.end(), find) if match else set()


def _further(text: str, end: int, find: Mapping[str, re.Pattern[str]]) -> set[str]:
    """Labels that follow a label at once: "A or B", "A, B and C"."""
    found = set()
    while match := find["further"].match(text, end):
        found.add(_label(match))
        end = match.end()
    return found


def _last_statement(text: str, known: ChoiceOptions, find: Mapping[str, re.Pattern[str]]) -> set[str]:
    """Labels that the last sentence about the answer names; empty without such a sentence."""
    best, labels = -1, set[str]()
    for name in ("stated", "confirmed"):
        for match in find[name].finditer(text):
            if match.start() >= best:
                best = match.start()
                labels = {_label(match)} | _further(text, match.end(), find)
    by_text = {loose(option): known.labels[i] for i, option in enumerate(known.texts)}
    for match in find["said"].finditer(text):
        label = by_text.get(loose(match[1]))
        if label and match.start() > best:
            best, labels = match.start(), {label}
    return labels


@lru_cache(maxsize=256)
def _patterns(labels: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """Patterns of the forms in which these labels are named."""
    upper = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    ends = r"(?=\s*(?:$|[\n.,:;!?)\]/&|]|-\s|(?i:because|since|as|or|and|by|due|for|which|with)\b))"
    # "A" and "I" are also words: they count only where a sentence may go on behind a letter.
    plain = rf"((?:{upper}))(?!\w|\.\d|')(?:{ends}|(?<![AI])(?=\s))"
    small = rf"((?i:{upper}))(?!\w|\.\d|'){ends}"
    bracket = rf"[(\[]\s*((?i:{upper}))\s*[)\]]"
    one = rf"(?:{bracket}|{plain}|{small})"
    noun = r"(?:answer|choice|option|solution|letter)"
    words = r"(?:[ \t]+(?!is\b|be\b)[\w'\"]+){0,6}?"
    head = rf"(?i:\b{noun}\b{words}[ \t]*(?:\bis\b|\bbe\b|:|=|->|\u2192)\s*:?\s*)"
    chinese = r"(?:\u7b54\u6848|\u9009\u9879)\s*(?:\u662f|\u4e3a|:|\uff1a)+\s*"
    pick = r"(?i:\b(?:choose|pick|select|go(?:ing)? with|it(?: is|'s| must be| would be))\s+)"
    the = rf"(?i:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?{noun}\s*:?\s*)?"
    return {
        "stated": re.compile(rf"(?:{head}|{pick}|{chinese})(?:[a-z]+ly\s+)?{the}{one}"),
        "said": re.compile(rf"{head}([^\n]+)"),
        "confirmed": re.compile(
            rf"(?<![\w'])(?:{bracket}|((?:{upper})))\s+(?i:is|must be|would be)\s+(?i:the\s+)?"
            r"(?i:correct|right|best|answer|true)\b"
        ),
        "start": re.compile(rf"\s*(?:(?i:option|choice|answer)\s+)?{one}"),
        "further": re.compile(rf"\s*[).\]]?\s*(?:,|/|&|\||(?i:\bor\b|\band\b))+\s*(?:(?i:or|and)\s+)?{one}"),
        "bracket": re.compile(bracket),
    }
