"""Import of verifiers before processes are forked: of its tasksets, or of the contract up to 0.1."""

from __future__ import annotations

import importlib


def has_load_environment() -> bool:
    """True if the installed package has the contract up to 0.1."""
    return hasattr(importlib.import_module("verifiers"), "load_environment")


if not has_load_environment():  # loads that contract where there is one
    importlib.import_module("verifiers.v1")
