"""Built-in reward `choice`: the option of a multiple-choice question that an answer names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

import numpy as np

from verl.rewards.library.answer_text import without_thoughts
from verl.rewards.library.containment import has_text
from verl.rewards.library.extraction import Extract, between, extracted, last_boxed
from verl.rewards.library.normalization import loose, unicode_plain, without_markup
from verl.rewards.library.spellings import place_of
from verl.utils.sampling_types import Prompt

Truth = Literal["auto", "letter", "index", "text"]
# Columns that hold the options of a question: MMLU, ARC, CommonsenseQA; MMLU-Pro, MedQA; HellaSwag.
_COLUMNS = ("choices", "options", "endings")
_LIST = (list, tuple, np.ndarray)
# Markup, quotes, and control tokens of chat templates.
_MARKS = re.compile(r"\*\*|__|`|\$|\"|<\|\w+\|>|\\[()\[\]]|\\text\w*\{([^{}]*)\}")
_LINE_MARK = re.compile(r"^\s*(?:[#>*\u2022-]+\s+)+")
_SINGLE_QUOTES = re.compile(r"(?<!\w)'(\w{1,3})'(?!\w)")
_DENIAL = re.compile(r"\b(?:not?|never|neither|nor|except|cannot|wrong|incorrect|false)\b|n't\b", re.I)
_NOT_DENIED = (
    r"(?!\W?\s+(?i:(?:is|was|are|would|could|can|must|does)(?:\s+\w+ly)?"
    r"(?:n't|not|\s+(?:not|never|wrong|incorrect|false))\b|(?:wrong|incorrect|false)\b))"
)
# "answer" in Spanish, Portuguese, Italian, French, German, Dutch and Russian, and "is" in these.
_FOREIGN_NOUNS = "respuesta|resposta|risposta|r[e\u00e9]ponse|antwort|antwoord|\u043e\u0442\u0432\u0435\u0442"
_VERBS = "is|be|es|\u00e9|\u00e8|est|ist|lautet"


class ChoiceOptions(NamedTuple):
    """Options of a question.

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
    brackets; the text of an option in a sentence that denies nothing. If that names two options, the answer
    is wrong. Thoughts are no answer. Sentences may be English, Chinese, Spanish, German, French, ...

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
    chosen = None if part is None else chosen_label(without_thoughts(part), known)
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
    """Options of the question of a row.

    Raises:
        ValueError: the row does not have the column `options_key`, or a column of another form.
    """
    names = _COLUMNS if options_key is None else (options_key,)
    given = next((columns[name] for name in names if columns.get(name) is not None), None)
    if options_key is not None and given is None:
        raise ValueError(f"need the options of the question in the column {options_key!r}, got none")
    return options_of(given)


def options_of(given: Any) -> ChoiceOptions:
    """Options of a question from its column; without one, the letters from A to Z.

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
    lines = [line for line in map(_plain_line, text.splitlines()) if line]
    if not lines:
        return None
    whole, find = "\n".join(lines), _patterns(known.labels)
    if stated := _last_statement(whole, known, find):
        return _only(stated)
    if labels := _labels_alone(whole, known) or _labels_alone(lines[-1], known):
        return _only(labels)
    starts = {label for line in lines for label in _labels_at_start(line, find)}
    brackets = {_label(m) for m in find["bracket"].finditer(whole)}
    return _only(starts or brackets or _mentioned(whole, known))


def _plain_line(line: str) -> str:
    """A line without marks of Markdown and LaTeX, and without quotes."""
    return _SINGLE_QUOTES.sub(r"\1", unicode_plain(_LINE_MARK.sub("", _MARKS.sub(r"\1", line))))


def _mentioned(text: str, known: ChoiceOptions) -> set[str]:
    """Labels of the options whose texts stand in a text; none if it denies something, or for short texts."""
    texts, plain = [loose(option) for option in known.texts], loose(text)
    if _DENIAL.search(text) or any(len(option) < 3 for option in texts):
        return set()
    there = [i for i, option in enumerate(texts) if has_text(plain, option, words=True)]
    # "dog" stands in "hot dog", too.
    return {known.labels[i] for i in there if not any(j != i and texts[i] in texts[j] for j in there)}


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
    east = r"\u3001\u3002\u3040-\u30ff\u4e00-\u9fff"  # Chinese and Japanese go on without a space.
    ends = rf"(?=\s*(?:$|[\n.,:;!?)\]}}/&|{east}]|-\s|(?i:because|since|as|or|and|by|due|for|which|with)\b))"
    tail = rf"(?![^\W{east}]|\.\d|')"
    # "A" and "I" are also words: they count only where a sentence may go on behind a letter.
    plain = rf"((?:{upper})){tail}(?:{ends}|(?<![AI])(?=\s))"
    small = rf"((?i:{upper})){tail}{ends}"
    bracket = rf"[(\[]\s*((?i:{upper}))\s*[)\]]{_NOT_DENIED}"
    one = rf"(?:{bracket}|{plain}|{small}){_NOT_DENIED}"
    noun = rf"(?:answer|ans|choice|option|solution|letter|{_FOREIGN_NOUNS})"
    words = rf"(?:[ \t]+(?!(?:{_VERBS}|not|cannot|can't|never)\b)[\w'\"]+){{0,6}}?"
    head = rf"(?i:\b{noun}\b{words}[ \t]*(?:\b(?:{_VERBS})\b|:|=|->|\u2192)\s*:?\s*)"
    chinese = (
        r"(?:(?:\u7b54\u6848|\u9009\u9879|\u6b63\u89e3|\u7b54\u3048)\s*"
        r"(?:\u662f|\u4e3a|\u9009|\u9078|\u306f|:)+|[\u9009\u9078][\u62e9\u64c7]?)\s*:?\s*"
    )
    pick = r"(?i:\b(?:choose|pick|select|go(?:ing)? with|it(?: is|'s| must be| would be))\s+)"
    the = rf"(?i:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?{noun}\s*:?\s*)?"
    return {
        "stated": re.compile(rf"(?:{head}|{pick}|{chinese})(?:[a-z]+ly\s+)?{the}{one}"),
        "said": re.compile(rf"{head}([^\n]+)"),
        "confirmed": re.compile(
            rf"(?<![\w'])(?:{bracket}|((?:{upper})))\s+(?i:is|must be|would be)\s+(?i:the\s+)?"
            r"(?i:correct|right|best|answer|true)\b"
        ),
        "start": re.compile(rf"\s*(?:(?i:option|choice|answer)\s+){{0,2}}{one}"),
        "further": re.compile(rf"\s*[).\]]?\s*(?:,|/|&|\||(?i:\bor\b|\band\b))+\s*(?:(?i:or|and)\s+)?{one}"),
        "bracket": re.compile(bracket),
    }
