"""Pages of the documentation that are made from the code: every setting, and every public function of every module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from verl.describe import settings_markdown

PACKAGE = Path(__file__).parent.parent / "verl"
FLOORS = ("utils", "data", "algorithms", "controller", "engines", "rollout", "rewards", "agents", "trainer")


def modules(floor: str) -> list[str]:
    """Public modules of a floor, by full name."""
    return [f"verl.{floor}.{path.stem}" for path in sorted((PACKAGE / floor).glob("*.py")) if not path.stem.startswith("_")]


def pages() -> dict[str, str]:
    """Page -> its Markdown."""
    reference = {f"reference/{floor}.md": (f"verl.{floor}", modules(floor)) for floor in FLOORS if modules(floor)}
    reference["reference/config.md"] = ("verl.config", ["verl.config"])
    texts = {page: "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) for page, (title, names) in reference.items()}
    return {"reference/settings.md": settings_markdown(), **texts}


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Puts the reference at the end of the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": list(pages())})
    return config


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the pages."""
    for page, text in pages().items():
        files.append(File.generated(config, page, content=text))
    return files
