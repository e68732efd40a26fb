"""Silence of a server, its error messages, and the time that it asks to wait."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import pytest

from verl.rollout.http_client import SilenceError, SilenceTimeout, error_message, parse_retry_after


def test_a_silent_server_is_an_error_unless_it_is_paused():
    async def work() -> float:
        silence = SilenceTimeout(0.1)
        start_s = time.monotonic()
        with pytest.raises(SilenceError, match="has been silent for 0.1 s"):
            await silence.wait(asyncio.sleep(30))
        waited_s = time.monotonic() - start_s
        silence.pause()
        assert await silence.wait(asyncio.sleep(0.3, "answer")) == "answer"
        silence.resume()
        with pytest.raises(SilenceError):
            await silence.wait(asyncio.sleep(30))
        return waited_s

    assert 0.1 <= asyncio.run(work()) < 10


def test_a_sign_of_life_on_one_stream_counts_for_all():
    async def work() -> str:
        silence = SilenceTimeout(0.4)
        slow = asyncio.create_task(silence.wait(asyncio.sleep(0.7, "slow")))
        await asyncio.sleep(0.3)
        await silence.wait(asyncio.sleep(0, "fast"))
        return await slow

    assert asyncio.run(work()) == "slow"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"detail": "not found"}', "not found"),
        ('{"error": "no key"}', "no key"),
        ("<html>", "<html>"),
    ],
)
def test_the_message_of_an_error_is_found_in_the_forms_of_all_servers(content, message):
    assert error_message(content) == message


def test_the_time_to_wait_is_in_seconds_or_a_date():
    assert parse_retry_after("1.5") == 1.5 and parse_retry_after("-3") == 0.0
    assert 50 < parse_retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert parse_retry_after(None) is None and parse_retry_after("soon") is None
