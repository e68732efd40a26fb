r"""Place of the final answer in a text: behind the thoughts, in a box, behind a mark.

Everything here takes time proportional to the length of the text, whatever a policy writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Ends of the thoughts of a model that thinks first (DeepSeek-R1, Qwen3, Magistral).
_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]")
_THOUGHTS_BEGIN = re.compile(r"<(?:think|thinking|thought|reasoning)>|\[THINK\]")
# A box with its brace or, without braces, the text up to the next white space; any escape; a brace.
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\b\s*(?P<content>\{|[^\s{}$\\]+)|\\[^\\]|\\\\(?!boxed|fbox)|[{}]")
# Longest content of a box in which boxes are looked for.
_MAX_CONTENT = 4000
# Between two boxes that are one answer: `\boxed{1} and $x=\boxed{2}$`.
_BETWEEN = re.compile(r"[\s$()\[\]\\]*(?:,|;|\band\b|\bor\b)[\s$()\[\]\\]*(?:[A-Za-z][\w']{0,3}\s*=\s*)?")
_MAX_BETWEEN = 40
# A heading of Markdown and no answer: `#### Step 2`, `#### 1. The area`, `#### Final answer`.
_HEADING = re.compile(r"\W*(?:[0-9]+\s*[.:)]\s+\W*[A-Za-z]{2}|step\b|[A-Za-z]{2,}\W+[A-Za-z])", re.IGNORECASE)
# The rest of a sentence behind "answer is" or "answer:".
_NAMED = re.compile(
    r"\banswer\b\W{0,3}(?:is\b|[:=])[\s:*]{0,9}([^\s][^\n]{0,200}?)(?:\.\s|[.\s]{0,9}$)",
    re.IGNORECASE | re.MULTILINE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_BOX_TO_LINE_END = re.compile(r"\\(?:boxed|fbox)\b[^\n]*")
_ANSWER_TAG, _ANSWER_END = "<answer>", "</answer>"


@dataclass(frozen=True)
class Box:
    """A box of LaTeX.

    Attributes:
        start, end: its place in the text, with the command.
        content: what it holds, without boxes around parts of it.
    """

    start: int
    end: int
    content: str


def without_thoughts(text: str) -> str:
    """The text behind the last end of thoughts; without such an end, the text before thoughts begin.

    So an answer that is cut off within its thoughts has no final answer. A begin behind the last end counts
    as text, since an answer may speak of thoughts.
    """
    ends = [match.end() for match in _THOUGHTS_END.finditer(text)]
    if ends:
        return text[ends[-1] :]
    begin = _THOUGHTS_BEGIN.search(text)
    return text[: begin.start()] if begin else text


def boxes(text: str) -> list[Box]:
    r"""All complete outermost boxes, in order: `\boxed{...}`, `\fbox{...}`, and `\boxed 5` without braces.

    A box without its closing brace, as at the end of an answer that was cut off, is none: its content may be
    cut off too. Escaped braces are text.
    """
    return [Box(begin, end, _without_boxes(text[first:last])) for begin, end, first, last in _spans(text)]


def without_open_boxes(text: str) -> str:
    """A text without complete boxes, also without those that are not closed, each to the end of its line."""
    return _BOX_TO_LINE_END.sub("", text)


def joined_boxes(text: str, found: list[Box]) -> list[str]:
    r"""Contents of the last box and of those that are listed with it, as in `\boxed{1}, \boxed{2}`."""
    contents: list[str] = []
    for i in reversed(range(len(found))):
        if contents and not _is_list(text, found[i].end, found[i + 1].start):
            break
        contents.append(found[i].content)
    return contents[::-1]


def marked_answer(text: str) -> str | None:
    """Answer in the last `<answer>` tag, or else in the last line behind `####` that is no heading."""
    end = text.rfind(_ANSWER_END)
    begin = text.rfind(_ANSWER_TAG, 0, max(end, 0))
    if begin >= 0:
        return text[begin + len(_ANSWER_TAG) : end].strip()
    for match in reversed(list(re.finditer(r"####(?!#)([^\n#]*)", text))):
        if match[1].strip() and not _HEADING.match(match[1][:200]):
            return match[1].strip()
    return None


def named_answer(text: str) -> str | None:
    """Rest of the sentence behind the last "answer is" or "answer:"."""
    named = [match[1] for match in _NAMED.finditer(text)]
    return named[-1].strip() if named else None


def _spans(text: str) -> list[tuple[int, int, int, int]]:
    """Begin and end of each outermost box, and of its content."""
    found: list[tuple[int, int, int, int]] = []
    opened: list[tuple[int, int] | None] = []  # begin of a box and of its content; None for any other brace
    first_box = _BOX.search(text)
    for token in _BOX_TOKENS.finditer(text, first_box.start()) if first_box else ():
        content = token["content"]
        if content == "{":
            opened.append(token.span())
        elif content:
            found.append((*token.span(), *token.span("content")))
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened and (box := opened.pop()):
            begin, first = box
            while found and found[-1][0] > begin:
                found.pop()
            found.append((begin, token.end(), first, token.start()))
    return found


def _without_boxes(content: str) -> str:
    """The content of a box with that of each box inside in the place of that box."""
    while len(content) <= _MAX_CONTENT and (inner := _spans(content)):
        for begin, end, first, last in reversed(inner):
            content = content[:begin] + content[first:last] + content[end:]
    return content.strip()


def _is_list(text: str, begin: int, end: int) -> bool:
    return end - begin <= _MAX_BETWEEN and _BETWEEN.fullmatch(text, begin, end) is not None
