"""The parser that goes with a chat template, and calls that come back as they were rendered."""

from __future__ import annotations

import logging

import pytest

from tests.chat_templates import CHATML, THINKING, chat_tokenizer
from tests.utils.chat.family_tokenizer import family_tokenizer
from tests.utils.tool_calls.turns import ARGUMENTS, TOOLS
from verl.utils.chat.template_files import template_names
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.calls import ParsedTurn, ToolCall, ToolCallParser
from verl.utils.tool_calls.formats import FORMATS, parser_for
from verl.utils.tool_calls.probing import answer_part

FORM_OF = {
    "chatml": "hermes",
    "deepseek-v3": "deepseek",
    "deepseek-v3.1": "deepseek",
    "gemma3": "pythonic",
    "glm4.5": "glm",
    "gpt-oss": "harmony",
    "kimi-k2": "kimi_k2",
    "llama3": "llama3",
    "mistral-v3": "mistral",
    "mistral-v7": "mistral",
    "mistral-v13": "mistral",
    "qwen2.5": "hermes",
    "qwen3": "hermes",
}
HARD = [
    ARGUMENTS,
    {
        "query": "</think> <tool_call> é 日本 \\n \\\\ {\"a\": [1]} 'x' ```",
        "top": -7,
        "exact": False,
        "tags": [],
    },
    {"query": " 12 ", "top": 0, "tags": [{"a": [1, 2.5, None], "b": {"c": ""}}, True]},
    {},
]


class Shouting(ToolCallParser):
    """A user's own form."""

    name = "shouting"

    def parse(self, text, tools=(), *, taken=()):
        name, _, rest = text.partition("!")
        calls = (ToolCall(name.lower(), {}, f"call_{len(taken)}"),) if name.isupper() else ()
        return ParsedTurn(rest if calls else text, calls=calls)


@pytest.fixture(scope="module", params=template_names())
def family(request):
    return request.param, TextCodec(family_tokenizer(request.param))


def test_the_chat_template_tells_the_form(family, caplog):
    name, codec = family
    assert parser_for(codec).name == FORM_OF[name]
    assert not caplog.records


def test_a_rendered_turn_with_calls_is_parsed_into_the_same_calls(family):
    codec = family[1]
    parser = parser_for(codec)
    for arguments in HARD:
        calls = [ToolCall("search", arguments, parser.call_id("search", 0))]
        calls += [ToolCall("now", {}, parser.call_id("now", 1))]
        turn = {"role": "assistant", "content": "", "tool_calls": [call.as_message_part() for call in calls]}
        chat = codec.template.chat([{"role": "user", "content": "Hi"}, turn], tools=TOOLS)
        text = answer_part(codec.template, chat)
        parsed = parser.parse(text, TOOLS)
        assert (parsed.error, parsed.content.strip()) == ("", "")
        assert [(c.name, dict(c.arguments)) for c in parsed.calls] == [(c.name, c.arguments) for c in calls]


def test_a_template_that_writes_no_calls_is_read_as_hermes_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        parser = parser_for(TextCodec(chat_tokenizer(CHATML)))
    assert parser.name == "hermes" and "writes no calls of tools" in caplog.text
    parser.check_tools(TOOLS)


def test_a_form_that_is_not_known_is_refused_with_the_first_tools():
    parser = parser_for(TextCodec(chat_tokenizer(THINKING)))
    parser.check_tools(())
    with pytest.raises(ValueError, match=r"writes a call as .*<call>.*name the form .* as agent.tool_format"):
        parser.check_tools(TOOLS)


def test_the_template_may_begin_the_thoughts():
    opening = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert parser_for(TextCodec(chat_tokenizer(opening)), "qwen3_coder").opens_thoughts
    assert not parser_for(TextCodec(chat_tokenizer(CHATML)), "qwen3_coder").opens_thoughts


def test_a_form_is_named_and_may_be_the_users_own():
    codec = TextCodec(chat_tokenizer(CHATML))
    assert [parser_for(codec, name).name for name in FORMATS] == list(FORMATS)
    own = parser_for(codec, f"{__file__}:Shouting")
    assert [call.name for call in own.parse("NOW! please").calls] == ["now"]
    with pytest.raises(ValueError, match="need agent.tool_format as auto, tokenizer, one of hermes"):
        parser_for(codec, "herms")
    with pytest.raises(ValueError, match="need agent.tool_format .* as a class derived from"):
        parser_for(codec, "verl.utils.tokens:is_text")


RESPONSE_TEMPLATE = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {},
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.arguments}"},
            },
        },
    },
}


def test_a_form_that_the_tokenizer_describes_is_read_by_transformers():
    tokenizer = chat_tokenizer(THINKING)
    tokenizer.response_template = RESPONSE_TEMPLATE
    parser = parser_for(TextCodec(tokenizer))
    assert parser.name == "tokenizer"
    turn = parser.parse('<think>Hm.</think>Yes.<call>{"name": "now", "arguments": {}}</call>', TOOLS)
    assert (turn.thoughts, turn.content, turn.error) == ("Hm.", "Yes.", "")
    assert [(call.name, call.id) for call in turn.calls] == [("now", "call_0")]
    for broken in (
        "<call>{",
        '<call>{"name": "now"}</call>',
        "<call>3</call>",
        '<call>{"name": 1, "arguments": 2}',
    ):
        turn = parser.parse(broken, TOOLS)
        assert turn.error.endswith("write a call as the chat template does") and not turn.calls
    with pytest.raises(ValueError, match="has no response_template"):
        parser_for(TextCodec(chat_tokenizer(CHATML)), "tokenizer")
