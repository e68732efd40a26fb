"""Forms in which models write calls of tools, by name, and the form of a chat template."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.calls import ToolCallParser
from verl.utils.tool_calls.form_parser import FormParser
from verl.utils.tool_calls.gemma import Gemma4Parser, GemmaParser
from verl.utils.tool_calls.harmony import HarmonyParser
from verl.utils.tool_calls.hermes import GraniteParser, HermesParser
from verl.utils.tool_calls.llama import Llama3Parser, PythonicParser
from verl.utils.tool_calls.mistral import MistralParser
from verl.utils.tool_calls.probing import TOOL, matching_forms, reads_back, written_call
from verl.utils.tool_calls.response_template import ResponseTemplateParser
from verl.utils.tool_calls.sections import DeepSeekParser, KimiParser
from verl.utils.tool_calls.xml_forms import (
    DeepSeekTaggedParser,
    GlmParser,
    MiniMaxParser,
    Qwen3CoderParser,
    SeedParser,
)
from verl.utils.user_code import load_function

_LOG = logging.getLogger(__name__)
# Name in agent.tool_format -> parser.
FORMATS: dict[str, type[FormParser]] = {
    form.name: form
    for form in (
        HermesParser,
        Qwen3CoderParser,
        Llama3Parser,
        PythonicParser,
        MistralParser,
        GemmaParser,
        Gemma4Parser,
        GlmParser,
        DeepSeekParser,
        DeepSeekTaggedParser,
        KimiParser,
        HarmonyParser,
        GraniteParser,
        MiniMaxParser,
        SeedParser,
    )
}
TOKENIZER = ResponseTemplateParser.name


class UnknownFormParser(HermesParser):
    """Refuses tools, since the chat template writes calls in a form that is not known.

    Args:
        written: a call as the template writes it.
    """

    name = "unknown"

    def __init__(self, written: str) -> None:
        super().__init__()
        self._written = written

    @override
    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        if tools:
            raise ValueError(
                f"the chat template writes a call as {self._written[:300]!r}, a form that is not known; name "
                f"the form that the policy writes as agent.tool_format ({', '.join(FORMATS)}), or give a "
                'parser of your own as "file.py:Class"'
            )


def parser_for(codec: TextCodec, name: str = "auto") -> ToolCallParser:
    """Parser of the calls of a model.

    Args:
        codec: its chat template tells the form, for `auto`, and whether it begins the thoughts.
        name: of `FORMATS`; auto; tokenizer, for its own `response_template`; or "file.py:Class", a
            `ToolCallParser`.

    Raises:
        ValueError: no such form.
    """
    if ":" in name:
        return own_parser(name)
    if name == TOKENIZER:
        return ResponseTemplateParser(codec.tokenizer, answer_opening(codec))
    if name == "auto":
        return detected_parser(codec)
    if name not in FORMATS:
        raise ValueError(
            f"need agent.tool_format as auto, {TOKENIZER}, one of {', '.join(FORMATS)}, or a parser of your "
            f'own as "file.py:Class", got {name!r}'
        )
    return made(FORMATS[name], codec)


def detected_parser(codec: TextCodec) -> ToolCallParser:
    """Parser of what the chat template writes; Hermes, with a word in the log, if it writes no calls."""
    found, written = matching_forms(codec, list(FORMATS.values()))
    if found:
        if len(found) > 1:
            names = ", ".join(form.name for form in found)
            _LOG.warning("calls of the chat template can be read as %s; %s is taken", names, found[0].name)
        return made(found[0], codec)
    if codec.tokenizer.response_template:
        parser = ResponseTemplateParser(codec.tokenizer, answer_opening(codec))
        text = written_call(codec.template, "call_0")
        if text is None or reads_back(parser.parse(text, [TOOL])):
            return parser
    if written:
        return UnknownFormParser(written)
    _LOG.warning(
        "the chat template writes no calls of tools; those of the policy are read as %s, unless "
        "agent.tool_format names another form",
        HermesParser.shape,
    )
    return made(HermesParser, codec)


def own_parser(name: str) -> ToolCallParser:
    """A user's parser, of "file.py:Class" or "package.module:Class".

    Raises:
        ValueError: there is none.
    """
    found: Any = load_function(name, user="agent.tool_format", keeps_class=True)
    parser = found() if inspect.isclass(found) and issubclass(found, ToolCallParser) else found
    if not isinstance(parser, ToolCallParser):
        raise ValueError(
            f"need agent.tool_format {name} as a class derived from "
            f"verl.utils.tool_calls.calls.ToolCallParser, got {type(parser).__name__}"
        )
    return parser


def made(form: type[FormParser], codec: TextCodec) -> FormParser:
    """A parser that knows whether the chat template begins the thoughts of an answer."""
    opening = answer_opening(codec).rstrip()
    return form(opens_thoughts=opening.endswith(form.thought_marks[0]))


def answer_opening(codec: TextCodec) -> str:
    """The text before an answer to a short question; "" without a chat template."""
    try:
        return codec.prompt_text(Prompt([{"role": "user", "content": "Hi"}]))
    except ValueError:
        return ""
