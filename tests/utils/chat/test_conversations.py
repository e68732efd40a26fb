"""Whole conversations as tokens: what the template writes, and which of it is learned."""

from __future__ import annotations

import re

import pytest

from tests import chat_templates as templates
from tests.chat_templates import chat_tokenizer
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

ASK = {"role": "user", "content": "1+1="}
SAY = {"role": "assistant", "content": "2"}
MORE = {"role": "user", "content": "2+2="}
END = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Add."}
CHAT = [ASK, SAY, MORE, END]


def codec(template: str | None, **options) -> TextCodec:
    return TextCodec(chat_tokenizer(template), **options)


def learned_texts(coder: TextCodec, messages, **options) -> list[str]:
    """Runs of learned tokens as texts, after a check that the ids are those of the template's own text."""
    encoded = coder.encode_conversation(messages, **options)
    assert len(encoded.ids) == len(encoded.mask)
    runs: list[list[int]] = []
    for i, (token, is_learned) in enumerate(zip(encoded.ids, encoded.mask, strict=True)):
        if is_learned and (i == 0 or not encoded.mask[i - 1]):
            runs.append([])
        if is_learned:
            runs[-1].append(token)
    return [coder.tokenizer.decode(run) for run in runs]


def written(coder: TextCodec, messages, **options) -> str:
    return coder.tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (templates.CHATML, ["2<|im_end|>", "4<|im_end|>"]),
        (templates.MARKED, ["2<|im_end|>", "4<|im_end|>"]),
        (templates.HEADERS, ["2<|eot|>", "4<|eot|>"]),
        (templates.THINKING, ["2<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]),
        (templates.BRACKETS, [" 2<eos>", " 4<eos>"]),
        (templates.ALTERNATING, ["2</turn>", "4</turn>"]),
        (templates.PLAIN, [" 2", " 4<eos>"]),
        (templates.TWO_ENDS, ["2<|im_end|>", "4<|eot|>"]),
    ],
)
def test_the_answers_and_what_closes_them_are_learned(template, expected):
    coder = codec(template)
    assert learned_texts(coder, CHAT) == expected
    assert learned_texts(coder, CHAT, learned=[3]) == expected[1:]
    assert learned_texts(coder, CHAT, learned=[]) == []
    encoded, text = coder.encode_conversation(CHAT), written(coder, CHAT)
    if template == templates.PLAIN:
        text = text.removesuffix("\n") + "<eos>"
    assert coder.tokenizer.decode(encoded.ids) == text


@pytest.mark.parametrize(
    "template",
    [
        templates.CHATML,
        templates.HEADERS,
        templates.THINKING,
        templates.BRACKETS,
        templates.ALTERNATING,
        templates.PLAIN,
    ],
)
def test_a_prompt_and_its_answer_are_the_conversation(template):
    coder = codec(template)
    prompt = Prompt([ASK])
    both = coder.encode_prompt(prompt) + coder.encode_answer("2", prompt)
    encoded = coder.encode_conversation([ASK, SAY])
    assert both == encoded.ids[: len(both)]
    assert encoded.mask.index(True) == len(coder.encode_prompt(prompt))
    assert not any(encoded.mask[len(both) :])


@pytest.mark.parametrize(
    "template", [templates.CHATML, templates.MARKED, templates.THINKING, templates.HEADERS]
)
def test_each_message_starts_at_its_header(template):
    coder = codec(template)
    encoded = coder.encode_conversation([SYSTEM, *CHAT])
    heads = [
        i for i, t in enumerate(encoded.ids) if coder.tokenizer.decode([t]) in ("<|im_start|>", "<|head|>")
    ]
    assert encoded.turn_starts[1:] == heads[1:]
    assert encoded.turn_starts[0] == 0


def test_a_system_prompt_belongs_to_the_first_message():
    encoded = codec(templates.CHATML, system_prompt="Add.").encode_conversation(CHAT, learned=[1])
    plain = codec(templates.CHATML).encode_conversation([SYSTEM, *CHAT], learned=[2])
    assert (encoded.ids, encoded.mask) == (plain.ids, plain.mask)
    assert encoded.turn_starts == [0, *plain.turn_starts[2:]]


def test_thoughts_are_learned_in_the_last_turn_where_the_template_writes_them():
    coder = codec(templates.THINKING)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}
    assert learned_texts(coder, [ASK, SAY, MORE, thought]) == [
        "2<|im_end|>",
        "<think>\nhm\n</think>\n\n4<|im_end|>",
    ]
    assert learned_texts(coder, [ASK, thought, MORE, END], learned=[1]) == ["4<|im_end|>"]


