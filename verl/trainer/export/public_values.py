"""Values of settings as strangers may read them: without keys, addresses, and folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Settings of reward functions and engines may contain such values, whatever their names are.
_SECRET_NAME = re.compile(r"key|token|secret|password|auth|credential", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|glpat-|AKIA|xox[abp]-)[\w-]{8,}|\bBearer\s+\S+", re.IGNORECASE)
# With an optional function, as reward functions are named.
_FILE = re.compile(r"/.*\.(jsonl?|parquet|arrow|csv|tsv|txt|gz|zst|py|ya?ml|jinja)(:\w+)?$")
HIDDEN = "(not shown)"


def public_value(value: Any, name: str = "") -> Any:
    """A setting without secrets, addresses and folders.

    Args:
        value: JSON value.
        name: of the setting.
    """
    if isinstance(value, Mapping):
        return {key: public_value(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if _SECRET_NAME.search(name.rpartition(".")[2]) else public_name(value)


def public_name(text: str) -> str:
    """A text without its private words: of a path its last part stays, of an address or a key nothing."""
    if text[:1] in ("/", "~", ".") or is_folder(text):
        return text.rstrip("/").rpartition("/")[2]
    return re.sub(r"\S+", lambda word: _public_word(word[0]), text)


def is_folder(name: str) -> bool:
    """True if there is a folder or file of that name."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # longer than a name may be
        return False


def _public_word(word: str) -> str:
    if "://" in word or _SECRET_VALUE.search(word):
        return HIDDEN
    is_path = word[:1] in ("/", "~") or word.count("/") > 1 or _FILE.search(word)
    return word.rstrip("/").rpartition("/")[2] if is_path else word
