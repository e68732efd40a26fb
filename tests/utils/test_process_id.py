"""The state of a process that wrote down its identity."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from verl.utils.process_id import ProcessId, process_state, this_process

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def child():
    """A process that waits for input, and the identity that it printed."""
    code = (
        "from verl.utils.process_id import this_process; process = this_process()\n"
        "print(process.host, process.pid, process.started, flush=True); input()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, env=environment
    ) as process:
        host, pid, started = process.stdout.readline().split()
        yield process, ProcessId(host, int(pid), int(started))
        process.kill()


def wait_for(process: ProcessId, wanted: str) -> None:
    deadline = time.monotonic() + 30
    while (state := process_state(process)) != wanted:
        assert time.monotonic() < deadline, state


def test_this_process_is_running():
    assert process_state(this_process()) == "running" and this_process().pid == os.getpid()


def test_a_process_is_seen_to_run_to_be_stopped_and_to_be_gone(child):
    process, identity = child
    assert process_state(identity) == "running"
    process.send_signal(signal.SIGSTOP)
    wait_for(identity, "stopped")
    process.send_signal(signal.SIGCONT)
    wait_for(identity, "running")
    process.kill()
    wait_for(identity, "gone")  # a zombie: nobody has asked for its exit code yet
    process.wait()
    assert process_state(identity) == "gone"


def test_another_process_of_the_same_number_is_not_taken_for_it():
    assert process_state(replace(this_process(), started=1)) == "gone"
    assert process_state(replace(this_process(), started=0)) == "running"


def test_a_process_of_another_host_is_not_looked_for():
    assert process_state(ProcessId("elsewhere", os.getpid(), 1)) == "on another host"
