"""One timer for all that may keep the interpreter to themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDLESS = "import re, time; from verl.monitoring import interpreter_watchdog\n{before}\nre.match('(a+)+$', 'a' * 60 + 'b')"


def ran(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "before",
    [
        "interpreter_watchdog.arm('a', 0.2)",
        "interpreter_watchdog.arm('a', 0.2); interpreter_watchdog.arm('b', 1000)",
        "interpreter_watchdog.arm('a', 1000); interpreter_watchdog.arm('b', 0.2)",
        "interpreter_watchdog.arm('a', 1000); interpreter_watchdog.arm('b', 0.2); interpreter_watchdog.disarm('a')",
        "interpreter_watchdog.arm('a', 0.2); interpreter_watchdog.arm('b', 1000); interpreter_watchdog.disarm('b')",
        "interpreter_watchdog.arm('a', 1000); interpreter_watchdog.arm('a', 0.2)",
    ],
)
def test_the_nearest_deadline_counts_whoever_set_or_took_back_another(before):
    result = ran(ENDLESS.format(before=before))
    assert result.returncode == 1 and "Timeout" in result.stderr


@pytest.mark.parametrize(
    "before",
    [
        "interpreter_watchdog.arm('a', 0.2); interpreter_watchdog.disarm('a')",
        "interpreter_watchdog.arm('a', 0.2); interpreter_watchdog.arm('a', 1000)",
        "interpreter_watchdog.disarm('a')",
    ],
)
def test_a_deadline_that_was_taken_back_or_put_off_ends_nothing(before):
    result = ran(f"import time; from verl.monitoring import interpreter_watchdog\n{before}\ntime.sleep(0.5)")
    assert (result.returncode, result.stderr) == (0, "")
