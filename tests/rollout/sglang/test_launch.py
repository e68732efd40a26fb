"""Options of SGLang's server: flags, reserved names, and errors in SGLang's own words."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.rollout.sglang.bench import (
    spec_of,
)
from verl.rollout.inference_server import EngineError, ServerSpec
from verl.rollout.sglang.options import as_flags
from verl.rollout.sglang.server import SGLangServer

pytestmark = pytest.mark.sglang


def test_an_unknown_option_is_an_error_in_the_words_of_sglang(tmp_path):
    engine = SGLangServer(spec_of(tmp_path, options={"tensor_paralel": 2}))
    with pytest.raises(ValueError, match="unrecognized arguments: --tensor-paralel 2"):
        asyncio.run(engine.open())


def test_options_of_the_run_are_not_those_of_the_engine(tmp_path):
    engine = SGLangServer(spec_of(tmp_path, options={"port": 1, "api-key": "x"}))
    with pytest.raises(
        ValueError, match="need engine options that the run does not choose itself, got api_key, port"
    ):
        asyncio.run(engine.open())


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="need a folder with a model for SGLang"):
        SGLangServer(ServerSpec("sglang-0", str(tmp_path)))


def test_an_interpreter_without_sglang_is_an_error_with_its_log(tmp_path):
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(EngineError, match="No module named"):
        asyncio.run(SGLangServer(spec_of(tmp_path, python=str(bare))).open())


def test_options_become_flags():
    options = {
        "tp_size": 2,
        "enable_lora": True,
        "lora_paths": None,
        "log": False,
        "dims": ["a", 1],
        "override": {"a": 1},
    }
    assert as_flags(options) == [
        "--tp-size",
        "2",
        "--enable-lora",
        "--dims",
        "a",
        "1",
        "--override",
        '{"a": 1}',
    ]
