"""Base classes of the settings: a section, a function chosen by name, options that are passed on."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def setting(default: Any, meaning: str, *, unit: str = "", source: str = "", **bounds: Any) -> Any:
    """A pydantic field that `verl config` can show with its unit, its bounds and the source of its default.

    Args:
        default: value of the setting if nothing sets it.
        meaning: one or two sentences for the user.
        unit: unit of the value, such as "tokens".
        source: paper or project that the default comes from.
        **bounds: `ge`, `gt`, `le`, `lt`, as pydantic takes them.
    """
    extra: dict[str, Any] = {
        "unit": unit,
        "source": source,
        "bounds": " and ".join(f"{_SIGNS[sign]} {bound}" for sign, bound in bounds.items()),
    }
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


def expand_path(text: str) -> str:
    """A path with `~` and environment variables replaced, which no shell does in a file of settings.

    Raises:
        ValueError: the path is empty, a variable is not set, a reference to one has another form, or there
            is no such user.
    """
    if not text:
        raise ValueError("need a path, got an empty text; name one, or leave the setting out")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"need the environment variable {unset[0]} for {text!r}, which is not set; set it")
    if "${" in expanded:
        raise ValueError(f"need environment variables as $NAME or ${{NAME}}, got {text!r}; write it so")
    if expanded.startswith("~"):
        raise ValueError(f"need a user of this machine behind ~, got {text!r}; write ./~ for such a name")
    return expanded


def expand_name(name: str) -> str:
    """A name in the settings with its path replaced, if it is one of "path/file.py:function".

    Raises:
        ValueError: as `expand_path`.
    """
    return expand_path(name) if ".py:" in name else name


def expand_template(text: str) -> str:
    """A path of a chat template with `~` and variables replaced; the text of a template as it is.

    Raises:
        ValueError: as `expand_path`.
    """
    return text if "{%" in text or "{{" in text else expand_path(text)


# Folder or file: `~` and `$NAME` are replaced.
PathText = Annotated[str, AfterValidator(expand_path)]
# The name of something, or "file.py:name", in whose path they are.
NameText = Annotated[str, AfterValidator(expand_name)]
TemplateText = Annotated[str, AfterValidator(expand_template)]


class Section(BaseModel):
    """A group of settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(BaseModel):
    """A function by name, "module:function" or "file.py:function", with options: `{name: gae, lam: 0.95}`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: NameText

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the chosen function."""
        return dict(self.model_extra or {})


class Options(BaseModel):
    """Options of another program, passed on unchanged."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def values(self) -> dict[str, Any]:
        """Name -> value."""
        return dict(self.model_extra or {})
