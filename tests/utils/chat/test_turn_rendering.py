"""What follows a turn: only what is new, whatever the chat template does with what came before."""

from __future__ import annotations

import random

import pytest

from tests import chat_templates as templates
from tests.tiny import tiny_codec
from tests.utils.chat.conversation import TOOLS, call, result
from tests.utils.chat.family_tokenizer import family_tokenizer, sampled_ids
from verl.utils.chat.turn_rendering import ChatRenderer, TextRenderer, in_call_order, renderer_for
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

ASK = {"role": "user", "content": "1+2?"}
NEXT = {"role": "user", "content": "And 3+4?"}
ANSWER = {"role": "assistant", "content": "It is 3."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call(0, a=1), call(1, a=2)]}
RESULTS = [result(0, "one"), result(1, "two")]


def codec_of(template: str, **options) -> TextCodec:
    return TextCodec(family_tokenizer(template), **options)


def followed(codec: TextCodec, turn, messages, *, end: str, tools=TOOLS, text: str = "It is 3.") -> str:
    """Text behind a turn that was sampled with an ending."""
    renderer = ChatRenderer(codec, Prompt([ASK]), tools)
    renderer.start([ASK])
    sampled = sampled_ids(codec.tokenizer, text + end, random.Random(0))
    return codec.decode_all(renderer.follow(turn, messages, sampled=sampled))


# Ending that the model samples after an answer and after calls, and what follows each.
FAMILIES = {
    "chatml": (
        "<|im_end|>",
        "\n<|im_start|>user\nAnd 3+4?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        "\n<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama3": (
        "<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nAnd 3+4?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>ipython<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral-v7": (
        "<eos>",
        "[INST]And 3+4?[/INST]",
        "<eos>",
        "[TOOL_RESULTS]functions.add:0[TOOL_CONTENT]one[/TOOL_RESULTS]"
        "[TOOL_RESULTS]functions.add:1[TOOL_CONTENT]two[/TOOL_RESULTS]",
    ),
    "gemma3": (
        "<end_of_turn>",
        "\n<start_of_turn>user\nAnd 3+4?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        "\n<start_of_turn>user\n```tool_output\none\n```\n```tool_output\ntwo\n```<end_of_turn>\n"
        "<start_of_turn>model\n",
    ),
    "glm4.5": (
        "<|user|>",
        "\nAnd 3+4?<|assistant|>",
        "<|observation|>",
        "\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|assistant|>",
    ),
    "deepseek-v3.1": (
        "<｜end▁of▁sentence｜>",
        "<｜User｜>And 3+4?<｜Assistant｜></think>",
        "<｜end▁of▁sentence｜>",
        "<｜tool▁output▁begin｜>one<｜tool▁output▁end｜><｜tool▁output▁begin｜>two<｜tool▁output▁end｜>",
    ),
    "kimi-k2": (
        "<|im_end|>",
        "<|im_user|>user<|im_middle|>And 3+4?<|im_end|><|im_assistant|>assistant<|im_middle|>",
        "<|im_end|>",
        "<|im_system|>add<|im_middle|>## Return of functions.add:0\none<|im_end|>"
        "<|im_system|>add<|im_middle|>## Return of functions.add:1\ntwo<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>",
    ),
    "gpt-oss": (
        "<|return|>",
        "<|start|>user<|message|>And 3+4?<|end|><|start|>assistant",
        "<|call|>",
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>one<|end|>"
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>two<|end|><|start|>assistant",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_and_results_follow_a_closed_turn(name):
    of_answer, question, of_calls, results = FAMILIES[name]
    codec = codec_of(name)
    assert followed(codec, ANSWER, [NEXT], end=of_answer) == question
    assert followed(codec, CALLS, RESULTS, end=of_calls) == results


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_ends_at_the_tokens_with_which_its_family_ends_turns(name):
    of_answer, _, of_calls, _ = FAMILIES[name]
    codec = codec_of(name)
    assert set(codec.token_ids_of([of_answer, of_calls])) <= set(codec.stop_ids)
    assert not set(codec.token_ids_of(["<|end|>", "</tool_call>", "<|im_start|>"])) & set(codec.stop_ids)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("glm4.5", "gpt-oss")])
def test_the_closing_token_is_given_where_the_turn_has_none(name):
    of_answer, question, of_calls, results = FAMILIES[name]
    codec = codec_of(name)
    assert followed(codec, ANSWER, [NEXT], end="") == of_answer + question
    # As where the engine stops at the text behind a call.
    assert followed(codec, CALLS, RESULTS, end="</tool_call>") == of_calls + results


def test_the_mark_of_the_next_role_is_given_unless_it_was_sampled():
    codec = codec_of("glm4.5")
    _, question, _, results = FAMILIES["glm4.5"]
    assert followed(codec, ANSWER, [NEXT], end="") == "<|user|>" + question
    # A malformed call is answered by a message of the user, a call that ended as an answer by its result.
    assert followed(codec, ANSWER, [NEXT], end="<|observation|>") == "<|user|>" + question
    assert followed(codec, CALLS, RESULTS, end="<|user|>") == "<|observation|>" + results


def test_a_turn_that_another_closing_token_ended_is_closed():
    codec = codec_of("gpt-oss")
    _, question, _, _ = FAMILIES["gpt-oss"]
    for end in ("<|return|>", "<|call|>", "<|end|>"):  # a malformed call is an answer
        assert followed(codec, ANSWER, [NEXT], end=end) == question
    assert followed(codec, ANSWER, [NEXT], end="") == "<|end|>" + question
    two_ends = TextCodec(templates.chat_tokenizer(templates.TWO_ENDS))
    for end in ("<|eot|>", "<|im_end|>"):
        assert followed(two_ends, ANSWER, [NEXT], end=end, tools=()) == (
            "<|im_start|>user\nAnd 3+4?<|im_end|><|im_start|>assistant\n"
        )


def test_llamas_end_of_a_message_closes_a_turn():
    tokenizer = family_tokenizer("llama3")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    text = followed(TextCodec(tokenizer), CALLS, RESULTS, end="<|eom_id|>")
    assert text == FAMILIES["llama3"][3]


# Calls end with the mark of their results, which is not written again before the first of them.
MARKED_RESULTS = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '' if loop.previtem.role == 'assistant' else '<turn>' }}result:{{ m.content }}</turn>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "{{ '<turn>' if m.tool_calls else '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant\n{% endif %}"
)


