"""Chat templates that cannot show episodes are refused; what differs on the tape is said."""

from __future__ import annotations

import pytest

from tests import chat_templates as templates
from tests.tiny import merging_tokenizer
from tests.utils.chat.family_tokenizer import family_tokenizer
from verl.config.data import DataConfig
from verl.utils.chat.template_files import fitting_templates, template_names, template_tokens
from verl.utils.chat.turn_probe import probe_turns
from verl.utils.tokens import TextCodec


def codec_of(template: str, **options) -> TextCodec:
    return TextCodec(family_tokenizer(template), **options)


@pytest.mark.parametrize("name", template_names())
def test_all_templates_by_name_show_calls_and_questions(name):
    notes = probe_turns(codec_of(name), has_tools=True)
    assert all("tokenized each by itself" not in note and "again" not in note for note in notes)
    assert any("leaves out the thoughts" in note for note in notes) == (
        name
        in (
            "deepseek-v3",
            "deepseek-v3.1",
            "glm4.5",
            "gpt-oss",
            "llama3",
            "mistral-v3",
            "mistral-v7",
            "gemma3",
        )
        or name == "qwen3"
    )


@pytest.mark.parametrize("name", ["qwen3", "glm4.5", "deepseek-v3", "deepseek-v3.1", "gpt-oss"])
def test_thoughts_are_kept_by_a_variable_of_the_template(name):
    (note,) = [n for n in probe_turns(codec_of(name), has_tools=False) if "thoughts" in n]
    assert "before user messages; the tape is append-only and keeps them" in note
    assert "data.chat_template_kwargs.preserve_thinking=true" in note
    kept = codec_of(name, template_kwargs={"preserve_thinking": True})
    assert not any("thoughts" in n for n in probe_turns(kept, has_tools=True))


def test_a_template_without_tools_is_refused_with_those_that_fit_the_tokenizer():
    with pytest.raises(
        ValueError,
        match="cannot show tools before a user message: .* does not write tools.*; "
        "set data.chat_template to chatml or qwen2.5 or qwen3",
    ):
        tokenizer = templates.chat_tokenizer(templates.CHATML)
        probe_turns(TextCodec(tokenizer), has_tools=True)
    assert not any("again" in note for note in probe_turns(codec_of(templates.CHATML), has_tools=False))


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (("<result>{{ m.content }}</result>", "<result></result>"), "the result of a call"),
        (
            (
                "{% for c in m.tool_calls or [] %}",
                "{% if m.tool_calls and m.tool_calls | length > 1 %}"
                "{{ raise_exception('one call at a time') }}{% endif %}{% for c in m.tool_calls or [] %}",
            ),
            "the results of several calls .*one call at a time",
        ),
        (
            (
                "{% else %}<|im_start|>{{ m.role }}\n",
                "{% else %}{% if not loop.first and m.role == 'user' %}"
                "{{ raise_exception('one question') }}{% endif %}<|im_start|>{{ m.role }}\n",
            ),
            "a user message .*one question",
        ),
    ],
)
def test_the_form_that_fails_is_named(change, form):
    assert change[0] in templates.THINKING
    template = templates.THINKING.replace(*change)
    with pytest.raises(ValueError, match=f"cannot show {form}"):
        probe_turns(TextCodec(templates.chat_tokenizer(template)), has_tools=True)


def test_what_differs_on_the_tape_is_said():
    (note,) = probe_turns(TextCodec(templates.chat_tokenizer(templates.PLAIN)), has_tools=False)[:1]
    assert "writes no special token behind a turn" in note and "(<eos>)" in note
    notes = probe_turns(TextCodec(templates.chat_tokenizer(templates.TWO_ENDS)), has_tools=False)
    assert "closes an answer with <|eot|>, but with <|im_end|> before other messages" in notes[0]
    again = templates.CHATML.replace(
        "{{ m.content }}",
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
        "{{ m.content }}",
    )
    notes = probe_turns(TextCodec(templates.chat_tokenizer(again)), has_tools=False)
    assert any("writes the system message again before each later user message" in note for note in notes)


def test_nothing_is_probed_without_a_chat_template():
    assert probe_turns(TextCodec(merging_tokenizer()), has_tools=True) == []


def test_a_named_template_needs_its_tokens(tmp_path):
    family_tokenizer("qwen3").save_pretrained(tmp_path / "all")
    codec = TextCodec.for_run(str(tmp_path / "all"), DataConfig(chat_template="llama3"))
    assert codec.template.end == "<|eot_id|>"
    assert fitting_templates(codec.tokenizer) == template_names()
    templates.chat_tokenizer(None).save_pretrained(tmp_path / "few")
    with pytest.raises(
        ValueError,
        match=r"data.chat_template llama3 writes <\|start_header_id\|>, .*, which are no tokens of this "
        "tokenizer; take one of chatml, qwen2.5, qwen3",
    ):
        TextCodec.for_run(str(tmp_path / "few"), DataConfig(chat_template="llama3"))
    assert template_tokens("gemma3") == ["<start_of_turn>", "<end_of_turn>"]
