"""Options of vLLM: flags, reserved names, and errors in vLLM's own words."""

from __future__ import annotations

import asyncio

import pytest

from tests.rollout.vllm.bench import (
    saved,
)
from verl.rollout.inference_server import ServerSpec
from verl.rollout.vllm.options import as_flags
from verl.rollout.vllm.server import VLLMServer

pytestmark = pytest.mark.vllm


def test_an_unknown_option_is_an_error_in_vllms_own_words(tmp_path):
    saved("llama", tmp_path)
    engine = VLLMServer(ServerSpec("wrong", str(tmp_path), {"no_such_option": 1}, log=tmp_path / "log"))
    with pytest.raises(ValueError, match="unrecognized arguments: --no-such-option"):
        asyncio.run(engine.open())


def test_an_option_that_the_run_sets_itself_is_refused(tmp_path):
    saved("llama", tmp_path)
    engine = VLLMServer(
        ServerSpec("wrong", str(tmp_path), {"port": 1, "logprobs-mode": "raw_logprobs"}, log=tmp_path / "log")
    )
    with pytest.raises(ValueError, match="cannot set logprobs-mode, port"):
        asyncio.run(engine.open())


def test_options_are_passed_on_as_flags():
    options = {"a-b": 2, "c": True, "d": False, "e": {"f": [1]}, "g": ["x", "y"], "h": None, "i": "text"}
    assert as_flags(options) == [
        "--a-b",
        "2",
        "--c",
        "--no-d",
        "--e",
        '{"f": [1]}',
        "--g",
        "x",
        "y",
        "--i",
        "text",
    ]
