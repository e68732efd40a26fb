"""Servers in processes of their own: the cause of a request that failed."""

from __future__ import annotations

import asyncio
import sys
import tempfile

from verl.rollout.inference_server import EngineError
from verl.rollout.server_process import ServerProcess, cause_of, first_error

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


LOG = """\
INFO 11-29 importing.py:44: ImportError: triton is not installed
(EngineCore pid=7) ERROR 11-29 core.py:1: EngineCore failed to start.
(EngineCore pid=7) ERROR 11-29 core.py:1: ValueError: Unsupported CPU attention configuration: head_dim=16
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_of_an_end_is_the_first_error_of_the_log():
    assert (first_error(LOG.splitlines()) or "").endswith("head_dim=16")
    assert first_error(["0 Error: s of 3", "ready"]) is None


def test_a_server_that_ends_is_reported_with_cause_and_last_lines(tmp_path):
    (tmp_path / "log").write_text("KeyError: of an earlier server\n")
    code = f"print({LOG!r} + 25 * chr(10)); raise SystemExit(1)"
    message = str(cause(code, tmp_path))
    assert (
        "the first error in its log:\n    (EngineCore pid=7) ERROR 11-29 core.py:1: ValueError: " in message
    )


def test_a_server_gets_no_proxy_for_this_machine_and_a_short_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setattr(tempfile, "tempdir", f"/{'long' * 20}")
    code = "import os; raise SystemExit(os.environ['no_proxy'] + ' ' + os.environ['TMPDIR'])"
    assert "example.org,127.0.0.1,localhost,::1 /tmp" in str(cause(code, tmp_path))
