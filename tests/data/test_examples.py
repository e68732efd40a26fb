"""Examples of fine-tuning: the answers that are learned, their tokens, and the limits of their length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_codec
from verl.config.data import SFTDataConfig
from verl.data.dataset import LoadReport
from verl.data.examples import (
    Learned,
    RowLimits,
    answer_row,
    cut_at_turn,
    fit_rows,
    load_examples,
    question_of,
)
from verl.utils.sampling_types import Prompt

TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m['role'][0] + ':' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '[' + call['function']['name'] + ']' }}{% endfor %}"
    "{{ '<eos>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<bos>a:' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "be brief"}
ASKED, AGAIN = ({"role": "user", "content": text} for text in ("1+1?", "and 2+2?"))
SAID, SAID_AGAIN = ({"role": "assistant", "content": text} for text in ("2", "4"))
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "content": "4"}


def jsonl(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learned_of(folder: Path, *messages: Any, **settings: Any) -> tuple[int, ...]:
    """Indices of the learned messages of a row."""
    source = jsonl(folder, {"messages": list(messages)})
    return load_examples(source, SFTDataConfig(**settings), split="train")[0][0].answer.indices


def codec_of():
    codec = tiny_codec()
    codec.tokenizer.chat_template = TEMPLATE
    return type(codec)(codec.tokenizer)


def text_of(codec, ids):
    return codec.tokenizer.decode(ids)


def test_rows_of_every_form_are_examples(tmp_path: Path):
    source = jsonl(
        tmp_path,
        {"prompt": "1+1=", "answer": "2", "level": 3},
        {"messages": [ASKED, SAID], "level": 1},
        {"prompt": [ASKED], "answer": "2"},
        {"prompt": "1+1?", "prompt_id": "x", "messages": [ASKED, SAID]},
    )
    examples, report = load_examples(source, SFTDataConfig(), split="train")
    assert examples == [
        Prompt("1+1=", "2", "rows", 0, {"level": 3}),
        Prompt([ASKED, SAID], Learned((1,)), "rows", 1, {"level": 1}),
        Prompt([ASKED, SAID], Learned((1,)), "rows", 2),
        Prompt([ASKED, SAID], Learned((1,)), "rows", 3, examples[3].columns),
    ]
    assert report.num_malformed == 0


def test_every_answer_is_learned_or_the_last_alone(tmp_path: Path):
    chat = (SYSTEM, ASKED, SAID, AGAIN, CALLED, RESULT, SAID_AGAIN)
    assert learned_of(tmp_path, *chat) == (2, 4, 6)
    assert learned_of(tmp_path, *chat, train_on="last") == (6,)
    assert learned_of(tmp_path, *chat, AGAIN, train_on="last") == (6,)
    # A prompt of messages is not learned, whatever answers it has.
    row = {"prompt": [ASKED, SAID, AGAIN], "answer": "4"}
    examples, _ = load_examples(jsonl(tmp_path, row), SFTDataConfig(), split="train")
    assert examples[0].answer.indices == (3,)


@pytest.mark.parametrize("flag", ["weight", "train"])
def test_a_message_says_itself_if_it_is_learned(tmp_path: Path, flag: str):
    chat = (ASKED, {**SAID, flag: 0}, {**AGAIN, flag: 0}, SAID_AGAIN)
    assert learned_of(tmp_path, *chat) == (3,)
    assert learned_of(tmp_path, ASKED, {**SAID, flag: True}, AGAIN, SAID_AGAIN, train_on="last") == (1, 3)
    examples, _ = load_examples(jsonl(tmp_path, {"messages": chat}), SFTDataConfig(), split="train")
    assert examples[0].content == [ASKED, SAID, AGAIN, SAID_AGAIN]  # a template does not see it


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "answer that is a text and not empty, got nothing"),
        ({"prompt": "a", "answer": 4}, "answer that is a text and not empty, got int 4"),
        ({"messages": [SAID]}, "need a message before the answer to learn"),
        ({"messages": [ASKED]}, "it has no answer of the assistant"),
        ({"messages": [ASKED, {**SAID, "weight": 0}]}, "all have weight 0 or train false"),
        ({"messages": [ASKED, {**SAID, "content": ""}]}, "that is not empty, got none in message 2"),
        ({"messages": [{**ASKED, "weight": 1}, SAID]}, "got message 1 of role 'user' with weight or train"),
        ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, "need weight 0 or 1 in a message, got float 0.5"),
        ({"messages": [ASKED, {**SAID, "weight": 1, "train": False}]}, "need weight and train to agree"),
    ],
)
def test_a_row_with_nothing_to_learn_or_a_wrong_flag_is_malformed(
    tmp_path: Path, row: dict[str, Any], message: str
):
    source = jsonl(tmp_path, {"prompt": "1", "answer": "1"}, row)
    with pytest.raises(ValueError, match=f"(?s)1 of 2 rows cannot be used.*line 2: .*{message}"):
        load_examples(source, SFTDataConfig(), split="train")
    assert load_examples(source, SFTDataConfig(on_malformed="skip"), split="train")[1].num_malformed == 1


def test_a_completion_that_its_row_marks_as_bad_is_not_learned(tmp_path: Path):
    rows = [{"prompt": "1+1=", "completion": answer, "label": answer == "2"} for answer in "23"]
    with pytest.raises(ValueError, match="(?s)1 of 2 rows.*line 2: .*label false, which marks a bad one"):
        load_examples(jsonl(tmp_path, *rows), SFTDataConfig(), split="train")


def test_answers_and_calls_are_learned_with_their_ends_and_nothing_else():
    codec = codec_of()
    chat = [SYSTEM, ASKED, SAID, AGAIN, CALLED, RESULT, SAID_AGAIN]
    prompt_ids, response_ids, mask = answer_row(codec, Prompt(chat), Learned((2, 4, 6)))
    assert text_of(codec, prompt_ids) == "<bos>s:be brief<eos>\n<bos>u:1+1?<eos>\n<bos>a:"
    rest = "2<eos>\n<bos>u:and 2+2?<eos>\n<bos>a:[add]<eos>\n<bos>t:4<eos>\n<bos>a:4<eos>"
    assert text_of(codec, response_ids) == rest
    learned = [i for i, is_learned in zip(response_ids, mask, strict=True) if is_learned]
    assert text_of(codec, learned) == "2<eos>[add]<eos>4<eos>"
    _, _, only = answer_row(codec, Prompt(chat), Learned((4,)))
    assert sum(only) == len("[add]") + 1 and all(only)


def test_an_answer_to_messages_is_what_the_template_writes_and_to_a_text_ends_with_the_end_token():
    codec = codec_of()
    for answer in ("2", [SAID]):
        row = answer_row(codec, Prompt([ASKED]), answer)
        assert text_of(codec, row.prompt_ids) == "<bos>u:1+1?<eos>\n<bos>a:"
        assert text_of(codec, row.response_ids) == "2<eos>" and all(row.mask)
    row = answer_row(codec, Prompt("1+1="), "2")
    assert text_of(codec, row.prompt_ids + row.response_ids) == "1+1=2<eos>"
    opened = answer_row(codec, Prompt([ASKED, {"role": "assistant", "content": "The sum is "}]), "2")
    assert text_of(codec, opened.response_ids) == "The sum is 2<eos>"


def test_a_long_conversation_loses_whole_turns_at_its_end():
    codec = codec_of()
    chat = [SYSTEM, ASKED, SAID, AGAIN, CALLED, RESULT, SAID_AGAIN]
    example = Prompt(chat, Learned((2, 4, 6)))
    lengths = [
        answer_row(
            codec, Prompt(chat[: last + 1]), Learned(tuple(i for i in (2, 4, 6) if i <= last))
        ).num_tokens
        for last in (2, 4, 6)
    ]
    for limit, kept in ((lengths[2] - 1, (2, 4)), (lengths[1], (2, 4)), (lengths[1] - 1, (2,))):
        cut = cut_at_turn(codec, example, limit)
        assert cut is not None and cut.answer.indices == kept and cut.content == chat[: kept[-1] + 1]
    assert cut_at_turn(codec, example, lengths[0] - 1) is None


def test_rows_are_cut_or_dropped_by_the_limits_and_all_of_it_is_said(tmp_path: Path):
    codec = codec_of()
    chats = [[ASKED, SAID], [ASKED, SAID, AGAIN, SAID_AGAIN], [ASKED, {**SAID, "content": "2" * 40}]]
    source = jsonl(tmp_path, *({"messages": chat} for chat in chats))
    examples, report = load_examples(source, SFTDataConfig(), split="train")
    config = SFTDataConfig(max_sequence_tokens=30)
    kept, report = fit_rows(
        examples,
        report,
        RowLimits.of(config, 100),
        lambda e: [answer_row(codec, e, e.answer)],
        cut=lambda e, limit: cut_at_turn(codec, e, limit),
    )
    assert [e.content for e in kept] == [[ASKED, SAID]] * 2
    assert report.notes == (
        "28 tokens, 4 of them learned",
        "1 conversations cut at a turn to fit 30 tokens, data.max_sequence_tokens",
        "1 rows longer than 30 tokens, data.max_sequence_tokens, dropped",
    )
    assert report.longest == 12 and report.num_too_long == 0


def test_a_row_that_the_template_refuses_is_malformed():
    codec = codec_of()
    codec.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = [Prompt("1+1=", "2", "rows", 0), Prompt([ASKED, SAID], Learned((1,)), "rows", 1)]
    report = LoadReport("rows", len(rows))
    limits = RowLimits(100, 100, "the model's context")
    with pytest.raises(
        ValueError, match="(?s)1 of 2 rows cannot be used.*rows, row 1 .from 0.: .*roles must alternate"
    ):
        fit_rows(rows, report, limits, lambda e: [answer_row(codec, e, e.answer)])
    kept, report = fit_rows(rows, report, limits, lambda e: [answer_row(codec, e, e.answer)], skips=True)
    assert kept == rows[:1] and report.num_malformed == 1


def test_the_question_of_an_example_is_what_comes_before_its_last_answer():
    example = Prompt([ASKED, SAID, AGAIN, CALLED], Learned((1, 3)))
    asked = question_of(example)
    assert asked.content == [ASKED, SAID, AGAIN] and json.loads(asked.answer) == CALLED["tool_calls"]
    assert question_of(Prompt("1+1=", "2")) == Prompt("1+1=", "2")
