"""Calls that keep the interpreter to themselves."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import re
from verl.rewards.calls import RewardCall, CallPool

def endless_expression():
    return re.match("(a+)+$", "a" * 60 + "b")

CallPool(timeout_s=0.2).run([RewardCall("endless", endless_expression, is_async=False)])
"""


def test_a_call_that_never_gives_the_interpreter_back_ends_the_process_and_shows_where_it_is():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr and "endless_expression" in ended.stderr
