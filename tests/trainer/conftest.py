"""Models and options that the tests of the trainers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import CHARACTERS
from verl.engines.hf.pretrained import make_tiny_model


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of one layer that knows nine characters, only to be read."""
    folder = tmp_path_factory.mktemp("models") / "letters"
    make_tiny_model(folder, hidden=32, layers=1, characters=CHARACTERS)
    return folder
