"""Tests of the public layouts of rows: as conversations, and as prompts of reinforcement learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import chat_templates
from verl.config.data import DataConfig
from verl.data.dataset import load_prompts
from verl.data.reading.layouts import Conversation, conversation_of, prompt_of
from verl.data.reading.row_cells import MalformedRow
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}
CHAT = [QUESTION, ANSWER, {"role": "user", "content": "And 2+2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [
    {"from": "human", "value": "1+1?"},
    {"from": "gpt", "value": "2"},
    {"from": "user", "value": "And 2+2?"},
    {"from": "chatgpt", "value": "4"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1}},
}
CALLS = [
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"},
    ANSWER,
]
# Row -> its messages, how many of them are the prompt, and the tools.
CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int, tuple[Any, ...]]] = {
    "messages": ({"messages": CHAT}, CHAT, 0, ()),
    "with weights": (
        {"messages": [QUESTION, {**ANSWER, "weight": 0, "train": False}]},
        [QUESTION, {**ANSWER, "weight": 0, "train": False}],
        0,
        (),
    ),
    "as JSON text": ({"messages": json.dumps(CHAT)}, CHAT, 0, ()),
    "messages and answer": ({"messages": [QUESTION], "answer": "2"}, [QUESTION, ANSWER], 0, ()),
    "sharegpt": ({"conversations": SHAREGPT, "id": 3}, CHAT, 0, ()),
    "sharegpt with system": ({"conversations": SHAREGPT, "system": "Be brief."}, [SYSTEM, *CHAT], 0, ()),
    "sharegpt with calls": (
        {
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "2"},
            ],
            "tools": json.dumps([TOOL]),
        },
        [
            QUESTION,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
            },
            {"role": "tool", "content": "2"},
            ANSWER,
        ],
        0,
        (TOOL,),
    ),
    "openai calls": (
        {
            "messages": [
                QUESTION,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}],
                },
                *CALLS[2:],
            ],
            "tools": [TOOL],
        },
        CALLS,
        0,
        (TOOL,),
    ),
    "openai function": (
        {
            "messages": [
                QUESTION,
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": ""}},
                {"role": "function", "name": "add", "content": "2"},
            ]
        },
        [
            QUESTION,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
            },
            {"role": "tool", "name": "add", "content": "2"},
        ],
        0,
        (),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        [{"role": "user", "content": "Add.\n1+1"}, ANSWER],
        0,
        (),
    ),
    "alpaca without input": ({"instruction": "1+1?", "input": "", "output": "2"}, [QUESTION, ANSWER], 0, ()),
    "alpaca with history": (
        {
            "instruction": "And 2+2?",
            "output": "4",
            "system": "Be brief.",
            "history": [["1+1?", "2"]],
        },
        [SYSTEM, *CHAT],
        0,
        (),
    ),
    "dolly": (
        {"instruction": "Add.", "context": "1+1", "response": "2", "category": "sums"},
        [{"role": "user", "content": "Add.\n1+1"}, ANSWER],
        0,
        (),
    ),
    "prompt and answer": ({"prompt": [QUESTION], "answer": "2"}, [QUESTION, ANSWER], 1, ()),
    "prompt and completion": (
        {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER], "tools": [TOOL]},
        [SYSTEM, QUESTION, ANSWER],
        2,
        (TOOL,),
    ),
    "prompt as text beside its chat": ({"prompt": "1+1?", "messages": CHAT}, CHAT, 0, ()),
    "chat in the prompt": ({"prompt": CHAT}, CHAT, 0, ()),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_row_of_a_public_layout_is_a_conversation(name: str):
    row, messages, num_prompt, tools = CHATS[name]
    chat = conversation_of(row, DataConfig())
    assert isinstance(chat, Conversation)
    assert (chat.messages, chat.num_prompt, chat.tools) == (messages, num_prompt, tools)
    assert chat.used_columns <= row.keys()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1=", "answer": "2"},
        {"prompt": "1+1=", "completion": "2"},
        {"question": "1+1=", "answer": "2"},
        {"question": "1+1=", "response": "2"},
    ],
    ids=str,
)
def test_texts_are_no_conversation(row: dict[str, Any]):
    assert conversation_of(row, DataConfig()) is None
    parsed = prompt_of(row, DataConfig())
    assert (parsed.content, parsed.answer) == ("1+1=", "2")


PROMPTS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "messages": ({"messages": CHAT}, CHAT[:-1], "4"),
    "messages and truth": ({"messages": CHAT, "answer": 4}, CHAT[:-1], 4),
    "messages without answer": ({"messages": CHAT[:-1]}, CHAT[:-1], None),
    "sharegpt": ({"conversations": SHAREGPT}, CHAT[:-1], "4"),
    "alpaca": ({"instruction": "1+1?", "output": "2"}, [QUESTION], "2"),
    "prefill": ({"prompt": [QUESTION, ANSWER], "answer": "2"}, [QUESTION, ANSWER], "2"),
    "completion": ({"prompt": [QUESTION], "completion": [ANSWER]}, [QUESTION], "2"),
    "question": ({"question": "1+1?", "answer": "so #### 2"}, "1+1?", "so #### 2"),
    "null answer": ({"prompt": "q", "answer": None, "completion": "2"}, "q", "2"),
    "chat and question": ({"messages": CHAT, "question": "1+1?"}, CHAT[:-1], "4"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_last_answer_of_a_chat_is_the_reference_and_a_prefill_stays(name: str):
    row, content, answer = PROMPTS[name]
    parsed = prompt_of(row, DataConfig())
    assert (parsed.content, parsed.answer) == (content, answer)


REFUSED = {
    "two texts of a message": (
        {"conversations": [{"from": "human", "value": "a", "content": "b"}]},
        "got content and another value",
    ),
    "two prompts in a row": ({"messages": CHAT, "question": "3+3?"}, "got 'messages' and 'question'; name"),
    "two layouts": ({"instruction": "a", "question": "b"}, "got 'instruction' and 'question'"),
    "two answers": (
        {"prompt": [QUESTION], "completion": "2", "response": "3"},
        "'completion' and 'response'",
    ),
    "another chat": ({"prompt": "3+3?", "messages": CHAT}, "got 'prompt' without an answer and 'messages'"),
    "answer to an answer": (
        {"prompt": [QUESTION, ANSWER], "answer": "2"},
        "'prompt' that ends with an answer",
    ),
    "text and messages": ({"prompt": "q", "completion": [ANSWER]}, "to the text in 'prompt', got messages"),
    "two inputs": ({"instruction": "a", "input": "b", "context": "c"}, "got 'input' and 'context'"),
    "two systems": ({"messages": [SYSTEM, *CHAT], "system": "Be long."}, "one system message"),
    "no JSON": ({"messages": "hello"}, "messages as JSON, got str 'hello'"),
    "no tools": ({"messages": CHAT, "tools": ["add"]}, "need tools as JSON, got str 'add'"),
    "no schema": ({"messages": CHAT, "tools": [3]}, "tools that are objects"),
    "no role": ({"conversations": [{"from": "alien", "value": "a"}]}, "role among .* got str 'alien'"),
    "no call": ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "name of a function"),
    "bad arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "arguments of a tool call as an object",
    ),
    "no pairs": ({"instruction": "a", "history": ["b"]}, "history of pairs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_with_two_meanings_or_none_is_refused(name: str):
    row, message = REFUSED[name]
    with pytest.raises(MalformedRow, match=message):
        conversation_of(row, DataConfig())


def test_the_answer_of_verls_layout_may_be_json_text_and_stands_in_for_a_null():
    truth = {"style": "rule", "ground_truth": "2"}
    for row in ({"reward_model": json.dumps(truth)}, {"reward_model": truth, "answer": None}):
        assert prompt_of({"prompt": "1+1=", **row}, DataConfig()).answer == "2"


def test_two_answers_that_differ_are_refused():
    row = {"prompt": "1+1=", "answer": "It is #### 2", "reward_model": {"ground_truth": "2"}}
    with pytest.raises(MalformedRow, match="got 'answer' and another one in 'reward_model'"):
        prompt_of(row, DataConfig())
    assert prompt_of(row, DataConfig(answer_key="reward_model.ground_truth")).answer == "2"
    assert prompt_of({**row, "answer": 2}, DataConfig()).answer == 2


def test_an_answer_column_of_the_settings_must_be_there():
    with pytest.raises(MalformedRow, match="need a column 'solutoin', there are 'prompt', 'solution'"):
        prompt_of({"prompt": "1+1=", "solution": "2"}, DataConfig(answer_key="solutoin"))


def test_the_last_answer_of_a_chat_is_a_text_when_it_has_parts():
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    assert prompt_of({"messages": [QUESTION, {**ANSWER, "content": parts}]}, DataConfig()).answer == "42"


@pytest.mark.parametrize("start", ["[{'value': ", "[{'content': ", "array([{'role': "])
def test_messages_in_pythons_spelling_are_no_text(start: str):
    with pytest.raises(MalformedRow, match="Python's spelling"):
        prompt_of({"prompt": start + "'x'}]"}, DataConfig())


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow"])
def test_a_saved_data_set_is_read_whatever_form_it_was_last_used_in(tmp_path: Path, kind: str):
    saved = datasets.Dataset.from_list([{"prompt": [QUESTION], "answer": 2, "level": "easy"}])
    saved.with_format(kind, columns=["prompt", "answer"]).save_to_disk(tmp_path / "set")
    (prompt,), _ = load_prompts(str(tmp_path / "set"), DataConfig(), split="train")
    assert (prompt.content, prompt.answer, prompt.columns) == ([QUESTION], 2, {"level": "easy"})


def test_a_column_that_the_user_names_is_taken_literally():
    row = {"question": "q", "instruction": "i", "messages": CHAT, "solution": "s", "input": "x"}
    config = DataConfig(prompt_key="question", answer_key="solution")
    parsed = prompt_of(row, config)
    assert (parsed.content, parsed.answer, parsed.used) == ("q", "s", set())
    assert prompt_of(row, DataConfig(prompt_key="instruction")).content == "i"
    assert prompt_of(row, DataConfig(prompt_key="messages")).content == CHAT[:-1]
    with pytest.raises(MalformedRow, match="need a column 'text'"):
        prompt_of(row, DataConfig(prompt_key="text"))


def test_a_table_gives_messages_and_tools_without_the_nulls_of_other_rows(tmp_path: Path):
    other = {"type": "function", "function": {"name": "now", "description": "time"}}
    rows = [
        {"messages": CALLS, "tools": [TOOL], "info": {"a": None, "b": 1}},
        {"messages": CHAT, "tools": [other], "info": {"a": 1, "b": None}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in ("chats.parquet", "saved"):
        prompts, _ = load_prompts(str(tmp_path / source), DataConfig(), split="train")
        assert [(p.content, p.answer, p.tools) for p in prompts] == [
            (CALLS[:-1], "2", (TOOL,)),
            (CHAT[:-1], "4", (other,)),
        ]
        assert [p.columns for p in prompts] == [{"info": row["info"]} for row in rows]


def test_a_null_that_a_json_file_holds_in_arguments_stays(tmp_path: Path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": None}}]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": [QUESTION, call]}))
    assert load_prompts(str(path), DataConfig(), split="train")[0][0].content == [QUESTION, call]


def test_columns_that_the_model_does_not_see_are_reported(tmp_path: Path):
    rows = [{"prompt": "q", "images": ["a.png"], "tools": "x", "system": None}, {"prompt": "r", "images": []}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    prompts, report = load_prompts(str(path), DataConfig(), split="train")
    assert report.notes == ("the model does not see the columns images (1 rows), tools (1 rows)",)
    assert prompts[0] == Prompt("q", None, "a", 0, {"images": ["a.png"], "tools": "x", "system": None})


def test_whole_chats_are_read_without_a_note(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"instruction": "Add.", "input": "1+1", "system": "s", "output": "2"}))
    (prompt,), report = load_prompts(str(path), DataConfig(), split="train")
    assert report.notes == () and prompt.columns == {"instruction": "Add.", "output": "2"}


@pytest.mark.parametrize("name", CHATS)
def test_the_model_reads_the_text_that_transformers_writes_for_the_chat(tmp_path: Path, name: str):
    row, messages, _, tools = CHATS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    ((prompt,), _) = load_prompts(str(path), DataConfig(), split="train")
    if row.get("prompt") == "1+1?":  # RL reads the text of the prompt's own column
        assert TextCodec(chat_templates.chat_tokenizer(None)).prompt_text(prompt) == "1+1?"
        return
    continues = row.get("prompt") == messages  # the answer continues the last message
    tokenizer = chat_templates.chat_tokenizer(chat_templates.THINKING.replace("if loop.last", "if 0"))
    expected = tokenizer.apply_chat_template(
        messages if continues or messages[-1]["role"] != "assistant" else messages[:-1],
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=not continues,
        continue_final_message=continues,
    )
    assert TextCodec(tokenizer).prompt_text(prompt) == expected


def test_variables_of_the_template_come_with_the_row(tmp_path: Path):
    rows = [
        {"prompt": [QUESTION], "chat_template_kwargs": {"enable_thinking": False, "depth": None}},
        {"prompt": [QUESTION], "chat_template_kwargs": {"enable_thinking": None, "depth": 2}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    prompts, _ = load_prompts(str(tmp_path / "a.parquet"), DataConfig(), split="train")
    variables = [p.columns["chat_template_kwargs"] for p in prompts]
    assert variables == [{"enable_thinking": False}, {"depth": 2}]
    csv = tmp_path / "a.csv"
    csv.write_text('question,chat_template_kwargs\nq,"{""depth"": 2}"\nr,3\n')
    prompts, report = load_prompts(str(csv), DataConfig(on_malformed="skip"), split="train")
    assert prompts[0].columns["chat_template_kwargs"] == {"depth": 2}
    assert "chat_template_kwargs that are an object, got int 3" in report.problems[0]
