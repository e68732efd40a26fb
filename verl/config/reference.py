"""What there is to know about each setting, for `verl config` and the reference page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from verl.config.introspection import is_section, notes_of, places, type_text
from verl.config.loader import at, nearest, plain
from verl.config.run import PreferenceConfig, RewardModelConfig, RunConfig, SFTConfig, TrainerConfig
from verl.config.yaml_text import ConfigError


@dataclass(frozen=True)
class SettingDoc:
    """All there is to know about one setting; `value` is None for a form of a setting that is not in use."""

    key: str
    value: Any
    default: Any
    type: str
    unit: str
    source: str
    bounds: str
    meaning: str


def describe_settings(config: RunConfig | None = None, prefix: str = "") -> list[SettingDoc]:
    """Each setting at or below a dotted prefix, with its value in `config` (none: the defaults).

    Raises:
        ConfigError: nothing has that prefix.
    """
    kind = TrainerConfig if config is None else type(config)
    fields, defaults = places(kind), plain(kind())
    if prefix and prefix not in fields:
        raise ConfigError(f"unknown setting {prefix}; the nearest is {nearest(prefix, list(fields))}")
    values = defaults if config is None else plain(config)
    docs = []
    for key, field in fields.items():
        if is_section(field) or not f"{key}.".startswith(f"{prefix}." if prefix else ""):
            continue
        notes, own = notes_of(field), plain(field.default)
        default = own if at(defaults, key) is None else at(defaults, key)
        # A section that changes a default of the settings in it says itself where the new one is from.
        source = notes["source"] if default == own else notes_of(fields[key.rpartition(".")[0]])["source"]
        type_ = type_text(field.annotation)
        docs.append(
            SettingDoc(
                key,
                at(values, key),
                default,
                type_,
                notes["unit"],
                source,
                notes["bounds"],
                field.description or "",
            )
        )
    return docs


# Other kinds of run: title and first words of their section, which holds what a run of reinforcement learning
# has not.
_OTHER_RUNS: dict[type[RunConfig], str] = {
    SFTConfig: "Fine-tuning\n\nOf `verl sft`, in place of the settings of reinforcement learning.",
    PreferenceConfig: "Preferences\n\nOf `verl preference`, in place of the settings of reinforcement learning.",
    RewardModelConfig: "Reward models\n\nOf `verl reward-model`, in place of the settings of reinforcement learning.",
}


def settings_markdown() -> str:
    """The reference page of all settings, one table per section."""
    of_training = places()
    sections: dict[str, list[SettingDoc]] = {}
    for doc in describe_settings():
        sections.setdefault(doc.key.rpartition(".")[0], []).append(doc)
    pages = ["# Settings\n"]
    for parent, docs in sections.items():
        pages.append(
            _table(f"`{parent}`\n\n{of_training[parent].description}" if parent else "The run", docs)
        )
    for kind, title in _OTHER_RUNS.items():
        pages.append(_table(title, [doc for doc in describe_settings(kind()) if doc.key not in of_training]))
    return "\n".join(pages)


def _table(title: str, docs: list[SettingDoc]) -> str:
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
