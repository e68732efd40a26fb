"""Built-in rewards for the form of an answer: `regex` and `format`.

A worker process imports this module, so it loads nothing heavy.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any, Literal

from verl.rewards.library.extraction import Extract, extracted
from verl.rewards.library.normalization import NORMALIZATIONS, Normalize
from verl.rewards.library.spellings import check_spellings, spellings

Flag = Literal["ignorecase", "multiline", "dotall", "ascii", "verbose"]
Mode = Literal["search", "full"]
Occurrence = Literal["first", "last"]


def regex(
    response: str,
    answer: Any = None,
    *,
    pattern: str,
    mode: Mode = "search",
    flags: list[Flag] | None = None,
    group: int | str | None = None,
    occurrence: Occurrence = "last",
    normalize: Normalize = "unicode",
    extract: Extract = "whole",
) -> dict[str, Any]:
    """1 if the pattern matches the answer, or if a group of its match is the reference; else 0.

    Args:
        response: text of the answer.
        answer: the reference, if a group is given.
        pattern: in the syntax of Python's `re`; without the option, that of the column `pattern`.
        mode: search: the pattern may match anywhere; full: it must match all of the answer.
        flags: of the pattern.
        group: number or name of the group whose text is compared with the reference; none: a match is enough.
        occurrence: match that counts among several; with a group, the last whose group is not empty.
        normalize: brings the group's text and the reference to one spelling.
        extract: part of the answer that is searched.

    Returns:
        The reward; with a group also the accuracy, and the text of the group as `matched`.
    """
    part = extracted(response, extract)
    known = compiled(pattern, flags)
    if group is None:
        has_match = part is not None and (known.fullmatch if mode == "full" else known.search)(part)
        return {"score": float(bool(has_match))}
    text = None if part is None else _group_text(known, part, group, mode=mode, occurrence=occurrence)
    plain = NORMALIZATIONS[normalize]
    right = float(text is not None and plain(text) in map(plain, spellings(answer)))
    return {"score": right, "acc": right, "matched": text or ""}


def prepare_regex(
    *, pattern: str | None = None, flags: list[Flag] | None = None, group: int | str | None = None, **_: Any
) -> None:
    """Check the pattern of the options and its group.

    Raises:
        ValueError: a pattern that `re` cannot read, an empty one, or one without that group.
    """
    if pattern is None:
        return
    if not pattern.strip():
        raise ValueError("need a pattern for the reward function 'regex', got an empty one")
    known = compiled(pattern, flags)
    groups = [*range(known.groups + 1), *known.groupindex]
    if group is not None and group not in groups:
        raise ValueError(
            f"need a group of the pattern {pattern!r} ({', '.join(map(str, groups))}), got {group!r}"
        )


def check_regex(prompt: Any, *, pattern: str | None = None, group: int | str | None = None, **_: Any) -> None:
    """Check the pattern of the column `pattern`, and the reference, if it is compared with a group.

    Raises:
        ValueError: the pattern cannot be read, or as `spellings.check_spellings`.
    """
    if pattern is None:
        try:
            compiled(str(prompt.columns["pattern"]), None)
        except ValueError as error:
            raise ValueError(f"row {prompt.index} of {prompt.source}, column 'pattern': {error}") from error
    if group is not None:
        check_spellings(prompt)


def format_tags(
    response: str,
    prompt_text: str = "",
    *,
    tags: list[str] | None = None,
    pattern: str | None = None,
    text_outside: bool = False,
    partial: bool = False,
) -> float:
    """1 if the answer is `<think>...</think><answer>...</answer>`, or has another given form; else 0.

    DeepSeek-R1, https://arxiv.org/abs/2501.12948, section 2.2.2. Each tag must be opened and closed exactly
    once, in this order, and none inside another. If the prompt that the model reads ends with the opening of
    the first tag, as some chat templates write it, the answer need not open it again.

    Args:
        response: text of the answer.
        prompt_text: text that the model reads as prompt.
        tags: names in their order; none: think and answer.
        pattern: the whole answer must match it, with `.` for line ends too; in place of tags.
        text_outside: text before, between and behind the tags is allowed, not only white space.
        partial: give the share of the conditions that hold: one per tag, and one for the text outside.
    """
    if pattern is not None:
        opened = _opened_tag(prompt_text)
        texts = (response.strip(), f"{opened}{response}".strip())
        return float(any(compiled(pattern, ["dotall"]).fullmatch(text) for text in texts))
    names = tags or ["think", "answer"]
    if _opened_tag(prompt_text) == f"<{names[0]}>" and not response.lstrip().startswith(f"<{names[0]}>"):
        response = f"<{names[0]}>{response}"
    conditions, end, outside = [], 0, ""
    for name in names:
        start, stop = f"<{name}>", f"</{name}>"
        first, last = response.find(start, end), response.find(stop, end)
        holds = response.count(start) == response.count(stop) == 1 and end <= first < last
        conditions.append(holds)
        if holds:
            outside, end = outside + response[end:first], last + len(stop)
    if not text_outside:
        conditions.append(not (outside + response[end:]).strip())
    return sum(conditions) / len(conditions) if partial else float(all(conditions))


def prepare_format(
    *, tags: list[str] | None = None, pattern: str | None = None, partial: bool = False, **options: Any
) -> None:
    """Check tags or pattern.

    Raises:
        ValueError: both, no tags, one twice or with brackets, a pattern that `re` cannot read, or options
            that a pattern does not have.
    """
    if pattern is not None:
        if tags is not None or partial or options.get("text_outside"):
            raise ValueError(
                "need either tags or a pattern for the reward function 'format', got a pattern beside tags, "
                "partial or text_outside; leave one of them out"
            )
        compiled(pattern, ["dotall"])
    elif tags is not None and (len(set(tags)) != len(tags) or not all(map(_is_name, tags)) or not tags):
        raise ValueError(
            f"need names of tags such as [think, answer], each once, for the reward function 'format', got "
            f"{tags}"
        )


def compiled(pattern: str, flags: list[Flag] | None) -> re.Pattern[str]:
    """The pattern, from the cache of `re`.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return re.compile(pattern, sum(re.RegexFlag[flag.upper()] for flag in flags or ()))
    except re.error as error:
        raise ValueError(f"need a regular expression, got {pattern!r}: {error}") from error


def _group_text(
    pattern: re.Pattern[str], text: str, group: int | str, *, mode: Mode, occurrence: Occurrence
) -> str | None:
    """Text of the group in the match that counts; None if there is no match."""
    if mode == "full" or occurrence == "first":
        match = pattern.fullmatch(text) if mode == "full" else pattern.search(text)
        return match.group(group) if match else None
    # Behind its last match, a pattern such as (.*) matches once more, with nothing.
    texts = (match.group(group) for match in pattern.finditer(text))
    return next(iter(deque(filter(None, texts), maxlen=1)), None)


def _opened_tag(prompt_text: str) -> str:
    """The tag with which a prompt ends; "" if it ends with something else."""
    found = re.search(r"<[\w-]+>\s*\Z", prompt_text[-200:])
    return found[0].strip() if found else ""


def _is_name(tag: str) -> bool:
    return re.fullmatch(r"[\w-]+", tag) is not None
