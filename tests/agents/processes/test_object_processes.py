"""Objects in processes: each call that fails is named, and nothing outlives the trainer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verl.agents.processes import fork_server_handle
from verl.agents.processes.object_processes import ObjectProcesses
from verl.agents.processes.process_failure import ProcessFailure
from verl.agents.processes.reusable_processes import ReusableProcesses

FILE = """
import asyncio, os, random, signal, subprocess, sys, threading

class Counter:
    def __init__(self, start=0):
        if start == "bad":
            raise ValueError("a bad start")
        self.value = start

    def add(self, number):
        self.value += number
        return self.value

    def pid(self):
        return os.getpid()

    def modules(self):
        return "torch" in sys.modules

    def random(self):
        return random.random()

    def raises(self):
        raise KeyError("no such key")

    def exits(self):
        os._exit(3)

    def leaves(self):
        sys.exit(4)

    def dies(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def hangs(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 30))
        while True:
            pass

    def prints(self, text, times=1):
        for _ in range(times):
            print(text)
        return times

    def large(self):
        return bytes(65 << 20)

    def lock(self):
        return threading.Lock()

    def garbage(self):
        for fd in range(3, 30):
            try:
                os.write(fd, b"x" * 64)
            except OSError:
                pass
        while True:
            pass

    def daemon(self):
        return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid

    def child(self):
        return subprocess.Popen(["sleep", "1000"]).pid

    def runs_a_loop(self):
        return asyncio.run(self.later(5))

    async def later(self, number):
        await asyncio.sleep(0)
        return number

    async def waits(self):
        self.event = asyncio.Event()
        await self.event.wait()
        return "set"

    async def sets(self):
        self.event.set()

    async def swallows(self):
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                pass

    async def leaves_later(self):
        sys.exit(5)

    async def raises_later(self):
        await asyncio.sleep(0)
        raise RuntimeError("later")

def doubled(number):
    return lambda: 2 * number
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("users") / "users.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def counters(file):
    processes = ObjectProcesses(f"{file}:Counter", max_processes=4, name="counter")
    yield processes
    processes.close()


async def failure_of(process, method, timeout_s=20.0):
    with pytest.raises(ProcessFailure) as caught:
        await process.call(method, timeout_s=timeout_s)
    return caught.value.outcome, caught.value.detail, caught.value.is_lost


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def assert_gone(pid):
    for _ in range(500):
        if is_gone(pid):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} is still there")


def test_an_object_keeps_its_state_in_a_process_of_its_own_without_torch(counters):
    async def run():
        a, b = await counters.open(10), await counters.open(start=20)
        assert [await a.call("add", 1, timeout_s=20) for _ in range(2)] == [11, 12]
        assert await b.call("add", number=5, timeout_s=20) == 25
        assert await a.call("pid", timeout_s=20) == a.pid != b.pid
        assert await a.call("later", 7, timeout_s=20) == 7 and await a.call("runs_a_loop", timeout_s=20) == 5
        assert not await a.call("modules", timeout_s=20)
        await a.close()
        await b.close()
        assert is_gone(a.pid) and is_gone(b.pid)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "outcome", "detail", "is_lost"),
    [
        ("raises", "error", "KeyError: 'no such key' ({file}:24)", False),
        ("raises_later", "error", "RuntimeError: later ({file}:", False),
        ("leaves", "error", "SystemExit: 4 ({file}:", False),
        ("leaves_later", "error", "SystemExit: 5 ({file}:", False),
        ("missing", "error", "AttributeError: 'Counter' object has no attribute 'missing'", False),
        ("large", "error", "need a result of at most 64 MiB, got bytes with 65 MiB; return less", False),
        ("lock", "error", "need a result that can leave its process, got lock: ", False),
        ("exits", "crash", "its process ended with exit code 3", True),
        ("dies", "crash", "its process was killed by SIGSEGV", True),
        ("garbage", "crash", "its process sent what is no reply", True),
        ("waits", "timeout", "no result within 0.2 s", False),
        ("swallows", "timeout", "no result within 0.2 s", True),
        ("hangs", "timeout", "no result within 0.2 s", True),
    ],
)
def test_a_call_that_fails_is_named_and_its_neighbour_goes_on(
    counters, file, method, outcome, detail, is_lost
):
    async def run():
        process, neighbour = await counters.open(), await counters.open(1)
        failure = await failure_of(process, method, timeout_s=0.2 if outcome == "timeout" else 20)
        assert (failure[0], failure[2]) == (outcome, is_lost) and failure[1].startswith(
            detail.format(file=file)
        )
        assert process.is_lost == is_lost
        if is_lost:
            assert (await failure_of(process, "add"))[0] == "crash"
        else:
            assert await process.call("add", 2, timeout_s=20) == 2
        assert await neighbour.call("add", 2, timeout_s=20) == 3
        await process.close()
        await neighbour.close()

    asyncio.run(run())


def test_coroutines_of_an_object_run_at_the_same_time(counters):
    async def run():
        process = await counters.open()
        waiting = asyncio.ensure_future(process.call("waits", timeout_s=20))
        await process.call("later", 1, timeout_s=20)
        await process.call("sets", timeout_s=20)
        assert await waiting == "set"
        await process.close()

    asyncio.run(run())


def test_an_object_that_cannot_be_made_gives_its_place_back(counters, file):
    async def run():
        for _ in range(5):
            with pytest.raises(ProcessFailure, match="ValueError: a bad start"):
                await counters.open("bad")
        assert await (process := await counters.open()).call("add", 1, timeout_s=20) == 1
        await process.close()

    asyncio.run(run())


