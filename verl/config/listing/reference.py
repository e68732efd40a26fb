"""Documentation of each setting, for `verl config` and the reference page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from verl.config.checks.foreign_names import advice_for, name_here
from verl.config.layers import as_json, value_at
from verl.config.listing.introspection import fields_by_key, is_section, notes, type_in_words
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.config.yaml_text import ConfigError


@dataclass(frozen=True)
class SettingDoc:
    """Documentation of one setting; `value` is None for a form of a setting that is not in use."""

    key: str
    value: Any
    default: Any
    type: str
    unit: str
    source: str
    bounds: str
    meaning: str


# Other kinds of run -> title and first sentence of the section with the settings that only they have.
_OTHER_RUNS: dict[type[RunConfig], str] = {
    SFTConfig: "Fine-tuning\n\nOf `verl sft`, in place of the settings of reinforcement learning.",
    PreferenceConfig: (
        "Preferences\n\nOf `verl preference`, in place of the settings of reinforcement learning."
    ),
    RewardModelConfig: (
        "Reward models\n\nOf `verl reward-model`, in place of the settings of reinforcement learning."
    ),
}


def find_settings(word: str, config: RunConfig | None = None) -> list[SettingDoc]:
    """Documentation of the settings at or below a key, else of those with a word in key or meaning.

    Upper and lower case are the same, and another trainer's name of a setting finds it.

    Args:
        word: a key, the start of one, or any word.
        config: source of the values; none: the defaults of all kinds of runs.

    Raises:
        ConfigError: there is none.
    """
    kinds = [config] if config else [None, *(kind() for kind in _OTHER_RUNS)]
    docs = {doc.key: doc for kind in kinds for doc in describe_settings(kind)}
    wanted, here = word.lower(), name_here(word, list(docs))
    at_key = [doc for key, doc in docs.items() if f"{key}.".startswith(f"{word}.")]
    found = (
        at_key
        or [doc for doc in docs.values() if here and doc.key == here[0]]
        or [doc for doc in docs.values() if wanted in f"{doc.key} {doc.meaning}".lower()]
    )
    if not found:
        raise ConfigError(f"no setting has {word!r} in its key or meaning; {advice_for(word, list(docs))}")
    return found


def describe_settings(config: RunConfig | None = None, prefix: str = "") -> list[SettingDoc]:
    """Documentation of each setting at or below a dotted prefix.

    Args:
        config: source of the values; none: the defaults of reinforcement learning.
        prefix: key of a setting or a section; empty: all.

    Raises:
        ConfigError: no key has that prefix.
    """
    kind = TrainerConfig if config is None else type(config)
    fields, defaults = fields_by_key(kind), as_json(kind())
    if prefix and prefix not in fields:
        raise ConfigError(f"unknown setting {prefix}; {advice_for(prefix, list(fields))}")
    values = defaults if config is None else as_json(config)
    docs = []
    for key, field in fields.items():
        if is_section(field) or not f"{key}.".startswith(f"{prefix}." if prefix else ""):
            continue
        own_default = as_json(field.default)
        default = own_default if value_at(defaults, key) is None else value_at(defaults, key)
        # A section may change the default of a setting in it; its own source then says where that is from.
        noted = field if default == own_default else fields[key.rpartition(".")[0]]
        docs.append(
            SettingDoc(
                key=key,
                value=value_at(values, key),
                default=default,
                type=type_in_words(field.annotation),
                unit=notes(field)["unit"],
                source=notes(noted)["source"],
                bounds=notes(field)["bounds"],
                meaning=field.description or "",
            )
        )
    return docs


def settings_markdown() -> str:
    """The reference page of all settings, one table per section."""
    of_training = fields_by_key()
    sections: dict[str, list[SettingDoc]] = {}
    for doc in describe_settings():
        sections.setdefault(doc.key.rpartition(".")[0], []).append(doc)
    parts = ["# Settings\n"]
    for parent, docs in sections.items():
        title = f"`{parent}`\n\n{of_training[parent].description}" if parent else "The run"
        parts.append(settings_table(title, docs))
    for kind, title in _OTHER_RUNS.items():
        own = [doc for doc in describe_settings(kind()) if doc.key not in of_training]
        parts.append(settings_table(title, own))
    return "\n".join(parts)


def settings_table(title: str, docs: list[SettingDoc]) -> str:
    """A section of Markdown with one row per setting."""
    head = "| setting | default | type | unit | meaning | source of the default |\n|---|---|---|---|---|---|"
    rows = []
    for doc in docs:
        cells = [
            f"`{doc.key}`",
            f"`{json.dumps(doc.default)}`",
            f"{doc.type} {doc.bounds}".strip(),
            doc.unit,
            doc.meaning,
            doc.source,
        ]
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([f"## {title}\n", head, *rows, ""])
