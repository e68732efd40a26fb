"""Files of settings."""

from __future__ import annotations

import pytest


@pytest.fixture
def write(tmp_path):
    def file(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return file
