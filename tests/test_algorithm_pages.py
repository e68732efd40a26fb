"""Pages of the algorithms: one for each recipe, in the navigation, and a row for each function."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.correction import CORRECTIONS
from verl.algorithms.kl import KL_ESTIMATORS
from verl.algorithms.losses import POLICY_LOSSES
from verl.algorithms.value_losses import VALUE_LOSSES
from verl.config import RECIPES, load_config
from verl.rewards.shaping import LENGTH_PENALTIES

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "algorithms"
INDEX = (FOLDER / "index.md").read_text(encoding="utf-8")
METHODS = [name for name in RECIPES if name != "quickstart"]
TABLES = {
    "Advantages": ADVANTAGES,
    "Policy losses": POLICY_LOSSES,
    "Aggregations": AGGREGATIONS,
    "KL estimators": KL_ESTIMATORS,
    "Corrections": CORRECTIONS,
    "Value losses": VALUE_LOSSES,
    "Length penalties": {"off": None, **LENGTH_PENALTIES},
}


def pages(nav: Any) -> Iterator[str]:
    """The pages of a navigation, however deep."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(part)


def rows(section: str) -> dict[str, list[str]]:
    """The table of a section of the index: name in code at its start -> cells."""
    text = INDEX.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith(("| `", "| [`"))
    ]
    found = {
        cells[0].strip(" []").split("`")[1]: cells
        for cells in lines
        if not cells[0].startswith("`algorithm.")
    }
    assert len(found) == sum(not cells[0].startswith("`algorithm.") for cells in lines), (
        f"a name twice in {section}"
    )
    return found


@pytest.mark.parametrize("recipe", METHODS)
def test_a_recipe_has_a_page_with_its_learning_curve_once(recipe):
    lines = (FOLDER / f"{recipe}.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "<!-- curve:" in line] == [f"<!-- curve: {recipe} -->"]
    assert any(f"verl train {recipe} " in line for line in lines)


def test_every_page_of_an_algorithm_is_in_the_navigation_once():
    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = [f"algorithms/{path.name}" for path in FOLDER.glob("*.md")]
    assert sorted(page for page in listed if page.startswith("algorithms/")) == sorted(there)
    assert {f"algorithms/{recipe}.md" for recipe in METHODS} <= set(there)


@pytest.mark.parametrize("section", TABLES)
def test_every_function_of_a_table_has_its_row_on_the_page_of_all_algorithms(section):
    assert set(rows(section)) == set(TABLES[section])


@pytest.mark.parametrize("recipe", METHODS)
def test_the_row_of_a_recipe_says_what_it_chooses(recipe):
    link, advantage, policy_loss, aggregation, kl, besides = rows("Recipes")[recipe]
    chosen = load_config(recipe).algorithm
    assert link == f"[`{recipe}`]({recipe}.md)"
    assert advantage.startswith(f"`{chosen.advantage.name}`") or advantage == "none"
    assert (
        policy_loss.startswith(f"`{chosen.policy_loss.name}`")
        and aggregation == f"`{chosen.aggregation.name}`"
    )
    if chosen.kl.where != "off":
        assert kl == f"{chosen.kl.where}, `{chosen.kl.estimator.name}`"
    else:
        assert kl in ("off", "inside the loss")
    assert (f"correction `{chosen.correction.name}`" in besides) == (chosen.correction.name != "bypass")


def test_the_recipes_of_the_index_are_those_that_there_are():
    assert set(rows("Recipes")) == set(METHODS)


def test_links_between_pages_lead_to_pages():
    for path in FOLDER.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (FOLDER / link).exists() or "../reference/" in link, f"{path.name}: {link}"


def test_a_constant_length_in_a_recipe_is_that_of_its_longest_answer():
    configs = {recipe: load_config(recipe) for recipe in METHODS}
    lengths = {
        recipe: c.algorithm.aggregation.options["length"]
        for recipe, c in configs.items()
        if c.algorithm.aggregation.options
    }
    assert (
        lengths == {recipe: configs[recipe].sampling.max_tokens for recipe in lengths}
        and {"dr_grpo", "dppo"} <= lengths.keys()
    )
