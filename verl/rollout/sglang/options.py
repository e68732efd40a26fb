"""Options of SGLang's server as its command line has them, and what the folder of a model says that the
server would not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of a command: `tp_size: 2` as --tp-size 2, true as a flag, false and None not at all, a list
    as many, a dict as JSON.
    """
    arguments: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if isinstance(value, Mapping):
            arguments.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            arguments.extend(str(item) for item in value)
        elif value is not True:
            arguments.append(str(value))
    return arguments


def sizes_of(model: Path) -> tuple[int, int | None]:
    """Ids that a model knows and the tokens of its context, by its config.json; None: it does not say."""
    path = model / "config.json"
    if not path.is_file():
        raise ValueError(f"need a folder with a model for SGLang, got {model}")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    own: dict[str, Any] = config if "vocab_size" in config else config["text_config"]
    return int(own["vocab_size"]), own.get("max_position_embeddings")
