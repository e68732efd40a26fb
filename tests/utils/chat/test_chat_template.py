"""Chat messages to the text that the template writes: forms of messages, openings, variables, tools."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests import chat_templates as templates
from tests.chat_templates import chat_tokenizer
from verl.config.data import DataConfig
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

ASK = {"role": "user", "content": "1+1="}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def codec(template: str, **options) -> TextCodec:
    return TextCodec(chat_tokenizer(template), **options)


def opening(text: str) -> Prompt:
    return Prompt([ASK, {"role": "assistant", "content": text}])


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]
    assert codec(templates.CHATML).prompt_text(Prompt([{"role": "user", "content": parts}])) == (
        "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_part_that_is_no_text_is_named_with_its_prompt():
    picture = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    prompt = Prompt([{"role": "user", "content": picture}], source="pictures", index=3)
    with pytest.raises(ValueError, match="prompt 3 of pictures: message 1 has a part of type 'image_url'"):
        codec(templates.CHATML).encode_prompt(prompt)


@pytest.mark.parametrize(
    ("template", "text", "end"),
    [
        (templates.CHATML, "The sum is ", "assistant\nThe sum is "),
        (templates.CHATML, "", "assistant\n"),
        (templates.CHATML, " \n", "assistant\n \n"),
        (templates.MARKED, "The sum is ", "assistant\nThe sum is "),
        (templates.HEADERS, "The sum is", "assistant</head>\n\nThe sum is"),
        # It trims contents, as Transformers does then.
        (templates.HEADERS, "The sum is ", "assistant</head>\n\nThe sum is"),
        (templates.BRACKETS, "The sum is ", "[/INST] The sum is "),
        (templates.ALTERNATING, "The sum is", "model\nThe sum is"),
        (templates.PLAIN, "The sum is ", "assistant: The sum is "),
        # The template's own empty thought is not written before the thought of the opening.
        (templates.THINKING, "<think>\nSo", "assistant\n<think>\nSo"),
        (templates.THINKING, "<think>", "assistant\n<think>"),
        (templates.THINKING, "The sum", "assistant\n<think>\n\n</think>\n\nThe sum"),
    ],
)
def test_the_last_message_of_the_assistant_is_continued(template, text, end):
    coder = codec(template)
    assert coder.prompt_text(opening(text)).endswith(end)
    answer = coder.tokenizer.decode(coder.encode_answer("2", opening(text)))
    added = "<think>\n\n</think>\n\n" if template == templates.THINKING and not text else ""
    assert answer.strip() == f"{added}2{coder.template.end or '<eos>'}"


@pytest.mark.parametrize(
    "template", [templates.CHATML, templates.HEADERS, templates.BRACKETS, templates.ALTERNATING]
)
def test_an_opening_reads_as_transformers_continues_a_message(template):
    coder, prompt = codec(template), opening("The sum is")
    expected = coder.tokenizer.apply_chat_template(
        prompt.content, tokenize=False, continue_final_message=True
    )
    assert coder.prompt_text(prompt) == expected


def test_a_message_that_calls_tools_cannot_be_continued():
    call = {"role": "assistant", "content": "", "tool_calls": [ADD]}
    with pytest.raises(ValueError, match="the last message calls tools"):
        codec(templates.THINKING).prompt_text(Prompt([ASK, call]))


def test_the_role_developer_is_the_systems_where_the_template_knows_no_other():
    prompt = Prompt([{"role": "developer", "content": "Add."}, ASK])
    assert codec(templates.CHATML).prompt_text(prompt).startswith("<|im_start|>developer\nAdd.")
    knows_system = (
        "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.role }}:{{ m.content }};{% endif %}"
        "{% endfor %}"
    )
    assert codec(knows_system).prompt_text(prompt) == "system:Add.;user:1+1=;"
    assert codec(knows_system, system_prompt="Not this.").prompt_text(prompt) == "system:Add.;user:1+1=;"


def test_what_the_template_does_not_take_is_said_in_its_words():
    with pytest.raises(
        ValueError, match="prompt 0 of the data: .*: only user and assistant roles are supported"
    ):
        codec(templates.BRACKETS, system_prompt="Add.").encode_prompt(Prompt([ASK]))
    with pytest.raises(ValueError, match="roles must alternate"):
        codec(templates.ALTERNATING).encode_prompt(Prompt([ASK, ASK]))


def test_a_message_that_the_template_leaves_out_is_named():
    silent = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match=r"leaves out message 1 \(system\)"):
        codec(silent, system_prompt="Add.").prompt_text(Prompt([ASK]))


def test_the_systems_text_goes_where_the_template_writes_it():
    text = codec(templates.ALTERNATING, system_prompt="Add.").prompt_text(Prompt([ASK]))
    assert text == "<bos><turn>user\nAdd.\n\n1+1=</turn>\n<turn>model\n"


def test_variables_of_the_template_come_from_the_run_and_from_the_row():
    coder = codec(templates.THINKING, template_kwargs={"enable_thinking": False})
    assert coder.prompt_text(Prompt([ASK])).endswith("<think>\n\n</think>\n\n")
    own = Prompt([ASK], columns={"chat_template_kwargs": {"enable_thinking": True}})
    assert coder.prompt_text(own).endswith("assistant\n")


def test_a_variable_that_the_template_does_not_read_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="enable_thinkin, which .* not read; did you mean enable_thinking"):
        codec(templates.THINKING, template_kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match="has zzz, which the chat template does not read; it reads none"):
        codec(templates.CHATML).prompt_text(Prompt([ASK], columns={"chat_template_kwargs": {"zzz": 1}}))
    with pytest.raises(ValueError, match="cannot set add_generation_prompt, which the run sets"):
        codec(templates.CHATML, template_kwargs={"add_generation_prompt": False})


def test_tools_are_those_of_the_run_unless_the_row_has_some():
    coder = codec(templates.THINKING, tools=[ADD])
    assert '"name": "add"' in coder.prompt_text(Prompt([ASK]))
    other = {**ADD, "function": {**ADD["function"], "name": "take"}}
    text = coder.prompt_text(Prompt([ASK], tools=(other,)))
    assert '"name": "take"' in text and '"name": "add"' not in text


def test_tools_for_a_template_without_tools_are_refused():
    with pytest.raises(ValueError, match="does not write tools, but 1 are given"):
        codec(templates.CHATML, tools=[ADD]).prompt_text(Prompt([ASK]))


def test_a_call_is_written_also_by_templates_that_ask_for_a_message_without_text():
    template = (
        "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    messages = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [ADD]},
        {"role": "tool", "content": "2"},
    ]
    assert codec(template).prompt_text(Prompt(messages)) == "1+1=;add;2;"
    with pytest.raises(ValueError, match=r"leaves out the call of add in message 2 \(assistant\)"):
        codec(templates.CHATML).prompt_text(Prompt(messages))


def test_a_call_is_left_out_even_if_the_text_has_the_name_of_its_function_elsewhere():
    call = {"role": "assistant", "content": "", "tool_calls": [ADD]}
    messages = [{"role": "user", "content": "add 1 and 1"}, call, {"role": "tool", "content": "2"}]
    with pytest.raises(ValueError, match=r"leaves out the call of add in message 2 \(assistant\)"):
        codec(templates.CHATML).prompt_text(Prompt(messages))


def test_an_earlier_answer_that_the_template_leaves_out_is_named():
    template = templates.CHATML.replace("<|im_start|>{{ m.role }}", "{{ m.role }}").replace(
        "{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"
    )
    chat = [ASK, {"role": "assistant", "content": "two"}, ASK]
    with pytest.raises(ValueError, match=r"leaves out message 2 \(assistant\)"):
        codec(template).prompt_text(Prompt(chat))


def test_a_result_of_a_tool_that_the_template_leaves_out_is_named():
    template = templates.THINKING.replace("<result>{{ m.content }}</result>", "<result></result>")
    call = {"role": "assistant", "content": "", "tool_calls": [ADD]}
    messages = [ASK, call, {"role": "tool", "content": "it is 7"}]
    with pytest.raises(ValueError, match=r"leaves out message 3 \(tool\)"):
        codec(template).prompt_text(Prompt(messages))
    assert "<result>it is 7</result>" in codec(templates.THINKING).prompt_text(Prompt(messages))


def test_the_template_of_the_settings_is_a_text_or_a_file_and_is_saved(tmp_path):
    chat_tokenizer(None).save_pretrained(tmp_path / "model")
    (tmp_path / "chatml.jinja").write_text(templates.CHATML)
    for value in (templates.CHATML, str(tmp_path / "chatml.jinja")):
        coder = TextCodec.for_run(str(tmp_path / "model"), DataConfig(chat_template=value))
        assert coder.prompt_text(Prompt([ASK])) == (
            "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
        )
        coder.tokenizer.save_pretrained(tmp_path / "saved")
        saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
        assert saved.chat_template == templates.CHATML


def test_a_template_that_is_not_valid_or_not_there_is_refused(tmp_path):
    chat_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"data.chat_template is not valid Jinja: .*endfor.*, in line 2"):
        TextCodec.for_run(str(tmp_path), DataConfig(chat_template="{% if x %}\n{% endfor %}"))
    with pytest.raises(ValueError, match="need data.chat_template as .* chatml, .* got 'nowhere.jinja'"):
        TextCodec.for_run(str(tmp_path), DataConfig(chat_template="nowhere.jinja"))
