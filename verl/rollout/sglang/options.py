"""Command line of SGLang's server, and the sizes of a model that the run checks itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Command line of options.

    `tp_size: 2` is --tp-size 2; true is a flag without a value; false and None are left out; a list has
    several values; a dict is JSON.
    """
    flags: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        flags.append("--" + name.replace("_", "-"))
        if isinstance(value, Mapping):
            flags.append(json.dumps(value))
        elif isinstance(value, list | tuple):
            flags.extend(str(item) for item in value)
        elif value is not True:
            flags.append(str(value))
    return flags


def read_model_sizes(model: Path) -> tuple[int, int | None]:
    """Vocabulary size and context length of a model folder; None: its config.json has no context length.

    Raises:
        ValueError: there is no such file.
    """
    path = model / "config.json"
    if not path.is_file():
        raise ValueError(f"need a folder with a model for SGLang, got {model}")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text_config: dict[str, Any] = config if "vocab_size" in config else config["text_config"]
    return int(text_config["vocab_size"]), text_config.get("max_position_embeddings")
