"""The chat templates that come with verl, against texts written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.utils.chat.conversation import TOOLS, conversation
from verl.utils.chat.chat_template import Chat, ChatTemplate
from verl.utils.chat.template_files import read_template, template_names
from verl.utils.tokens import character_tokenizer

EXPECTED = Path(__file__).parent / "expected"


def template(name: str) -> ChatTemplate:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = read_template(name)
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("name", template_names())
def test_a_conversation_with_tools_reads_as_the_family_was_trained(name):
    text = template(name).render(Chat(conversation(), TOOLS))
    assert text.rstrip("\n") == (EXPECTED / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


def test_every_expected_text_has_a_template():
    assert template_names() == sorted(path.stem for path in EXPECTED.glob("*.txt"))
