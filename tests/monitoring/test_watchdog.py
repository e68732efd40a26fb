"""A run without progress ends with the reason, wherever its code is stuck; each run in its own process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from verl.monitoring.watchdog import DIAGNOSIS_FILE, WAITS_FILE, read_snapshot

# Far above what the tests wait for, also on a busy machine.
OUTER_LIMIT_S = 120
PRELUDE = """
import asyncio, concurrent.futures, ctypes, os, re, signal, sys, threading, time
from pathlib import Path
from verl.utils.thread_interrupt import _SIGNAL
from verl.monitoring.wait_tracker import WaitTracker
from verl.monitoring.watchdog import Dependency, StalledError, Watchdog

waits = WaitTracker()

def watch(limit_s=0.5, grace_s=60.0, waits=waits, folder=".", **options):
    return Watchdog(waits, Path(folder), limit_s, grace_s=grace_s, every_s=0.05, **options)

def forever():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


def ran(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=OUTER_LIMIT_S,
        env=ENV,
    )


ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@contextmanager
def child(code: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the code, killed if it is left running."""
    with subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        cwd=folder,
        env=ENV,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], line: str) -> None:
    """Read lines until this one; fails at once if the process ends before, whatever it printed."""
    for printed in process.stdout:
        if printed == f"{line}\n":
            return
    raise AssertionError(process.communicate(timeout=OUTER_LIMIT_S)[1])


STUCK = {
    "a lock": "forever()",
    "a future": "concurrent.futures.Future().result()",
    "a thread": "thread = threading.Thread(target=forever, daemon=True); thread.start(); thread.join()",
    "sleep": "time.sleep(1000)",
    "a pipe": "os.read(os.pipe()[0], 1)",
    "an event loop": "asyncio.new_event_loop().run_until_complete(asyncio.Event().wait())",
    "a task that swallows errors": """
async def swallow():
    while True:
        try:
            await asyncio.sleep(0.01)
            while True: pass
        except Exception:
            pass
asyncio.run(swallow())
""",
    "a loop": "while True: pass",
}


@pytest.mark.parametrize("stuck", STUCK)
def test_code_that_is_stuck_gets_an_error_that_says_what_was_waited_for(stuck, tmp_path):
    code = f"""
try:
    with watch(), waits.track("training", "a batch"):
        exec({STUCK[stuck]!r})
except StalledError as error:
    print(error)
"""
    result = ran(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.match(
        r"nothing has moved for [\d.]+ s, and may stand still for 0.5 s; "
        r"training has waited [\d.]+ s for a batch, ",
        result.stdout,
    )
    assert f"all stacks: {DIAGNOSIS_FILE}" in result.stdout
    assert read_snapshot(tmp_path).state == "stalled" and "a batch" in read_snapshot(tmp_path).cause


def test_the_diagnosis_has_stacks_of_threads_and_tasks_and_the_dependencies(tmp_path):
    code = """
async def ask_engine():
    await asyncio.get_running_loop().create_future()

async def answer():
    await ask_engine()

def serve():
    async def main():
        await asyncio.gather(answer(), answer())
    asyncio.run(main())

threading.Thread(target=serve, name="engines", daemon=True).start()
with watch(dependencies=lambda: [Dependency("engine b", "failed", "out of memory")]):
    forever()
"""
    assert "StalledError" in ran(code, tmp_path).stderr
    diagnosis = (tmp_path / DIAGNOSIS_FILE).read_text()
    assert (
        "engine b is failed: out of memory" in diagnosis
        and "thread MainThread:" in diagnosis
        and "in forever" in diagnosis
    )
    assert re.search(r"2 tasks of thread engines:\n.*in answer\n.*in ask_engine", diagnosis, re.DOTALL)


def test_dependencies_that_cannot_be_described_do_not_end_the_run(tmp_path):
    result = ran("with watch(dependencies=lambda: 1 / 0): forever()", tmp_path)
    assert (
        "StalledError" in result.stderr
        and "ZeroDivisionError" in read_snapshot(tmp_path).dependencies[0].state
    )


def test_a_wait_over_its_own_limit_ends_the_run_though_others_move(tmp_path):
    code = """
def move():
    while True:
        waits.mark_progress("generation")
        time.sleep(0.01)
threading.Thread(target=move, daemon=True).start()
with watch(limit_s=100), waits.track("rewards", "the function judge", limit_s=0.5):
    forever()
"""
    assert re.search(
        r"StalledError: rewards has waited [\d.]+ s for the function judge, and may for 0.5 s",
        ran(code, tmp_path).stderr,
    )


def test_code_that_holds_the_gil_ends_the_process_and_shows_where_it_is(tmp_path):
    code = """
def endless_expression():
    re.match("(a+)+$", "a" * 60 + "b")
with watch(grace_s=0.5):
    endless_expression()
"""
    result = ran(code, tmp_path)
    assert result.returncode == 1 and "Timeout" in result.stderr and "endless_expression" in result.stderr
    assert read_snapshot(tmp_path).state == "running"


def test_code_that_no_signal_reaches_ends_the_process_with_the_diagnosis(tmp_path):
    code = """
def deadlock():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
with watch(grace_s=0.5), waits.track("training", "a batch"):
    deadlock()
"""
    result = ran(code, tmp_path)
    assert (
        result.returncode == 1
        and "The run could not be interrupted within 0.5 s, so its process ends." in result.stderr
    )
    assert (
        "for a batch" in result.stderr
        and "in deadlock" in result.stderr
        and read_snapshot(tmp_path).state == "stalled"
    )


def test_code_that_swallows_the_interrupt_ends_the_process(tmp_path):
    code = """
with watch(grace_s=60):
    while True:
        try:
            forever()
        except BaseException:
            print("no", flush=True)
"""
    result = ran(code, tmp_path)
    assert result.returncode == 1 and result.stdout == "no\n"
    assert "The run was interrupted, and did not come to its end within 0.5 s" in result.stderr


def test_cleanup_after_the_interrupt_may_take_longer_than_the_grace(tmp_path):
    code = """
with watch(limit_s=2, grace_s=0.1):
    try:
        forever()
    finally:
        time.sleep(0.5)
        print("a checkpoint", flush=True)
"""
    result = ran(code, tmp_path)
    assert "StalledError" in result.stderr and result.stdout == "a checkpoint\n"


def test_a_run_that_moves_is_left_alone(tmp_path):
    code = """
with watch(limit_s=1, grace_s=0):
    for _ in range(60):
        with waits.track("training", "a batch"):
            time.sleep(0.05)
print("finished")
"""
    result = ran(code, tmp_path)
    assert result.stdout == "finished\n", result.stderr
    assert read_snapshot(tmp_path).state == "finished" and not (tmp_path / DIAGNOSIS_FILE).exists()


def test_the_process_may_do_what_it_wants_after_the_run(tmp_path):
    result = ran("with watch(grace_s=0): pass\ntime.sleep(1.5)\nprint('still here')", tmp_path)
    assert result.stdout == "still here\n", result.stderr


def test_a_ctrl_c_stays_what_it_is(tmp_path):
    code = """
try:
    with watch(limit_s=100):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        forever()
except KeyboardInterrupt as error:
    print(type(error).__name__)
"""
    assert ran(code, tmp_path).stdout == "KeyboardInterrupt\n"
    assert read_snapshot(tmp_path).state == "interrupted"


def test_a_run_that_fails_says_how(tmp_path):
    result = ran("with watch(): raise OSError('disk full')", tmp_path)
    assert "OSError: disk full" in result.stderr and "StalledError" not in result.stderr
    assert (read_snapshot(tmp_path).state, read_snapshot(tmp_path).cause) == ("failed", "OSError: disk full")


def test_handlers_of_the_user_are_as_before_and_get_their_own_signals_meanwhile(tmp_path):
    code = """
def mine(*_):
    print("mine")
before = [signal.getsignal(number) for number in signal.valid_signals()]
with watch(): pass
print(before == [signal.getsignal(number) for number in signal.valid_signals()])
signal.signal(_SIGNAL, mine)
with watch():
    signal.raise_signal(_SIGNAL)
print(signal.getsignal(_SIGNAL) is mine)
"""
    assert ran(code, tmp_path).stdout == "True\nmine\nTrue\n"


def test_a_run_within_a_run_ends_alone_and_takes_no_time_of_the_outer_one(tmp_path):
    code = """
inner = WaitTracker()
with watch(limit_s=2, grace_s=0):
    with watch(limit_s=100, waits=inner, folder="inner"):
        time.sleep(3)
    try:
        with watch(waits=inner, folder="inner"), inner.track("training", "the inner batch"):
            forever()
    except StalledError as error:
        print("inner batch" in str(error))
    waits.mark_progress("training")
    with waits.track("training", "the outer batch"):
        forever()
"""
    result = ran(code, tmp_path)
    assert result.stdout == "True\n" and "for the outer batch" in result.stderr
    assert read_snapshot(tmp_path / "inner").state == read_snapshot(tmp_path).state == "stalled"


IN_A_THREAD = """
def run():
    with watch(grace_s={grace_s}), waits.track("training", "a batch"):
        {stuck}
with concurrent.futures.ThreadPoolExecutor() as pool:
    try:
        pool.submit(run).result()
    except StalledError as error:
        print(error)
"""


def test_a_run_in_another_thread_gets_the_error_there_when_it_runs_python(tmp_path):
    result = ran(IN_A_THREAD.format(grace_s=60, stuck="while True: time.sleep(0.01)"), tmp_path)
    assert result.stdout.startswith("nothing has moved for ") and result.returncode == 0, result.stderr


def test_a_run_in_another_thread_that_waits_for_a_lock_ends_the_process(tmp_path):
    result = ran(IN_A_THREAD.format(grace_s=0.5, stuck="forever()"), tmp_path)
    assert (
        result.returncode == 1
        and "could not be interrupted" in result.stderr
        and "in forever" in result.stderr
    )


def test_a_process_that_was_stopped_for_longer_than_the_limit_goes_on(tmp_path):
    code = """
with watch(limit_s=2):
    for _ in range(20):
        time.sleep(0.05)
        waits.mark_progress("training")
    print("stop me", flush=True)
    sys.stdin.readline()
    time.sleep(0.5)  # for several checks
print("finished")
"""
    with child(code, tmp_path) as process:
        wait_for_line(process, "stop me")
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.stdin.write("go on\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=OUTER_LIMIT_S) == ("finished\n", "")


def test_the_file_can_be_read_whenever_it_is_there(tmp_path):
    code = """
with watch(limit_s=100):
    print("ready", flush=True)
    with waits.track("training", "a batch"):
        sys.stdin.readline()
"""
    with child(code, tmp_path) as process:
        wait_for_line(process, "ready")
        times = set()
        while len(times) < 20:
            assert process.poll() is None, process.communicate()[1]
            run = read_snapshot(tmp_path)
            assert run.state == "running" and run.process.pid == process.pid
            times.add(run.written_at)
        assert run.waits.stages[0].waits[0].what == "a batch"
        process.communicate("\n", timeout=OUTER_LIMIT_S)
    assert read_snapshot(tmp_path).state == "finished" and list(tmp_path.iterdir()) == [tmp_path / WAITS_FILE]


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / f"{WAITS_FILE}.part").mkdir()
    result = ran("with watch(limit_s=100): time.sleep(0.2)\nprint('finished')", tmp_path)
    assert result.stdout == "finished\n" and result.stderr == ""


@pytest.mark.ray
def test_a_run_that_waits_for_ray_gets_the_error(tmp_path):
    code = """
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

@ray.remote
def never():
    time.sleep(1000)

try:
    with watch(limit_s=2), waits.track("training", "a rank"):
        ray.get(never.remote())
except StalledError as error:
    print("stalled", error)
"""
    result = ran(code, tmp_path)
    assert "stalled nothing has moved" in result.stdout, result.stderr
