"""The part of a run that is in progress: a live line on a terminal, a few lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from tests.monitoring.trackers import screen, shown
from verl.monitoring.progress import Progress
from verl.monitoring.wait_tracker import WaitTracker


def test_parts_are_named_in_the_first_step_alone_and_once():
    console, waits = screen(), WaitTracker(clock=lambda: 0.0)
    progress = Progress(waits, console)
    for step in (1, 2):
        progress.begin_step(step, 2)
        for group in (1, 2):
            with waits.track("generation", f"answers of group {group}"):
                pass
        with waits.track("update", "update_policy"):
            pass
    assert shown(console) == ["step 1/2: generating answers of group 1", "step 1/2: updating the policy"]


def test_parts_of_a_phase_are_not_named_and_the_phase_once():
    console, waits = screen(), WaitTracker(clock=lambda: 0.0)
    progress = Progress(waits, console)
    progress.begin_step(1, 2)
    for _ in range(2):
        with progress.phase("evaluating 5 prompts"), waits.track("generation", "answers"):
            pass
    assert shown(console) == ["evaluating 5 prompts"]


def test_a_terminal_has_a_line_with_the_seconds_and_no_other():
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = Progress(waits := WaitTracker(clock=lambda: now[0]), console)
    progress.begin_step(3, 9)
    with waits.track("training", "groups for the batch"), waits.track("generation", "8 answers to 2 prompts"):
        now[0] = 12.0
        assert progress.line() == "step 3/9: generating 8 answers to 2 prompts, 12 s"
        with waits.track("generation", "answers of group 2"):  # several groups: the batch says more
            assert progress.line() == "step 3/9: waiting for groups for the batch, 12 s"
    assert progress.line() == "step 3/9"
    assert console.file.getvalue() == ""


def test_without_a_console_nothing_is_shown():
    progress = Progress(waits := WaitTracker(), None)
    with progress.phase("loading"), progress.live(), waits.track("update", "x"):
        progress.say("nobody reads this")
