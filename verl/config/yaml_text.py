"""YAML text of settings: scalars of YAML 1.2, the line of every key, one clear error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import yaml
from typing_extensions import override


class ConfigError(ValueError):
    """Settings that cannot be used; the message names every problem."""

    def __init__(self, *problems: str) -> None:
        unique = list(dict.fromkeys(problems))
        super().__init__(
            unique[0]
            if len(unique) == 1
            else f"{len(unique)} problems in the settings:\n  - " + "\n  - ".join(unique)
        )


_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d[\d_]*[eE][-+]?\d+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_MEANT_AS_TEXT = re.compile(r"[ \t]+#\S")


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2: 1e-6 is a number; off, 1:30 and 2025-01-01 are texts.

    PyYAML follows YAML 1.1, which reads all four differently.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}


for _tag, _pattern in {
    "null": r"(~|null|Null|NULL|)$",
    "bool": r"(true|True|TRUE|false|False|FALSE)$",
    "int": r"[-+]?(0|[1-9][\d_]*)$",
    "float": _FLOAT.pattern,
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1 or 1.2 would take for another type."""

    @override
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[str, str]]:
    """The value of a YAML text, and "name:line" of each dotted key in it.

    Raises:
        ConfigError: it is not valid YAML, or a key is given twice.
    """
    loader = None
    try:
        loader = _Loader(text)  # looks for characters that no text has
        node = loader.get_single_node()
        origins: dict[str, str] = {}
        for key, line in _key_lines(node):
            if key in origins:
                raise ConfigError(f"{name}:{line}: {key} is given twice, first in {origins[key]}; remove one")
            if key.rpartition(".")[2] == "<<":
                raise ConfigError(
                    f"{name}:{line}: need each setting written out, got the merge key <<, which YAML 1.2 "
                    "does not have; write its settings here, or begin with `recipe: NAME`"
                )
            origins[key] = f"{name}:{line}"
        if cut := next(_cut_texts(node, text), None):
            raise ConfigError(
                f"{name}:{cut.start_mark.line + 1}: need quotes around a text with ' #', which begins a "
                f"comment, got only {cut.value!r}; quote the text, or put a space behind the #"
            )
        return (None if node is None else loader.construct_document(node)), origins
    except yaml.MarkedYAMLError as error:
        place = f"{name}:{error.problem_mark.line + 1}" if error.problem_mark else name
        raise ConfigError(
            f"{place}: need valid YAML, got an error: {error.problem or error.context}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: need valid YAML, got an error: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: need settings of finite depth, got one that holds itself") from None
    finally:
        if loader:
            loader.dispose()


def parse_override(text: str, name: str, *, is_text: bool, is_list: bool) -> Any:
    """The value of an override: a text as it was typed, everything else as YAML.

    Args:
        text: behind the equals sign. A quoted text is read as YAML.
        name: of the override, for messages.
        is_text: the setting takes texts.
        is_list: the setting takes lists.

    Raises:
        ConfigError: it is not valid YAML, or a part of it would be taken for a comment.
    """
    typed = text.strip()
    is_yaml = typed in ("", "null", "~") or typed[0] in "'\"" or (is_list and typed[0] == "[")
    if is_text and not is_yaml:
        return typed
    loader = None
    try:
        loader = _Loader(typed)
        node = loader.get_single_node()
        rest = typed[node.end_mark.index :].strip() if node else ""
    except yaml.YAMLError:
        rest = ""  # `parse_yaml` says what is wrong
    finally:
        if loader:
            loader.dispose()
    if rest:
        raise ConfigError(f"{name}: need quotes around a value with ' #', else {rest!r} is lost as a comment")
    try:
        return parse_yaml(typed, name)[0]
    except ConfigError as error:
        hint = "; put quotes around the texts of a list, such as ['*.jsonl']" if is_list else ""
        raise ConfigError(f"{error}{hint}") from None


def _cut_texts(node: Any, text: str) -> Iterator[Any]:
    """Plain texts that a '#' without a space behind it cuts short: meant as a text rather than a comment."""
    if isinstance(node, yaml.ScalarNode):
        is_text = node.style is None and node.tag == "tag:yaml.org,2002:str"
        if is_text and _MEANT_AS_TEXT.match(text, node.end_mark.index):
            yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _cut_texts(item, text)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _cut_texts(value, text)


def _key_lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted key and line of every key of a YAML node; the number of an item of a list is a part of a key."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _key_lines(item, f"{prefix}{number}.")
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield f"{prefix}{key.value}", key.start_mark.line + 1
        yield from _key_lines(value, f"{prefix}{key.value}.")


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """The YAML text of a tree, in its order."""
    return yaml.dump(
        tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120
    )