def test_further_objects_wait_for_a_free_place_also_after_a_cancellation(counters):
    async def run():
        opened = [await counters.open() for _ in range(4)]
        given_up = [asyncio.ensure_future(counters.open()) for _ in range(3)]
        fifth = asyncio.ensure_future(counters.open(5))
        await asyncio.sleep(0)
        for each in given_up:
            each.cancel()
        await opened[0].call("add", 1, timeout_s=20)
        assert not fifth.done()
        await opened.pop().close()
        opened.append(await fifth)
        assert await opened[-1].call("add", 1, timeout_s=20) == 6
        for process in opened:
            await process.close()

    asyncio.run(run())
    # A place that is freed while its new owner gives up is not lost.
    for _ in range(8):
        asyncio.run(opened_and_given_up(counters))
    asyncio.run(run())


async def opened_and_given_up(counters):
    task = asyncio.ensure_future(counters.open())
    for _ in range(20):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        await task.result().close()


def test_a_seed_makes_global_random_numbers_equal(counters):
    async def number(seed):
        process = await counters.open(random_seed=seed)
        value = await process.call("random", timeout_s=20)
        await process.close()
        return value

    assert asyncio.run(number(3)) == asyncio.run(number(3)) != asyncio.run(number(None))


def test_prints_are_copied_line_by_line_and_a_flood_is_cut(counters, capsys, monkeypatch):
    monkeypatch.setattr(fork_server_handle, "MAX_OUTPUT_BYTES", 10_000)

    async def run():
        process = await counters.open()
        assert await process.call("prints", "good morning", timeout_s=20) == 1
        assert await process.call("prints", "x" * 99, 100_000, timeout_s=60) == 100_000
        await process.close()

    asyncio.run(run())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[counter] good morning" and lines[1] == f"[counter] {'x' * 99}"
    assert lines[-1] == "[counter] ... printed over 10000 bytes, the rest is left out"
    assert len(lines) < 2000


def test_processes_that_user_code_starts_end_with_it(counters):
    async def run():
        process = await counters.open()
        child = await process.call("child", timeout_s=20)
        await process.close()
        return child

    assert_gone(asyncio.run(run()))


def test_objects_may_be_functions_and_closures(file):
    processes = ObjectProcesses(lambda number: lambda more: number + more)

    async def run():
        process = await processes.open(3)
        assert await process.call("__call__", 4, timeout_s=20) == 7
        await process.close()

    asyncio.run(run())
    processes.close()


def test_a_module_that_fails_to_import_is_named(tmp_path):
    (tmp_path / "bad.py").write_text("\nraise OSError('no data')\n")
    processes = ObjectProcesses(f"{tmp_path}/bad.py:A")
    with pytest.raises(ProcessFailure, match=r"OSError: no data \(.*bad.py:2\)"):
        asyncio.run(processes.open())
    processes.close()


def test_a_module_that_starts_threads_is_imported_in_each_process(tmp_path):
    (tmp_path / "threads.py").write_text(
        "import threading, queue\ninbox, outbox = queue.Queue(), queue.Queue()\n"
        "def serve():\n  while True: outbox.put(inbox.get())\n"
        "threading.Thread(target=serve, daemon=True).start()\n"
        "class A:\n  def ask(self):\n    inbox.put(1)\n    return outbox.get()\n"
    )
    notes = []
    processes = ObjectProcesses(f"{tmp_path}/threads.py:A", name="asker", note=notes.append)

    async def run():
        process = await processes.open()
        assert await process.call("ask", timeout_s=20) == 1

    asyncio.run(run())
    processes.close()
    assert notes[0].startswith("asker: its import starts 1 threads")


def test_a_fork_server_that_is_killed_is_replaced(counters):
    async def run():
        process = await counters.open()
        parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        assert (await failure_of(process, "hangs"))[0] == "crash"
        await process.close()
        process = await counters.open(1)
        assert await process.call("add", 1, timeout_s=20) == 2
        await process.close()

    asyncio.run(run())


def test_equal_objects_are_lent_and_a_call_that_is_given_up_costs_its_process(file):
    pool = ObjectProcesses(f"{file}:Counter", max_processes=2)
    processes = ReusableProcesses(pool, max_processes=2)

    async def run():
        pids = await asyncio.gather(*[processes.call("pid", timeout_s=20) for _ in range(6)])
        assert len(set(pids)) <= 2
        with pytest.raises(ProcessFailure, match="exit code 3"):
            await processes.call("exits", timeout_s=20)
        waiting = [asyncio.ensure_future(processes.call("waits", timeout_s=20)) for _ in range(4)]
        last = asyncio.ensure_future(processes.call("add", 1, timeout_s=20))
        await asyncio.sleep(0)
        for each in waiting:
            each.cancel()
        assert await last == 1
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not set(pids) & set(
            await asyncio.gather(*[processes.call("pid", timeout_s=20) for _ in range(2)])
        )

    asyncio.run(run())
    processes.close()


PROGRAM = """
import asyncio, os, signal, sys
from verl.agents.processes.object_processes import ObjectProcesses

async def run():
    process = await ObjectProcesses(sys.argv[1] + ":Counter").open()
    pids = [process.pid, *[await process.call(name, timeout_s=20) for name in ("child", "daemon")]]
    hanging = asyncio.ensure_future(process.call("hangs", timeout_s=1000))
    await asyncio.sleep(0.05)
    parent = open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[1]
    print(*pids, parent, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")
def test_nothing_survives_a_trainer_that_is_killed(file):
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    pids = list(map(int, result.stdout.split()))
    assert len(pids) == 4
    for pid in pids:
        assert_gone(pid)