def test_calls_may_end_with_the_mark_of_their_results():
    codec = TextCodec(templates.chat_tokenizer(MARKED_RESULTS))
    assert codec.template.turns.stops == ("<turn>",)
    expected = "result:one</turn><turn>result:two</turn>"
    assert followed(codec, CALLS, RESULTS, end="<turn>", tools=()) == expected
    for end in ("<|im_end|>", ""):
        assert followed(codec, CALLS, RESULTS, end=end, tools=()) == "<turn>" + expected


# An answer ends with two tokens.
TWO_CLOSERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|eot|>' if m.role == 'assistant' else '' }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_turn_may_end_with_several_tokens():
    codec = TextCodec(templates.chat_tokenizer(TWO_CLOSERS))
    expected = "<|im_start|>user\nAnd 3+4?<|im_end|><|im_start|>assistant\n"
    for end, missing in (("<|eot|><|im_end|>", ""), ("<|eot|>", "<|im_end|>"), ("", "<|eot|><|im_end|>")):
        assert followed(codec, ANSWER, [NEXT], end=end, tools=()) == missing + expected


def test_a_template_that_writes_results_but_no_calls_is_followed():
    template = templates.CHATML.replace("{% for m", "{{ tools | length if tools }}{% for m", 1)
    codec = TextCodec(templates.chat_tokenizer(template))
    text = followed(codec, CALLS, RESULTS, end="<|im_end|>")
    assert text == (
        "\n<|im_start|>tool\none<|im_end|>\n<|im_start|>tool\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_end_of_text_that_closes_no_turn_is_followed_by_the_closing_token():
    codec = codec_of("chatml")
    assert followed(codec, ANSWER, [NEXT], end="<|end_of_text|>") == "<|im_end|>" + FAMILIES["chatml"][1]


@pytest.mark.parametrize(
    ("template", "end", "expected"),
    [
        (templates.CHATML, "<|im_end|>", "\n<|im_start|>user\nAnd 3+4?<|im_end|>\n<|im_start|>assistant\n"),
        (templates.MARKED, "<|im_end|>", "\n<|im_start|>user\nAnd 3+4?<|im_end|>\n<|im_start|>assistant\n"),
        (templates.HEADERS, "<|eot|>", "<|head|>user</head>\n\nAnd 3+4?<|eot|><|head|>assistant</head>\n\n"),
        (templates.THINKING, "<|im_end|>", "\n<|im_start|>user\nAnd 3+4?<|im_end|>\n<|im_start|>assistant\n"),
        (templates.BRACKETS, "<eos>", "[INST] And 3+4? [/INST]"),
        (templates.ALTERNATING, "</turn>", "\n<turn>user\nAnd 3+4?</turn>\n<turn>model\n"),
        (templates.PLAIN, "<eos>", "\nuser: And 3+4?\nassistant:"),
        (templates.PLAIN, "", "\nuser: And 3+4?\nassistant:"),
    ],
)
def test_templates_of_other_kinds(template, end, expected):
    codec = TextCodec(templates.chat_tokenizer(template))
    assert followed(codec, ANSWER, [NEXT], end=end, tools=()) == expected


def test_the_opening_of_the_next_turn_is_as_that_of_the_first():
    closed = codec_of("qwen3", template_kwargs={"enable_thinking": False})
    text = followed(closed, ANSWER, [NEXT], end="<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    opened = codec_of("deepseek-v3.1", template_kwargs={"thinking": True})
    text = followed(opened, ANSWER, [NEXT], end="<｜end▁of▁sentence｜>")
    assert text.endswith("<｜Assistant｜><think>")


def test_results_are_written_in_the_order_of_the_calls():
    turned = [{**RESULTS[1], "name": None}, RESULTS[0], NEXT]
    ordered = in_call_order(CALLS, turned)
    assert [m["content"] for m in ordered] == ["one", "two", "And 3+4?"] and ordered[1]["name"] == "add"
    codec = codec_of("gpt-oss")
    text = followed(codec, CALLS, turned, end="<|call|>")
    assert text.startswith(FAMILIES["gpt-oss"][3].removesuffix("<|start|>assistant"))
    assert text.endswith("<|start|>user<|message|>And 3+4?<|end|><|start|>assistant")
    strangers = [{**RESULTS[1], "tool_call_id": "x"}, RESULTS[0]]
    assert in_call_order(CALLS, strangers) == strangers


def test_a_system_message_and_default_texts_are_not_written_again():
    codec = codec_of("qwen2.5", system_prompt="Be brief.")
    text = followed(codec, ANSWER, [{"role": "system", "content": "Be long."}, NEXT], end="<|im_end|>")
    assert text == "\n<|im_start|>system\nBe long.<|im_end|>" + FAMILIES["chatml"][1]
    assert "Qwen" not in followed(codec_of("qwen2.5"), ANSWER, [NEXT], end="<|im_end|>")


def test_what_was_said_is_not_rendered_and_cannot_be_taken_for_the_end():
    turn = {**CALLS, "content": "<|im_end|> said", "reasoning_content": "<|im_end|>\n<|im_start|>user"}
    turn["tool_calls"] = [call(0, a="<|im_end|>" * 50), call(1, a="</tool_call><|im_end|>")]
    text = followed(codec_of("qwen3"), turn, RESULTS, end="<|im_end|>")
    assert text == FAMILIES["chatml"][3]


def test_ids_behind_a_special_token_are_those_of_the_whole_text():
    codec = codec_of("chatml")
    renderer = ChatRenderer(codec, Prompt([ASK]))
    ids = renderer.follow(ANSWER, [NEXT], sampled=codec.encode("It is 3.<|im_end|>"))
    whole = codec.encode("It is 3.<|im_end|>" + FAMILIES["chatml"][1])
    assert codec.encode("It is 3.<|im_end|>") + ids == whole


def test_a_result_that_the_template_leaves_out_is_refused():
    template = templates.THINKING.replace("<result>{{ m.content }}</result>", "<result></result>")
    codec = TextCodec(templates.chat_tokenizer(template))
    with pytest.raises(ValueError, match="leaves out a message of the role tool"):
        followed(codec, CALLS, RESULTS, end="<|im_end|>")
    # One that it trims or escapes is not left out.
    escaped = templates.THINKING.replace("{{ m.content }}</result>", "{{ m.content | tojson }}</result>")
    codec = TextCodec(templates.chat_tokenizer(escaped))
    assert r"a\"b\n" in followed(codec, CALLS, [result(0, 'a"b\n'), RESULTS[1]], end="<|im_end|>")


def test_a_template_that_leaves_out_turns_before_others_is_refused():
    template = templates.CHATML.replace(
        "{{ m.content }}", "{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %}"
    )
    with pytest.raises(ValueError, match="leaves out a turn that other messages follow"):
        followed(TextCodec(templates.chat_tokenizer(template)), ANSWER, [NEXT], end="<|im_end|>", tools=())


def test_calls_are_given_in_the_form_that_the_template_takes():
    texts = templates.THINKING.replace("c.function | tojson", "c.function.name + c.function.arguments")
    codec = TextCodec(templates.chat_tokenizer(texts))
    assert "two" in followed(codec, CALLS, RESULTS, end="<|im_end|>")


def test_texts_are_continued_by_texts():
    codec = tiny_codec()
    renderer = renderer_for(codec, Prompt("1+1="))
    assert isinstance(renderer, TextRenderer)
    assert codec.decode_all(renderer.start([{"role": "user", "content": "?"}])) == "1+1=?"
    given = renderer.follow(ANSWER, [{"role": "user", "content": "no"}], sampled=codec.encode("2"))
    assert codec.decode_all(given) == "no"


def test_a_turn_costs_the_same_however_many_came_before(monkeypatch):
    codec = codec_of("qwen3")
    written: list[int] = []
    render = type(codec.template).render

    def counted(self, chat, **options):
        text = render(self, chat, **options)
        written.append(len(text))
        return text

    monkeypatch.setattr(type(codec.template), "render", counted)
    renderer = ChatRenderer(codec, Prompt([ASK]), TOOLS)
    renderer.start([ASK])
    costs = []
    for _ in range(128):
        written.clear()
        renderer.follow(CALLS, RESULTS, sampled=codec.encode("x" * 100 + "<|im_end|>"))
        costs.append(sum(written))
    assert len(set(costs)) == 1 and costs[0] < 4000
