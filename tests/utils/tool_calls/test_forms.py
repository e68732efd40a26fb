"""What each form reads, what it refuses, and that nothing which a policy writes is an exception."""

from __future__ import annotations

import random

import pytest

from tests.utils.tool_calls.turns import ARGUMENTS, FURTHER, TOOLS, TURNS
from verl.utils.tool_calls.form_parser import CALL_MARKS
from verl.utils.tool_calls.formats import FORMATS


def calls_of(turn):
    return [(call.name, dict(call.arguments)) for call in turn.calls]


def test_there_is_a_turn_for_every_form():
    assert TURNS.keys() == FORMATS.keys()


@pytest.mark.parametrize("form", FORMATS)
def test_two_calls_of_a_turn_are_read_with_their_text_and_thoughts(form):
    parser = FORMATS[form]()
    opening, closing = parser.thought_marks
    text = TURNS[form] if form == "harmony" else f"{opening}\nHm.\n{closing}\n\n{TURNS[form]}"
    turn = parser.parse(text, TOOLS)
    assert (turn.error, turn.thoughts, turn.content) == ("", "Hm.", "One moment.")
    assert calls_of(turn) == [("search", ARGUMENTS), ("now", {})]
    assert len({call.id for call in turn.calls}) == 2


@pytest.mark.parametrize(("form", "text"), FURTHER)
def test_other_writings_of_a_form_are_read(form, text):
    turn = FORMATS[form]().parse(text, TOOLS)
    assert (turn.error, turn.content, calls_of(turn)) == ("", "", [("search", ARGUMENTS)])


@pytest.mark.parametrize("form", FORMATS)
def test_ids_are_unique_within_an_episode(form):
    parser, taken = FORMATS[form](), []
    for _ in range(3):
        taken += [call.id for call in parser.parse(TURNS[form], TOOLS, taken=taken).calls]
    assert len(set(taken)) == len(taken) == 6


def test_ids_have_the_shape_that_the_templates_of_a_family_ask_for():
    mistral = FORMATS["mistral"]().parse(TURNS["mistral"], TOOLS)
    assert all(len(call.id) == 9 and call.id.isalnum() for call in mistral.calls)
    kimi = FORMATS["kimi_k2"]().parse(
        TURNS["kimi_k2"], TOOLS, taken=["functions.search:0", "functions.now:1"]
    )
    assert [call.id for call in kimi.calls] == ["functions.search:2", "functions.now:3"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_plain_answer_is_text(form):
    answer = 'In JSON: {"name": "Bob", "age": 3}, and [f(x) = 2](http://x) or [1, 2].'
    turn = FORMATS[form]().parse(answer, TOOLS)
    assert (turn.content, turn.calls, turn.error) == (answer, (), "")


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_in_another_form_is_a_fault_and_no_answer(form):
    # These forms have no mark, so that others have to look for them.
    markless = {"llama3", "pythonic"}
    for other in TURNS.keys() - {form} - markless:
        turn = FORMATS[form]().parse(TURNS[other], TOOLS)
        assert turn.error or calls_of(turn) == [("search", ARGUMENTS), ("now", {})], (form, other)
    bare = FORMATS[form]().parse('```json\n{"name": "now", "arguments": {}}\n```', TOOLS)
    assert bare.error


FAULTS = {
    "hermes": [
        ('<tool_call>{"name": "now", "arguments": {}', "the JSON is wrong"),
        (
            '<tool_call>{"name": "now", "parameters": {}}</tool_call>',
            'need the arguments of now under "arguments"',
        ),
        ('<tool_call>{"arguments": {}}</tool_call>', 'need the tool of a call as "name"'),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>', "as a JSON object"),
        ('<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>', "NaN is no number of JSON"),
        ('<tool_call>{"name": "now", "arguments": {"a": 1e999}}</tool_call>', "1e999 is no number of JSON"),
        ('<tool_call>{"name": "now", "arguments": {"a": 1, "a": 2}}</tool_call>', "the key 'a' occurs twice"),
        ('<tool_call>{"name": "now", "arguments": {"a": "\\ud800"}}</tool_call>', "surrogate"),
        ('<tool_call>{"name": "now"}</tool_call> <tool_call>', "the JSON is wrong"),
        ('{"name": "now", "arguments": {}}</tool_call>', "</tool_call> in the text"),
        ('<tool_call>{"name": "now", "arguments": ' + '{"a":' * 5000, "nested too deep"),
        ('<think>I call <tool_call>{"name": "now"}</tool_call>', "write </think> before it"),
    ],
    "qwen3_coder": [
        ("<tool_call><function=now><parameter=a>1", "need </parameter> behind the parameter a"),
        ("<tool_call>now</tool_call>", "need the name of a tool behind <tool_call>"),
        ("<tool_call><function=now>a=1</function></tool_call>", "need a parameter of now or </function>"),
    ],
    "llama3": [
        ('{"name": "now", "parameters": {}', "the JSON is wrong"),
        ('{"name": "now", "parameters": {}} and more', "need name(argument=value, ...)"),
        ("<|python_tag|>print(1)", "need arguments of print as name=value"),
    ],
    "pythonic": [
        ("[now(a=)]", "need a text, a number, a list or an object"),
        ("[now(1)]", "need arguments of now as name=value"),
        ("[now(a=f(1))]", "need a text"),
        ("[now(a=" + "[" * 5000, "nested deeper"),
        ("[now(a=1), search(]", "need a text, a number, a list or an object, got ']'"),
    ],
    "mistral": [("[TOOL_CALLS] now", "the JSON is wrong"), ("[TOOL_CALLS]now[ARGS]{", "the JSON is wrong")],
    "gemma": [("<start_function_call>call:now{a:<escape>b", "need <escape>")],
    "glm": [("<tool_call>now<arg_key>a</arg_key>", "need a parameter of now or </tool_call>")],
    "deepseek": [("<｜tool▁calls▁begin｜>now", "need <｜tool▁call▁begin｜> or")],
    "kimi_k2": [
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>now<|tool_call_argument_begin|>{}",
            "functions.TOOL:NUMBER",
        )
    ],
    "harmony": [("<|channel|>commentary to=functions.now<|message|>now", "the JSON is wrong")],
}


