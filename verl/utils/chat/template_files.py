"""Chat templates as files and texts: those that come with verl by name, and the users' own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

# Chat templates by name.
TEMPLATES = Path(__file__).parent / "templates"
# Transformers' tag around what the assistant writes.
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def template_sources(template: str | Mapping[str, str] | None) -> list[str]:
    """Sources of the templates of a tokenizer, which may have several by name."""
    if not template:
        return []
    return [template] if isinstance(template, str) else list(template.values())


def parse_template(source: str, name: str) -> Any:
    """Syntax tree of a chat template.

    Raises:
        ValueError: it is not valid Jinja; says in which line.
    """
    try:
        # Transformers' own tag; what is between is text like any other.
        return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", source))
    except TemplateSyntaxError as error:
        raise ValueError(f"{name} is not valid Jinja: {error.message}, in line {error.lineno}") from error


def template_names() -> list[str]:
    """Names of the chat templates that come with verl, such as `qwen3`."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template(value: str) -> str:
    """A chat template by its name, from its file, or the text itself.

    Raises:
        ValueError: no such template or file, or one that is not valid.
    """
    is_text = "{%" in value or "{{" in value
    if not is_text:
        path = TEMPLATES / f"{value}.jinja" if value in template_names() else Path(value).expanduser()
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                "need data.chat_template as a file with a Jinja template, its text, or one of "
                f"{', '.join(template_names())}, got {value!r}: {error}"
            ) from error
    else:
        source = value
    parse_template(source, "data.chat_template" if is_text else f"data.chat_template, {value},")
    return source


def template_tokens(name: str) -> list[str]:
    """Special tokens that a chat template of ours writes, as its first comment lists them."""
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    listed = re.search(r"^Tokens: (.*?) -#\}", source, re.MULTILINE)
    assert listed, f"the chat template {name} lists no tokens"
    return listed[1].split()


def fitting_templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names of the chat templates of ours whose special tokens a tokenizer has."""
    known = tokenizer.get_added_vocab()
    return [name for name in template_names() if all(token in known for token in template_tokens(name))]


def check_template_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a tokenizer has the special tokens of a chat template of ours.

    Raises:
        ValueError: it has not, so that they would be split into many tokens.
    """
    known = tokenizer.get_added_vocab()
    if missing := [token for token in template_tokens(name) if token not in known]:
        fitting = ", ".join(fitting_templates(tokenizer))
        remedy = f"take one of {fitting}" if fitting else "give a template for it as a file"
        raise ValueError(
            f"data.chat_template {name} writes {', '.join(missing[:4])}, which are no tokens of this "
            f"tokenizer; {remedy}"
        )
