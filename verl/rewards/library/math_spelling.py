r"""Spellings of mathematics brought to those that math-verify reads as meant.

math-verify 0.9 reads some spellings as another value or not at all: `3 1/2` as 2, `1.5e3` as 1.5 times e
times 3, `1\,000` as 0, `pi/2` as a product of letters, `0.\overline{3}`, a square root sign, a full-width
digit and `42.` not at all. Each has one meaning in an answer, and is written here as math-verify knows it.
"""

from __future__ import annotations

import re
import unicodedata

# Longest expression that is read: a parser takes about a millisecond for each of its characters.
MAX_CHARS = 4000

_SYMBOLS = {
    "\u2212": "-",
    "\u2013": "-",
    "\u2044": "/",
    "\u00b0": r"^\circ ",
    "\u221e": r"\infty ",
    "\u03c0": r"\pi ",
    "\u00a0": " ",
    "\u202f": " ",
    "\u2009": " ",
}
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a\u207f", "0123456789-+n"
)
_RAISED_RUN = re.compile(f"[{''.join(map(chr, _RAISED))}]+")
_ROOT = re.compile("\u221a\\s*(?:\\(([^()]*)\\)|([0-9]+|[A-Za-z]))")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_MIXED_NUMBER = re.compile(r"(?<![\w.}/^])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![\w.^!/])")
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:(?:\\[,;:! ]|~)[0-9]{3})+(?![0-9])")
_ALL_SPACED_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
_POWER_OF_TEN = re.compile(r"(?<![\w.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([-+]?[0-9]+)(?![\w.])")
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]+)\}")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
# Behind a digit math-verify takes i for a variable, elsewhere for the imaginary unit, unless i is an index.
_IMAGINARY = re.compile(r"(?<=[0-9])i(?![A-Za-z0-9_])")
_INDEX = re.compile(r"_\{?i|\\(?:sum|prod)")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*([0-9])\s*([0-9])")
_ANGLED = re.compile(r"\\langle(.*?)\\rangle", re.DOTALL)
_UNIT_WORDS = re.compile(r"(?P<value>[^A-Za-z]*[0-9}%])\s+(?P<words>[A-Za-z]{3,}(?:[ .-]+[A-Za-z]+)*)\.?")
# Words that change the number before them, or that math-verify knows.
_COUNT_WORDS = re.compile(
    r"\b(?:and|or|mod|base|dozen|hundred|(?:m|b|tr)illion|thousand|percent|percentage|pct|"
    r"hal(?:f|ves)|quarters?|thirds?|tenths?|hundredths?|squared|cubed|factorial|plus|minus|times|"
    r"over|infinity|pairs?)\b",
    re.IGNORECASE,
)
# Latin and Cyrillic; of Japanese, Chinese and Korean, one character is enough.
_WORD = re.compile(
    r"(?<![\\A-Za-z])[A-Za-z\u00c0-\u024f\u0400-\u052f]{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
# Chinese, Japanese and Korean with their punctuation, which stand next to a number without a space.
_EAST = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff08\uff09\uff0c\uff1a\uff1b\uff1d]")
_CURRENCY = re.compile(r"\\?\$|[\u20ac\u00a3\u00a5\u20b9]")
_LETTER_TIMES = re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)")
# Function and constant names that stand in expressions.
_NAMES = re.compile(
    "pi|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|inf|and|or|max|min|gcd|lcm|mod", re.IGNORECASE
)
_ONLY_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")


def plain_math(text: str) -> str:
    r"""An expression in the spellings that math-verify reads as meant.

    Takes away: invisible and control characters, signs of currency, stars of Markdown, a period at the end,
    `\text{}` around all of it, and words of a unit behind a number. A text of more than `MAX_CHARS` is only
    stripped.
    """
    if len(text) > MAX_CHARS:
        return text.strip()
    text = _CURRENCY.sub("", _unicode_to_latex(text)).strip().strip("*").strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    while whole := _TEXT_COMMAND.fullmatch(text):
        text = whole[1].strip()
    if (unit := _UNIT_WORDS.fullmatch(text)) and not _COUNT_WORDS.search(unit["words"]):
        text = unit["value"]
    if _ALL_SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text)
    text = _MIXED_NUMBER.sub(_mixed_number, text)
    text = _LETTER_TIMES.sub(r" \\times ", text)
    text = _POWER_OF_TEN.sub(r"\1 \\times 10^{\2}", text)
    text = _REPEATING.sub(_repeating_decimal, text)
    if not _INDEX.search(text):
        text = _IMAGINARY.sub(" i", text)
    text = _BINOMIAL.sub(r"\\binom{\1}{\2}", text.replace(r"\varnothing", r"\emptyset"))
    return _ANGLED.sub(r"(\1)", _PI.sub(r"\\pi ", text)).strip()


def plain_prose(text: str) -> str:
    """A text in which math-verify finds numbers beside words of all scripts and escaped dollar signs."""
    return _EAST.sub(" ", text.replace(r"\$", ""))


def text_key(text: str) -> str:
    r"""Key by which two answers are equal as texts: without `\text{}` around words, and case of words."""
    if len(text) > MAX_CHARS:
        return text
    text = " ".join(_TEXT_COMMAND.sub(r"\1", plain_math(text)).split())
    return text.casefold() if is_words(text) else text


def is_words(text: str) -> bool:
    """True for words alone, of two letters or more."""
    return _ONLY_WORDS.fullmatch(text) is not None


def has_words(text: str) -> bool:
    """True if words stand in the text that are no names of functions, as in a sentence."""
    outside = _TEXT_COMMAND.sub(" ", text)
    return any(not _NAMES.fullmatch(word) for word in _WORD.findall(outside))


def _unicode_to_latex(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    text = _RAISED_RUN.sub(lambda match: f"^{{{match[0].translate(_RAISED)}}}", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    return "".join(_ascii_spelling(character) for character in text)


def _ascii_spelling(character: str) -> str:
    if character in _SYMBOLS or character.isascii() and character.isprintable():
        return _SYMBOLS.get(character, character)
    if character in "\n\t\r":
        return " "
    category, parts = unicodedata.category(character), unicodedata.decomposition(character).split()
    if category in ("Cc", "Cf"):  # NUL, marks of writing direction, spaces without width
        return ""
    if category == "Nd":
        return str(unicodedata.digit(character))
    if parts[:1] == ["<fraction>"]:
        above, _, below = "".join(chr(int(part, 16)) for part in parts[1:]).partition("\u2044")
        return rf"\frac{{{above}}}{{{below}}}"
    return unicodedata.normalize("NFKC", character)


def _mixed_number(match: re.Match[str]) -> str:
    whole, above, below = match.groups()
    is_proper = len(above) <= len(below) <= 9 and int(above) < int(below)
    return rf"{whole}\frac{{{above}}}{{{below}}}" if is_proper else match[0]


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, once, again = match.groups()
    if len(match[0]) > 60:
        return match[0]
    above = int(f"{whole}{once}{again}") - int(f"{whole}{once}" or "0")
    return rf"\frac{{{above}}}{{{'9' * len(again)}{'0' * len(once)}}}"
