"""Every setting is wanted: a recipe sets it, or a page of the documentation tells when to set it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from verl.config.listing.introspection import fields_by_key, is_section
from verl.config.run import PreferenceConfig, RewardModelConfig, SFTConfig, TrainerConfig

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))}
RUNS = (TrainerConfig, SFTConfig, PreferenceConfig, RewardModelConfig)
SETTINGS = sorted(
    {key for kind in RUNS for key, field in fields_by_key(kind).items() if not is_section(field)}
)
BLOCK = re.compile(r"^```yaml[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")


def dotted_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{prefix}{name}"
        yield from dotted_keys(value, f"{prefix}{name}.")


def set_by_recipes() -> set[str]:
    recipes = (ROOT / "verl/config/recipes").glob("*.yaml")
    return {key for recipe in recipes for key in dotted_keys(yaml.safe_load(recipe.read_text()))}


def names(page: str, key: str) -> bool:
    """True if a page has the whole key, sets it in YAML, or has its section and its last part as code."""
    # `steps` is also an English word: a key without dots is given a value, or stands as code.
    end = r"(?!\.?\w)" if "." in key else "[=`]"
    if re.search(rf"(?<![\w.]){re.escape(key)}{end}", page):
        return True
    if any(key in dotted_keys(yaml.safe_load(block)) for block in BLOCK.findall(page)):
        return True
    section, _, name = key.rpartition(".")
    return {section, name} <= set(CODE.findall(page))


@pytest.mark.parametrize("key", sorted(set(SETTINGS) - set_by_recipes()))
def test_a_setting_that_no_recipe_sets_is_named_in_the_documentation(key):
    assert [name for name, page in PAGES.items() if names(page, key)] != []


@pytest.mark.parametrize("kind", RUNS)
def test_every_setting_has_more_than_one_value(kind):
    choices = {key: get_args(field.annotation) for key, field in fields_by_key(kind).items()}
    assert [key for key, values in choices.items() if len(values) == 1] == []


def test_a_page_names_a_setting_by_its_key_in_yaml_or_in_a_table_of_its_section():
    key = "policy.lora.rank"
    table = "| setting of `policy.lora` | |\n|---|---|\n| `rank` | of the adapters |\n"
    for page in ("set `policy.lora.rank=4`.", "```yaml\npolicy: {lora: {rank: 4}}\n```\n", table):
        assert names(page, key)
    for page in ("policy.lora.ranks", "critic.policy.lora.rank", "`policy.lora` has a rank", "`rank`"):
        assert not names(page, key)
    assert names("take `steps=3`", "steps") and not names("it takes 3 steps", "steps")
