"""Spellings that stand for the same text: Unicode variants, markup around an answer, SQuAD's normal form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

Normalize = Literal["none", "unicode", "loose", "squad"]
# Kinds of compatibility characters that only look different, such as full-width digits and no-break spaces.
# Superscripts, subscripts, fractions and circled digits mean something else than their plain characters.
_SAME_LOOK = ("<wide>", "<narrow>", "<noBreak>", "<compat>", "<font>", "<small>")
_MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63"), "-")
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u2032"), "'") | dict.fromkeys(
    map(ord, "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb"), '"'
)
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f"), None)
_TABLE: dict[int, str | None] = {**_MINUS, **_QUOTES, **_INVISIBLE}
_PAIRS = (
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("_", "_"),
    ("```", "```"),
    ("`", "`"),
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ('"', '"'),
    ("'", "'"),
    ("\\boxed{", "}"),
    ("{", "}"),
)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*)\}")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def unicode_plain(text: str) -> str:
    """The text with one spelling of each character, and single spaces.

    Full-width and mathematical letters, digits of all scripts, ligatures and no-break spaces become plain
    ones; all dashes and minus signs "-"; typographic quotes straight ones; invisible characters vanish;
    accents are composed.
    """
    if not text.isascii():
        text = "".join(map(_plain_character, text)).translate(_TABLE)
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def without_markup(text: str) -> str:
    r"""The text without Markdown or LaTeX around all of it, `\text{}` in it, and punctuation behind it."""
    text = _LATEX_TEXT.sub(r"\1", text)
    while True:
        before, text = text, text.strip().rstrip(".,;:\u3002").strip()
        for start, end in _PAIRS:
            if len(text) <= len(start) + len(end) or not (text.startswith(start) and text.endswith(end)):
                continue
            inner = text[len(start) : -len(end)]
            if start not in inner and end not in inner:
                text = inner
        if text == before:
            return text


def loose(text: str) -> str:
    """As `unicode_plain`, without markup and punctuation around it, in lower case."""
    return unicode_plain(without_markup(unicode_plain(text))).casefold()


def squad(text: str) -> str:
    """Lower case without punctuation and articles, with single spaces: SQuAD, arXiv 1606.05250.

    A text of nothing but these, such as "A", stays as it is in lower case.
    """
    plain = unicode_plain(text).casefold()
    kept = "".join(c for c in plain if not unicodedata.category(c).startswith(("P", "S")))
    return " ".join(_ARTICLES.sub(" ", kept).split()) or " ".join(kept.split()) or plain


@lru_cache(maxsize=4096)
def _plain_character(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return unicodedata.normalize("NFKC", character) if kind in _SAME_LOOK else character


NORMALIZATIONS: dict[Normalize, Callable[[str], str]] = {
    "none": str.strip,
    "unicode": unicode_plain,
    "loose": loose,
    "squad": squad,
}