def test_with_thinking_off_the_empty_thought_belongs_to_the_header_of_the_last_turn():
    coder = codec(templates.THINKING, template_kwargs={"enable_thinking": False})
    assert learned_texts(coder, CHAT) == ["2<|im_end|>", "4<|im_end|>"]


def test_tool_calls_are_learned_and_results_are_not():
    coder = codec(templates.THINKING)
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n2"},
    ]
    assert learned_texts(coder, messages) == [
        '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>',
        "<think>\nso\n</think>\n\n2<|im_end|>",
    ]


def test_an_answer_that_brings_its_end_is_closed_once():
    said = {"role": "assistant", "content": "2<|im_end|>"}
    assert learned_texts(codec(templates.CHATML), [ASK, said]) == ["2<|im_end|>"]


def test_answers_with_blanks_and_characters_of_several_bytes_are_learned_whole():
    said = {"role": "assistant", "content": " a\n\n b "}
    assert learned_texts(codec(templates.CHATML), [ASK, said, MORE, said]) == [" a\n\n b <|im_end|>"] * 2
    assert learned_texts(codec(templates.PLAIN), [ASK, said]) == ["  a\n\n b <eos>"]


def test_an_assistant_that_speaks_first_is_learned():
    assert learned_texts(codec(templates.CHATML), [SAY, MORE, END]) == ["2<|im_end|>", "4<|im_end|>"]


def test_only_answers_can_be_learned():
    with pytest.raises(ValueError, match="need messages of the assistant to learn, got message 1"):
        codec(templates.CHATML).encode_conversation(CHAT, learned=[0, 1])


def test_a_template_that_drops_thoughts_of_the_answer_to_learn_is_refused():
    template = templates.CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    thought = {"role": "assistant", "content": "<think>hm</think>4"}
    with pytest.raises(
        ValueError, match="leaves out a part of message 2, the answer to learn; give a template"
    ):
        codec(template).encode_conversation([ASK, thought])
    assert codec(template).decode(codec(template).encode_answer("<think>hm</think>4", Prompt([ASK]))) == (
        "<think>hm</think>4"
    )


def test_thoughts_of_an_answer_to_learn_need_a_template_that_knows_their_key():
    thought = {**SAY, "reasoning_content": "one and one"}
    with pytest.raises(ValueError, match="leaves out the reasoning_content of message 2, an answer to learn"):
        codec(templates.CHATML).encode_conversation([ASK, thought])
    template = templates.CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }};{{ m.content }}")
    assert learned_texts(codec(template), [ASK, thought]) == ["one and one;2<|im_end|>"]
    assert learned_texts(codec(templates.CHATML), [ASK, thought, MORE, END], learned=[3]) == ["4<|im_end|>"]


def test_a_turn_whose_tokens_cannot_be_told_is_named_with_the_way_out():
    counting = "{{ messages | length }}" + templates.CHATML
    with pytest.raises(
        ValueError, match=re.escape("writes message 2 (assistant) otherwise when other messages")
    ):
        codec(counting.replace("m.content }}", "m.content.upper() }}")).encode_conversation(CHAT)


def test_an_answer_to_a_text_ends_with_the_tokenizers_token_and_in_a_chat_with_the_templates():
    coder = codec(templates.CHATML)
    decode = coder.tokenizer.decode
    assert decode(coder.encode_answer("4", Prompt("2+2="))) == "4<eos>"
    assert decode(coder.encode_answer("4", Prompt([MORE]))) == "4<|im_end|>"
    assert decode(coder.encode_answer("4<|im_end|>", Prompt([MORE]))) == "4<|im_end|>"
    assert decode(coder.encode_answer("4")) == "4<|im_end|>"
    assert decode(codec(None).encode_answer("4")) == "4<eos>"


def test_generation_ends_where_the_template_ends_an_answer():
    coder = codec(templates.CHATML)
    assert coder.stop_ids == (1, *coder.token_ids_of(["<|im_end|>"]))
    assert (
        codec(templates.BRACKETS).stop_ids == codec(templates.PLAIN).stop_ids == codec(None).stop_ids == (1,)
    )
    two = codec(templates.TWO_ENDS)
    assert two.stop_ids == (1, *two.token_ids_of(["<|eot|>"]))
