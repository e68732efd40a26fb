"""One timer for all that may keep the interpreter to themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDLESS = "import re, time; from verl.utils import guard\n{before}\nre.match('(a+)+$', 'a' * 60 + 'b')"


def ran(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "before",
    [
        "guard.arm('a', 0.2)",
        "guard.arm('a', 0.2); guard.arm('b', 1000)",
        "guard.arm('a', 1000); guard.arm('b', 0.2)",
        "guard.arm('a', 1000); guard.arm('b', 0.2); guard.disarm('a')",
        "guard.arm('a', 0.2); guard.arm('b', 1000); guard.disarm('b')",
        "guard.arm('a', 1000); guard.arm('a', 0.2)",
    ],
)
def test_the_nearest_deadline_counts_whoever_set_or_took_back_another(before):
    result = ran(ENDLESS.format(before=before))
    assert result.returncode == 1 and "Timeout" in result.stderr


@pytest.mark.parametrize(
    "before", ["guard.arm('a', 0.2); guard.disarm('a')", "guard.arm('a', 0.2); guard.arm('a', 1000)", "guard.disarm('a')"]
)
def test_a_deadline_that_was_taken_back_or_put_off_ends_nothing(before):
    result = ran(f"import time; from verl.utils import guard\n{before}\ntime.sleep(0.5)")
    assert (result.returncode, result.stderr) == (0, "")
