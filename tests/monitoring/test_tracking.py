"""Phases of a step, and a tracker that outlives failures of its sinks."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest

from tests.monitoring.trackers import METRICS, lines_of, screen, shown, tracker
from verl.monitoring.sinks import SINKS, Sink
from verl.monitoring.tracking import Clock


def test_the_clock_sums_phases_and_starts_again():
    clock = Clock()
    for _ in range(2):
        with clock.phase("generate"):
            time.sleep(0.02)
    with clock.phase("update"):
        pass
    taken = clock.take()
    assert 0.04 <= taken["time/generate_s"] < 0.5
    assert taken["time/update_s"] < 0.02
    assert clock.take() == {}


def test_the_clock_waits_for_queued_work_and_counts_it():
    clock = Clock(wait=lambda: time.sleep(0.02))
    with clock.phase("update"):
        pass
    assert clock.take()["time/update_s"] >= 0.02


def test_phases_do_not_nest_and_an_error_ends_one():
    clock = Clock()
    with (
        pytest.raises(AssertionError, match="'b' began inside phase 'a'"),
        clock.phase("a"),
        clock.phase("b"),
    ):
        pass
    with clock.phase("c"):
        pass
    assert set(clock.take()) == {"time/a_s", "time/c_s"}


def test_events_are_lines_between_the_steps_and_never_wrapped(tmp_path):
    console = screen(width=80)
    tracker(tmp_path, "console", console=console).event(f"checkpoint written to {'a' * 90} [bold]")
    tracker(tmp_path, "jsonl", console=console).event("nobody asked")
    assert shown(console) == [f"checkpoint written to {'a' * 90} [bold]"]


def test_samples_are_one_json_line_each_whatever_the_model_wrote(tmp_path):
    rows = [
        {
            "prompt": "2 + 2",
            "response": "四\ud800\n",
            "reward": 1.0,
            "scores": {"math": math.nan},
            "finish": "stop",
        }
    ]
    tracker(tmp_path, "jsonl").samples(10, rows)
    (row,) = lines_of(tmp_path / "samples" / "step-000010.jsonl")
    assert row == rows[0] | {"scores": {"math": None}}


class Broken(Sink):
    """Fails at every step."""

    def log(self, step, metrics):
        raise OSError("no space left on device")


def test_a_sink_that_fails_is_reported_once_counted_and_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "broken", Broken)
    console = screen(width=200)
    out = tracker(tmp_path, "broken", "jsonl", console=console)
    for step in (1, 2, 3):
        out.log(step, METRICS)
    assert shown(console) == ["broken failed and is skipped where it fails: OSError: no space left on device"]
    out.close()
    out.close()
    assert shown(console)[1:] == ["broken: 3 of its writes failed; the run was not affected"]
    assert out.failures == {"broken": 3}
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 3


def test_samples_that_cannot_be_written_stop_nobody(tmp_path):
    (tmp_path / "samples").write_text("in the way")
    out = tracker(tmp_path)
    out.samples(1, [{"prompt": "p"}])
    assert out.failures == {"samples": 1}


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from verl.config.run import TrackingConfig\n"
        "from verl.monitoring.tracking import Tracker\n"
        "out = Tracker(TrackingConfig(sinks=('console', 'jsonl')), Path(sys.argv[1]), total_steps=9)\n"
        "sys.stdin.read()\n"
        "for step in (1, 2, 3): out.log(step, {'reward': 1.0})\n"
        "out.close()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    run.stdout.close()  # Like `| head`, before the first line.
    run.stdin.close()
    assert run.wait(60) == 0
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 3


def test_what_is_not_chosen_is_not_loaded():
    program = "import sys, verl.monitoring.tracking, verl.monitoring.display\n"
    program += "heavy = {'torch', 'matplotlib', 'tensorboard', 'wandb', 'mlflow'}\n"
    program += "print(*(heavy & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        == "\n"
    )
