"""Generated parts of the documentation: settings, the reference of every module, learning curves."""

from __future__ import annotations

import json
import re
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from verl.config.listing.reference import settings_markdown
from verl.rewards.library.reward_table import rewards_markdown

PACKAGE = Path(__file__).parent.parent / "verl"
# Written by benchmarks/learning.py --json.
CURVES = Path(__file__).parent / "assets" / "learning.json"
PACKAGES = (
    "config",
    "weight_sync",
    "utils",
    "monitoring",
    "data",
    "algorithms",
    "planner",
    "controller",
    "engines",
    "rollout",
    "rewards",
    "agents",
    "trainer",
)


def modules(package: str) -> list[str]:
    """Public modules of a package, by full name."""
    paths = [path.relative_to(PACKAGE.parent) for path in sorted((PACKAGE / package).rglob("*.py"))]
    return [".".join(path.with_suffix("").parts) for path in paths if not path.stem.startswith("_")]


def pages() -> dict[str, str]:
    """Markdown of each generated page, by its path."""
    reference = {f"reference/{package}.md": (f"verl.{package}", modules(package)) for package in PACKAGES}
    texts = {
        page: "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])
        for page, (title, names) in reference.items()
    }
    return {"reference/settings.md": settings_markdown(), **texts}


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Add the reference at the end of the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": list(pages())})
    return config


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the generated pages."""
    for page, text in pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replace `<!-- curve: RECIPE -->` by a learning curve, `<!-- curves: all -->` by a table of all.

    `<!-- rewards: all -->` becomes the table of the built-in rewards.
    """
    if "<!-- rewards: all -->" in markdown:
        markdown = markdown.replace("<!-- rewards: all -->", rewards_markdown())
    markdown = re.sub(r"^<!-- curve: (\w+) -->$", lambda found: curve(found[1]), markdown, flags=re.MULTILINE)
    return re.sub(r"^<!-- curves: all -->$", lambda _: curves(), markdown, flags=re.MULTILINE)


@cache
def runs() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Measured runs, by recipe and task."""
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in json.loads(CURVES.read_text())["runs"]:
        measured.setdefault((row["recipe"], row["task"]), []).append(row)
    return measured


def curve(recipe: str) -> str:
    """Table of the results of a recipe with a curve for each task, as Markdown."""
    tasks = sorted({task for _, task in runs()})
    lines = [
        "| task | accuracy before | after, mean (min to max) of the seeds | |",
        "| --- | --- | --- | --- |",
    ]
    for task in tasks:
        if measured := runs().get((recipe, task)):
            before, after = ([row[name] for row in measured] for name in ("before", "after"))
            figures = f"{statistics.fmean(after):.3f} ({min(after):.3f} to {max(after):.3f})"
            lines.append(
                f"| `{task}` | {statistics.fmean(before):.3f} | {figures} | {drawing(recipe, task)} |"
            )
    link = "[Method](../benchmarks.md#every-recipe)"
    legend = f"Accuracy of the sampled answers over the run, `{recipe}` in blue, `grpo` in grey. {link}."
    return "\n".join([*lines, "", legend])


def curves() -> str:
    """Table of all recipes with their curves, the best of the first task first, as Markdown."""
    tasks = sorted({task for _, task in runs()})
    lines = [
        "| recipe | " + " | ".join(f"`{task}` | " for task in tasks) + "|",
        "| --- | " + " | ".join("--- | ---" for _ in tasks) + " |",
    ]
    mean = {key: statistics.fmean(row["after"] for row in measured) for key, measured in runs().items()}
    for recipe in sorted(
        {recipe for recipe, _ in runs()}, key=lambda recipe: -mean.get((recipe, tasks[0]), 0)
    ):
        cells = [f"[`{recipe}`](algorithms/{recipe}.md)"]
        for task in tasks:
            after = [row["after"] for row in runs().get((recipe, task), [])]
            figures = f"{mean[recipe, task]:.3f} ({min(after):.3f} to {max(after):.3f})" if after else ""
            cells += [figures, drawing(recipe, task)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drawing(recipe: str, task: str) -> str:
    """Inline SVG of the mean curve of a recipe over that of GRPO, both from 0 to 1."""
    paths = []
    for name, color in (("grpo", "#aaa"), (recipe, "#3f6ad8")):
        curves = [row["accuracies"] for row in runs().get((name, task), [])]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        smooth = [statistics.fmean(mean[max(0, i - 4) : i + 1]) for i in range(len(mean))]
        points = " ".join(
            f"{200 * i / max(1, len(smooth) - 1):.0f},{60 - 58 * value:.1f}" for i, value in enumerate(smooth)
        )
        paths.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    frame = '<rect x="0" y="0" width="200" height="61" fill="none" stroke="#8884"/>'
    return (
        f'<svg width="200" height="62" role="img" aria-label="learning curve">{frame}{"".join(paths)}</svg>'
    )
