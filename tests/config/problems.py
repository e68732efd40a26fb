"""The message of settings that are refused."""

from __future__ import annotations

import pytest

from verl.config import ConfigError, load_config


def problems(source, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)
