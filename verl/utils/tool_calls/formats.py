"""Forms in which models write calls of tools, by name, and the form of a chat template."""

from __future__ import annotations

from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.calls import ToolCallParser
from verl.utils.tool_calls.hermes import HermesParser

# Name in agent.tool_format -> parser.
FORMATS: dict[str, type[ToolCallParser]] = {"hermes": HermesParser}


def parser_for(codec: TextCodec, name: str = "auto") -> ToolCallParser:
    """Parser of the calls of a model.

    Args:
        codec: its chat template tells the form, for `auto`.
        name: of `FORMATS`, or auto.

    Raises:
        ValueError: no such form.
    """
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"need agent.tool_format as auto or one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS["hermes" if name == "auto" else name]()
