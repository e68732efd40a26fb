"""Servers in processes of their own: the cause of a request that failed."""

from __future__ import annotations

import asyncio
import sys

from verl.rollout.inference_server import EngineError
from verl.rollout.server_process import ServerProcess, cause_of

REFUSED = EngineError("does not answer: connection refused")


def cause(code: str, tmp_path) -> EngineError:
    """The cause of a refused request to a program."""

    async def found() -> EngineError:
        process = ServerProcess("one", [sys.executable, "-c", code], environment={}, log=tmp_path / "log")
        try:
            return await cause_of(REFUSED, process.check)
        finally:
            await process.end()

    return asyncio.run(found())


def test_a_request_that_fails_while_its_server_dies_names_the_end_of_the_server(tmp_path):
    assert "one has ended with code 7" in str(
        cause("import time; time.sleep(0.1); raise SystemExit(7)", tmp_path)
    )


def test_a_request_that_fails_while_its_server_lives_is_its_own_cause(tmp_path):
    assert cause("import time; time.sleep(60)", tmp_path) is REFUSED


def test_of_a_server_that_was_joined_nothing_more_is_known():
    assert asyncio.run(cause_of(REFUSED, None)) is REFUSED
