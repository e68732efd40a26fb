"""Base classes of the settings: a section, a choice of one function, options that are passed through."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def setting(default: Any, meaning: str, *, unit: str = "", source: str = "", **bounds: Any) -> Any:
    """A pydantic field that also carries its unit, its bounds as text and the source of its default, for
    `verl config`.
    """
    extra: dict[str, Any] = {
        "unit": unit,
        "source": source,
        "bounds": " and ".join(f"{_SIGNS[sign]} {bound}" for sign, bound in bounds.items()),
    }
    return Field(default, description=meaning, json_schema_extra=extra, **bounds)


class Section(BaseModel):
    """A group of settings: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(BaseModel):
    """One function of a table by name (or as "package.module:function") with options, `{name: gae, lam:
    0.95}`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments for the chosen function."""
        return dict(self.model_extra or {})


class Options(BaseModel):
    """Options of somebody else's program, passed on as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def values(self) -> dict[str, Any]:
        """Name -> value."""
        return dict(self.model_extra or {})
