"""Results of tools as the policy reads them: texts, JSON, and long ones cut in their middle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from verl.agents.environments.session import ToolResult
from verl.agents.tools.tool_source import ToolFailure
from verl.tools.schemas import ToolResponse

_PARTS = {"text", "image", "image_url", "video"}


def tool_result(value: Any, *, max_chars: int) -> ToolResult:
    """The result of a call from the value that its tool returned.

    A text stays as it is; a list of parts of a message, such as images, becomes `content`; anything else
    becomes JSON. A `ToolResult` keeps its reward and metrics.

    Args:
        value: as it was returned.
        max_chars: longer texts are cut.

    Raises:
        ToolFailure: it is neither a text nor can it be written as JSON.
    """
    value = from_verl(value)
    if isinstance(value, ToolResult):
        if not isinstance(value.text, str):
            value = replace(value, text=as_text(value.text))
        return replace(value, text=cut(value.text, max_chars))
    if is_content(value):
        texts = [part["text"] for part in value if part["type"] == "text"]
        parts = [{**part, "text": cut(part["text"], max_chars)} if "text" in part else part for part in value]
        return ToolResult(cut("\n".join(texts), max_chars), content=parts)
    return ToolResult(cut(as_text(value), max_chars))


def from_verl(value: Any) -> Any:
    """A result in verl's form, `ToolResponse` or (response, reward, metrics), as a `ToolResult`."""
    response, reward = value, None
    metrics: Mapping[str, Any] = {}
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], dict):
        response, reward, metrics = value
    elif not isinstance(value, ToolResponse):
        return value
    numbers = {name: float(each) for name, each in metrics.items() if isinstance(each, (int, float))}
    content = None
    if isinstance(response, ToolResponse):
        media = [("image", each) for each in response.image or ()] + [
            ("video", each) for each in response.video or ()
        ]
        content = [{"type": kind, kind: each} for kind, each in media] or None
        response = response.text or ""
    if content and response:
        content.append({"type": "text", "text": response})
    return ToolResult(as_text(response), reward=reward, metrics=numbers, content=content)


def failed_result(failure: ToolFailure, *, max_chars: int) -> ToolResult:
    """The result that tells the policy of a failure."""
    text = cut(f"Error: {failure.text}", max_chars)
    return ToolResult(text, outcome=failure.outcome, detail=failure.detail)


def is_content(value: Any) -> bool:
    """True for the parts of a message."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, dict) and part.get("type") in _PARTS for part in value)
        and all(isinstance(part.get("text", ""), str) for part in value)
    )


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON.

    Raises:
        ToolFailure: it cannot be written as JSON.
    """
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=plain)
    except (TypeError, ValueError, RecursionError) as error:
        detail = (
            f"need a result that is a text or can be written as JSON, got {type(value).__name__}: {error}"
        )
        raise ToolFailure("error", detail) from error


def plain(value: Any) -> Any:
    """A dataclass, a set, a model of Pydantic, or an array as values of JSON.

    Raises:
        TypeError: it is something else.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    for name in ("model_dump", "tolist", "isoformat"):
        method = getattr(value, name, None)
        if callable(method) and not isinstance(value, type):
            return method()
    raise TypeError(f"{type(value).__name__} is no type of JSON")


def cut(text: str, max_chars: int) -> str:
    """The text, without its middle where it is longer."""
    if len(text) <= max_chars:
        return text
    mark = f"\n... [{len(text) - max_chars} characters left out] ...\n"
    head = (max_chars + 1) // 2
    return text[:head] + mark + text[len(text) - (max_chars - head) :]
