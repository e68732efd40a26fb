"""Values as Python writes them, and as Gemma does; lists of calls in Python's form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from verl.utils.tool_calls.arguments import parameters_of
from verl.utils.tool_calls.calls import ToolCall
from verl.utils.tool_calls.scanning import CallFault, Scanner, finite, unique_keys

_MAX_DEPTH = 64
# One string of Python's on one line, or in triple quotes.
_STRING = re.compile(
    r'([rRuU]?)(?:"""((?:[^"\\]|\\.|"(?!""))*)"""'
    r"|'''((?:[^'\\]|\\.|'(?!''))*)'''"
    r'|"((?:[^"\\\n]|\\.)*)"'
    r"|'((?:[^'\\\n]|\\.)*)')",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_WHOLE = re.compile(r"[+-]?\d+(?![\d.eE_])")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"[A-Za-z_]\w*")
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_BARE_KEY = re.compile(r"[^:{}\[\],<>\s][^:{}\[\],<>]*")
_FUNCTION = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\(")
_KEYWORD = re.compile(r"\s*([A-Za-z_]\w*)\s*=(?!=)")


class LiteralReader:
    """Reads values at a cursor.

    Args:
        scanner: the cursor.
        quote: stands before and behind a string, whose keys are then bare; "": strings and keys as Python has
            them.
    """

    def __init__(self, scanner: Scanner, quote: str = "") -> None:
        self._scanner, self._quote = scanner, quote

    def value(self, depth: int = 0) -> Any:
        """The next value; tuples become lists.

        Raises:
            CallFault: there is none.
        """
        scanner = self._scanner
        if depth > _MAX_DEPTH:
            raise CallFault(f"values are nested deeper than {_MAX_DEPTH}")
        if scanner.take("["):
            return self.items("]", depth)
        if scanner.take("{"):
            return self.pairs(depth)
        if not self._quote and scanner.take("("):
            return self.items(")", depth)
        return self.scalar()

    def items(self, closing: str, depth: int = 0) -> list[Any]:
        """The items of a list whose beginning is read."""
        found: list[Any] = []
        while not self._scanner.take(closing):
            found.append(self.value(depth + 1))
            if not self._scanner.take(","):
                self._scanner.need(closing)
                break
        return found

    def pairs(self, depth: int = 0) -> Mapping[str, Any]:
        """The items of a dictionary whose beginning is read."""
        found: list[tuple[str, Any]] = []
        while not self._scanner.take("}"):
            key = self.key()
            self._scanner.need(":")
            found.append((key, self.value(depth + 1)))
            if not self._scanner.take(","):
                self._scanner.need("}")
                break
        return unique_keys(found)

    def key(self) -> str:
        """A key of a dictionary, as a text."""
        self._scanner.skip_space()
        bare = self._scanner.match(_BARE_KEY) if self._quote else None
        return str(self.scalar()) if bare is None else bare[0].strip()

    def scalar(self) -> Any:
        """A string, a number, a truth value, or none."""
        scanner = self._scanner
        scanner.skip_space()
        if self._quote:
            if scanner.take(self._quote):
                text = scanner.until(self._quote)
                if text is None:
                    raise CallFault(f"need {self._quote} behind a text that begins with it")
                return text
        elif found := scanner.match(_STRING):
            body = next((part for part in found.groups()[1:] if part is not None), "")
            return body if found[1] in ("r", "R") else _ESCAPE.sub(unescaped, body)
        if number := scanner.match(_WHOLE):
            return int(number[0])
        if number := scanner.match(_NUMBER):
            return finite(number[0])
        start = scanner.position
        word = scanner.match(_WORD)
        if word is not None and word[0] in _WORDS:
            return _WORDS[word[0]]
        scanner.position = start
        raise CallFault(f"need a text, a number, a list or an object, got {scanner.shown}")


def unescaped(escape: re.Match[str]) -> str:
    """The character of an escape in a string of Python's; one that Python does not know stays as it is."""
    code = escape[1]
    if len(code) > 1 and code[0] in "xuU":
        return chr(int(code[1:], 16))
    if code[0] in "01234567":
        return chr(int(code, 8))
    return code if code in "\\'\"" else _ESCAPED.get(code, escape[0])


def read_call(scanner: Scanner, tools: Sequence[Mapping[str, Any]]) -> ToolCall:
    """The next call, `name(key=value, ...)`; arguments without a key by the order of the tool's parameters.

    Raises:
        CallFault: there is none.
    """
    function = scanner.match(_FUNCTION)
    if function is None:
        raise CallFault(f"need name(argument=value, ...), got {scanner.shown}")
    reader, in_order = LiteralReader(scanner), list(parameters_of(tools, function[1]))
    found: list[tuple[str, Any]] = []
    while not scanner.take(")"):
        keyword = scanner.match(_KEYWORD)
        if keyword is None and len(found) >= len(in_order):
            raise CallFault(f"need arguments of {function[1]} as name=value, got {scanner.shown}")
        key = in_order[len(found)] if keyword is None else keyword[1]
        found.append((key, reader.value()))
        if not scanner.take(","):
            scanner.need(")")
            break
    return ToolCall(function[1], unique_keys(found))


def read_calls(scanner: Scanner, tools: Sequence[Mapping[str, Any]]) -> list[ToolCall]:
    """The next list of calls, `[f(a=1), g()]`.

    Raises:
        CallFault: there is none.
    """
    scanner.need("[")
    calls: list[ToolCall] = []
    while not scanner.take("]"):
        calls.append(read_call(scanner, tools))
        if not scanner.take(","):
            scanner.need("]")
            break
    return calls


def literal(text: str) -> Any:
    """The value of a text that is a literal of Python and nothing else.

    Raises:
        ValueError: it is not.
    """
    scanner = Scanner(text)
    value = LiteralReader(scanner).value()
    if not scanner.is_done:
        raise CallFault(f"there is text behind the value: {scanner.shown}")
    return value
