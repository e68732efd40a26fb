"""Actions that a policy writes as text, and texts of states, for environments that have neither."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_TAGGED = re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
# A run of characters in colours of a terminal, which mark a place on a map.
_COLOURED = re.compile(r"(?:\x1b\[[0-9;]*m)+([^\x1b]*)\x1b\[0m")
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def action_text(message: Mapping[str, Any]) -> str:
    """The part of a turn with the action: in the last `<action>` tags, else behind the thoughts, else all."""
    text = str(message["content"] or "")
    tagged = _TAGGED.findall(text)
    return (tagged[-1] if tagged else text.rpartition("</think>")[2]).strip()


def named_action(text: str, names: Sequence[str]) -> int | None:
    """Number of the action that a text names last, by its name or its number; None: none.

    Args:
        text: of the policy.
        names: of the actions, by number.
    """
    found: dict[int, int] = {}  # position in the text -> action
    for number, name in enumerate(names):
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE):
            found[match.end()] = number
    for match in re.finditer(r"(?<![\w.-])\d+(?![\w])", text):
        if int(match[0]) < len(names):
            found.setdefault(match.end(), int(match[0]))
    return found[max(found)] if found else None


def numbers_in(text: str) -> list[float]:
    """Numbers in a text, in order."""
    return [float(number) for number in _NUMBER.findall(text)]


def marked(drawing: str) -> str:
    """A drawing for terminals as plain text, coloured places in brackets."""
    return _ESCAPE.sub("", _COLOURED.sub(r"[\1]", drawing)).strip("\n")
