"""A cursor over the text of a turn, and strict JSON in it; the time is linear in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_SPACE = re.compile(r"\s*")
_SHOWN_CHARS = 60


class CallFault(ValueError):
    """A fault in what the policy wrote, in words that it can act on."""


class Scanner:
    """A cursor over a text.

    Args:
        text: to be read.

    Attributes:
        text: as above.
        position: of the next character.
    """

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    @property
    def is_done(self) -> bool:
        """True if only blanks are left."""
        return behind_space(self.text, self.position) == len(self.text)

    @property
    def rest(self) -> str:
        """The text that is not read yet."""
        return self.text[self.position :]

    @property
    def shown(self) -> str:
        """The next characters, for messages."""
        return shown(self.text[self.position : self.position + _SHOWN_CHARS + 1])

    def skip_space(self) -> None:
        """Move behind blanks."""
        self.position = behind_space(self.text, self.position)

    def is_next(self, mark: str) -> bool:
        """True if a mark is next, after blanks."""
        return self.text.startswith(mark, behind_space(self.text, self.position))

    def take(self, mark: str) -> bool:
        """Move behind a mark if it is next, after blanks."""
        start = behind_space(self.text, self.position)
        if not self.text.startswith(mark, start):
            return False
        self.position = start + len(mark)
        return True

    def need(self, mark: str) -> None:
        """Move behind a mark that must be next, after blanks.

        Raises:
            CallFault: it is not.
        """
        if not self.take(mark):
            self.skip_space()
            raise CallFault(f"need {mark}, got {self.shown}")

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Move behind a match that begins here; None if there is none."""
        found = pattern.match(self.text, self.position)
        if found is not None:
            self.position = found.end()
        return found

    def until(self, mark: str) -> str | None:
        """The text before the next mark, and move behind it; None if there is none."""
        place = self.text.find(mark, self.position)
        if place < 0:
            return None
        start, self.position = self.position, place + len(mark)
        return self.text[start:place]

    def json(self) -> Any:
        """The JSON value that is next, after blanks.

        Raises:
            CallFault: there is none.
        """
        self.skip_space()
        try:
            value, self.position = _DECODER.raw_decode(self.text, self.position)
        except json.JSONDecodeError as error:
            start = max(self.position, error.pos - _SHOWN_CHARS // 2)
            raise CallFault(
                f"the JSON is wrong ({error.msg}) at {shown(self.text[start : error.pos + 20])}"
            ) from error
        except RecursionError as error:
            raise CallFault("the JSON is nested too deep") from error
        return value


def shown(text: str) -> str:
    """A text as it stands in messages: quoted, on one line, and cut."""
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...") if text else "the end"


def read_json(text: str) -> Any:
    """The value of a text that is JSON and nothing else.

    Raises:
        CallFault: it is not.
    """
    scanner = Scanner(text)
    value = scanner.json()
    if not scanner.is_done:
        raise CallFault(f"there is text behind the JSON: {scanner.shown}")
    return value


def behind_space(text: str, start: int) -> int:
    """Position of the first character from `start` that is no blank."""
    found = _SPACE.match(text, start)
    return start if found is None else found.end()


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    """A JSON object, of whose keys none occurs twice.

    Raises:
        CallFault: one does, so that one of its values would be lost.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise CallFault(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def finite(text: str) -> float:
    """A number with a fraction or an exponent.

    Raises:
        CallFault: it is too large, or no number.
    """
    value = float(text)
    if value != value or value in (float("inf"), float("-inf")):
        raise CallFault(f"{text[:_SHOWN_CHARS]} is no number of JSON")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=finite, parse_constant=finite)
