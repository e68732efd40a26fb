"""Functions by their name in the settings, bound to the columns that they read and to their options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Protocol

import torch
from torch import Tensor

from verl.config.fields import Choice
from verl.data.columns import COLUMNS
from verl.utils.user_code import exception_text, load_function

_CHECKED_TYPES = {"bool", "int", "float", "str", "None"}


class Columns(Protocol):
    """Anything that has columns by name: a dict or a batch."""

    def __contains__(self, name: str, /) -> bool: ...

    def __getitem__(self, name: str, /) -> Tensor: ...


# The problem with what a function has returned for some columns; None if there is none.
Check = Callable[[Any, Columns], str | None]


class ReturnedError(ValueError):
    """A chosen function that returned something else than a function of its kind must."""


class UserFunctionError(RuntimeError):
    """A user's function that raised an error; says which, and where."""


@dataclass(frozen=True)
class BoundFunction:
    """A chosen function with its options, called with columns by name.

    Attributes:
        name: as in the settings.
        function: the chosen one.
        columns: its positional parameters, the columns that it reads.
        options: its keyword arguments.
        returns: checks what it returns, in every call; None: not checked.
        is_users: it is no built-in function.
    """

    name: str
    function: Callable[..., Any]
    columns: tuple[str, ...]
    options: Mapping[str, Any]
    returns: Check | None = None
    is_users: bool = False

    def __call__(self, columns: Columns) -> Any:
        """Result of the function for these columns.

        Raises:
            ValueError: a column that it reads is missing, or it refuses its options.
            ReturnedError: it returned something else than it must.
            UserFunctionError: a user's function raised an error.
        """
        for column in self.columns:
            if column not in columns:
                raise ValueError(
                    f"{self.name} reads the columns {', '.join(self.columns)}; there is no {column!r}; "
                    "write it first"
                )
        result = self._result([columns[column] for column in self.columns])
        problem = self.returns(result, columns) if self.returns else None
        if problem:
            raise ReturnedError(f"{self.name}: {problem}")
        return result

    def _result(self, arguments: list[Tensor]) -> Any:
        try:
            return self.function(*arguments, **self.options)
        except torch.OutOfMemoryError:  # It says by itself what to do.
            raise
        # A border to a user's function, which must be named; it may even end the program.
        except (Exception, SystemExit) as error:
            if not self.is_users:
                raise
            raise UserFunctionError(f"{self.name} fails: {exception_text(error)}; correct it") from error


def bind(
    choice: Choice,
    table: Mapping[str, Callable[..., Any]],
    *,
    columns: Collection[str] | None = None,
    returns: Check | None = None,
) -> BoundFunction:
    """The function of a choice, bound to columns and options.

    Positional parameters are columns and keyword-only parameters are options, as in `ADVANTAGES`.

    Args:
        choice: name in the table, "package.module:function" or "path/file.py:function", and options.
        table: name -> function.
        columns: names of all columns that can exist, to find a misspelt parameter; None: not checked.
        returns: checks what it returns.

    Returns:
        The function with its columns and options.

    Raises:
        ValueError: unknown name or module, unknown, missing or mistyped option, unknown column, or a function
            that takes *args, **kwargs or a positional parameter with a default.
    """
    function = find_function(choice.name, table)
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
        _check_parameter(choice.name, p, columns)
    _check_options(choice, {p.name: p for p in parameters if p.kind is Parameter.KEYWORD_ONLY})
    reads = tuple(p.name for p in parameters if p.kind is not Parameter.KEYWORD_ONLY)
    return BoundFunction(
        choice.name, function, reads, choice.options, returns=returns, is_users=choice.name not in table
    )


def find_function(name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function of a name in the table, of "package.module:function" or of "path/file.py:function".

    Raises:
        ValueError: there is none.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        known = f'need one of {", ".join(table)}, "package.module:function" or "path/file.py:function"'
        raise ValueError(f"{known}, got {name!r}{_nearest(name, table)}")
    return load_function(name, user="function")


def _check_parameter(name: str, parameter: Parameter, columns: Collection[str] | None) -> None:
    if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
        raise ValueError(f"{name} must name its columns and options, but takes {parameter}; write them out")
    if parameter.kind is Parameter.KEYWORD_ONLY:
        return
    if parameter.default is not Parameter.empty:
        raise ValueError(f"{name}: a column has no default, got {parameter}; put * before the options")
    if columns is not None and parameter.name not in columns:
        known = f"the columns are {', '.join(columns)}"
        kind = "no column that exists when it is called" if parameter.name in COLUMNS else "no column"
        raise ValueError(
            f"{name} reads {parameter.name!r}, which is {kind}{_nearest(parameter.name, columns)}; {known}"
        )


def _check_options(choice: Choice, valid: Mapping[str, Parameter]) -> None:
    takes = f"{choice.name} takes " + (
        f"the options {', '.join(map(str, valid.values()))}" if valid else "no options"
    )
    for option, value in choice.options.items():
        if option not in valid:
            raise ValueError(f"{takes}; got {option!r}{_nearest(option, valid)}")
        if not _fits(value, _annotation_text(valid[option])):
            raise ValueError(
                f"{takes}; got {option}={value!r}, which is not of type {_annotation_text(valid[option])}"
            )
    for option, parameter in valid.items():
        if parameter.default is Parameter.empty and option not in choice.options:
            raise ValueError(
                f"{takes}; {option!r} has no default; write {{name: {choice.name}, {option}: ...}}"
            )


def _annotation_text(parameter: Parameter) -> str:
    """The annotation as text: under `from __future__ import annotations` it is one already."""
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _fits(value: Any, annotation: str) -> bool:
    """True if the value is of a type such as `float | None`; other kinds of annotations are not checked."""
    types = {part.strip() for part in annotation.split("|")}
    came = "None" if value is None else type(value).__name__
    return not types <= _CHECKED_TYPES or came in types or (came == "int" and "float" in types)


def _nearest(word: str, words: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
