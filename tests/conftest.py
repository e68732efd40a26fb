"""Settings of every test: one thread, no model hub, the same examples of properties in every run."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Read by Hugging Face libraries at import; a test that reaches for the network fails at once instead of
# waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
# Small products on two threads cost more than on one, and their sums depend on the split.
torch.set_num_threads(1)
# A busy machine fails no property.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("repeatable")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names without addresses in memory: workers that run in parallel must find the same tests."""
    return getattr(val, "__name__", type(val).__name__) if " at 0x" in repr(val) else None
