"""Deadlines that end the process although some code holds the GIL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORTS = "import re, time; from verl.monitoring.interpreter_watchdog import arm, disarm\n"
ENDLESS = "\nre.match('(a+)+$', 'a' * 60 + 'b')"


def ran(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "before",
    [
        "arm('a', 0.2)",
        "arm('a', 0.2); arm('b', 1000)",
        "arm('a', 1000); arm('b', 0.2)",
        "arm('a', 1000); arm('b', 0.2); disarm('a')",
        "arm('a', 0.2); arm('b', 1000); disarm('b')",
        "arm('a', 1000); arm('a', 0.2)",
    ],
)
def test_the_earliest_deadline_counts_whoever_armed_or_disarmed_another(before):
    result = ran(IMPORTS + before + ENDLESS)
    assert result.returncode == 1 and "Timeout" in result.stderr


@pytest.mark.parametrize(
    "before",
    [
        "arm('a', 0.2); disarm('a')",
        "arm('a', 0.2); arm('a', 1000)",
        "disarm('a')",
    ],
)
def test_a_deadline_that_was_removed_or_postponed_ends_nothing(before):
    result = ran(f"{IMPORTS}{before}\ntime.sleep(0.5)")
    assert (result.returncode, result.stderr) == (0, "")