@pytest.mark.parametrize(
    ("form", "text", "fault"), [(f, *case) for f, cases in FAULTS.items() for case in cases]
)
def test_a_malformed_call_is_told_with_the_form_to_write(form, text, fault):
    turn = FORMATS[form]().parse(text, TOOLS)
    assert fault in turn.error and turn.error.endswith(f"write a call as {FORMATS[form].shape}")
    assert len(turn.error) < 500
    assert turn.calls == ()


def test_thoughts_that_the_template_begins_have_only_an_end():
    hermes = FORMATS["hermes"]
    text = 'I may write <tool_call>.</think>\n<tool_call>{"name": "now"}</tool_call>'
    assert hermes(opens_thoughts=True).parse(text, TOOLS).thoughts == "I may write <tool_call>."
    assert [call.name for call in hermes(opens_thoughts=True).parse(text, TOOLS).calls] == ["now"]
    in_argument = '<tool_call>{"name": "now", "arguments": {"a": "</think>"}}</tool_call>'
    assert calls_of(hermes().parse(in_argument, TOOLS)) == [("now", {"a": "</think>"})]
    assert hermes().parse("So.</think>\n4", TOOLS).content == "4"
    assert hermes().parse("<think>So", TOOLS).thoughts == "So"


def test_an_argument_may_have_the_closing_tag_of_its_own_form():
    text = '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>"}}</tool_call>'
    assert calls_of(FORMATS["hermes"]().parse(text, TOOLS)) == [("now", {"a": "</tool_call>"})]
    text = "<tool_call><function=now><parameter=a>x</parameter> y</parameter></function></tool_call>"
    assert calls_of(FORMATS["qwen3_coder"]().parse(text, TOOLS)) == [("now", {"a": "x</parameter> y"})]


@pytest.mark.parametrize("form", FORMATS)
def test_whatever_a_policy_writes_is_a_turn(form):
    """Random cuts, swaps and insertions of marks in valid turns of all forms."""
    random_ = random.Random(form)
    parser = FORMATS[form]()
    turns = list(TURNS.values())
    pieces = [*CALL_MARKS, *parser.thought_marks, *"{}[]()\"\\',:\n=", "\\u", "\ud7ff", "-", "1e", "\x00"]
    for number in range(400):
        text = TURNS[form] if number % 2 else random_.choice(turns)
        for _ in range(random_.randrange(1, 4)):
            start, end = sorted(random_.randrange(len(text) + 1) for _ in range(2))
            insert = random_.choice(pieces)
            text = random_.choice(
                [text[:start], text[:start] + insert + text[start:], text[:start] + text[end:]]
            )
        turn = parser.parse(text, TOOLS if number % 3 else ())
        assert not (turn.error and turn.calls)
        assert turn.message["role"] == "assistant"
        for call in turn.calls:
            call.as_openai()["function"]["arguments"].encode()


@pytest.mark.parametrize("form", FORMATS)
def test_a_cut_turn_loses_nothing_without_a_word(form):
    """A turn that stops within its calls is a fault, unless whole calls or the text before them are left."""
    parser, text = FORMATS[form](), TURNS[form]
    whole = [("search", ARGUMENTS), ("now", {})]
    begin = text.index("One moment.") + len("One moment.")
    silent = []
    for end in range(begin, len(text)):
        turn = parser.parse(text[:end], TOOLS)
        if not turn.error and calls_of(turn) not in (whole, whole[:1]) and turn.content != "One moment.":
            silent.append(text[begin:end][-40:])
    # At most a mark that has just begun, which no parser can tell from text.
    assert all(len(rest) <= 40 for rest in silent) and len(silent) <= 60


@pytest.mark.parametrize("form", FORMATS)
def test_time_grows_with_the_length_of_a_turn(form):
    """Texts on which an expression that backtracks, or one search for each mark, would take hours."""
    parser = FORMATS[form]()
    marks = [
        *CALL_MARKS,
        *parser.thought_marks,
        *parser.marks,
        "<|start|>",
        "<|message|>",
        "<parameter=a>",
        "[f(a=",
    ]
    marks += [
        "<arg_key>",
        "</arg_value>",
        "</parameter>",
        "\\",
        '"',
        "'",
        " ",
        "\n",
        "{",
        '{"name":',
        "call:f{",
        "[",
        "a",
        "1",
        "[[{",
        ";",
        "a=1,",
    ]
    for mark in dict.fromkeys(marks):
        parser.parse(mark * (100_000 // len(mark)), TOOLS)
        for before in (
            *parser.marks[:1],
            "".join(parser.marks[:1]) + "a",
            "```",
            "[now(",
            "<tool_call>a<arg_key>",
        ):
            parser.parse(before + mark * (100_000 // len(mark)), TOOLS)
