"""Calls that hang, die or damage their process: each costs its own answer, and the trainer nothing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from verl.config.data import RewardsConfig
from verl.data.trajectory import Trajectory
from verl.rewards.execution.call_pool import CallPool, RewardCall
from verl.rewards.execution.isolation import Callee, isolated
from verl.rewards.functions import build_rewards
from verl.utils.sampling_types import Prompt

# Functions of a user's file: what the text of an answer says, they do.
FILE = """
import asyncio, ctypes, os, re, signal, subprocess, sys, threading, time

loaded = os.getpid()
held = []

class Unpicklable(Exception):
    __module__ = "users"

    def __init__(self, a, b):
        super().__init__(a)
        self.lock = threading.Lock()

def dies_or_hangs(response):
    if response == "endless regex":
        re.match("(a+)+$", "a" * 60 + "b")
    elif response == "endless loop":
        while True:
            pass
    elif response == "endless loop that shrugs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                pass
    elif response == "endless C":  # PyDLL keeps the GIL
        ctypes.PyDLL(None).pause()
    elif response == "os._exit":
        os._exit(0)
    elif response == "sys.exit":
        sys.exit(0)
    elif response == "segfault":
        ctypes.string_at(0)
    elif response == "abort":
        os.abort()
    elif response == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif response == "memory error":
        bytearray(1 << 60)
    elif response == "closes everything":
        os.closerange(3, 1000)
    elif response == "interrupt":
        raise KeyboardInterrupt
    elif response == "unpicklable exception":
        raise Unpicklable(1, 2)
    elif response == "unpicklable result":
        return threading.Lock()
    elif response == "recursion":
        return dies_or_hangs(response)
    return float(len(response))

def plain(prompt, response):
    return dies_or_hangs(response)

async def coroutine(prompt, response):
    await asyncio.sleep(0.01)
    return dies_or_hangs(response)

async def swallows(prompt, response):
    while response == "bad":
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass
    return 1.0

async def blocks_in_a_task(prompt, response):
    (value,) = await asyncio.gather(coroutine(prompt, response))
    return value

def damages(prompts, completions):
    os.chdir("/")
    import torch
    torch.set_default_dtype(torch.float64)
    prompts.clear()
    completions[0] = "changed"
    os.environ["HOME"] = "/nowhere"
    sys.path.clear()
    return [1.0, 2.0]

def prints(prompt, response):
    for _ in range(20_000):
        print("x" * 100)
    return 1.0

def sits_in_process(prompt, response):
    return os.getpid()

def leaves_a_process(prompt, response):
    child = subprocess.Popen(["sleep", "1000"])
    with open(response, "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)
"""
DEATHS = {
    "endless regex": ("reward_timeout", "no answer within 0.5 s"),
    "endless loop": ("reward_timeout", "no answer within 0.5 s"),
    "endless loop that shrugs": ("reward_timeout", "no answer within 0.5 s"),
    "endless C": ("reward_timeout", "no answer within 0.5 s"),
    "os._exit": ("reward_crash", "its process ended with exit code 0"),
    "sys.exit": ("reward_error", "SystemExit: 0"),
    "segfault": ("reward_crash", "its process was killed by SIGSEGV"),
    "abort": ("reward_crash", "its process was killed by SIGABRT"),
    "killed": ("reward_crash", "its process was killed by SIGKILL, maybe for lack of memory"),
    "memory error": ("reward_error", "MemoryError"),
    "interrupt": ("reward_error", "KeyboardInterrupt"),
    "unpicklable exception": ("reward_error", "users.Unpicklable: 1"),
    "unpicklable result": ("reward_wrong_type", "need a number, got lock"),
    "recursion": ("reward_error", "RecursionError"),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "users.py"
    path.write_text(FILE)
    return path


def rewards_of(file, *names, timeout_s=0.5, **settings):
    functions = [f"{file}:{name}" for name in names]
    return build_rewards(
        RewardsConfig(functions=functions, timeout_s=timeout_s, max_failed_share=1.0, **settings)
    )


def assert_gone(pid):
    """Its parent may be a process that takes no note of its end."""
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] in "ZX":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def rows(*texts):
    return [Trajectory(Prompt("q"), [1], [5, 6], [True, True], None, [0, 0], 0, text=text) for text in texts]


@pytest.mark.parametrize("function", ["plain", "coroutine"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_call_that_hangs_or_dies_is_named_and_its_neighbours_are_computed(file, function, death):
    trajectories = rows("a", death, "bc", *["def"] * 30)
    rewards_of(file, function).score(trajectories)
    outcome, detail = DEATHS[death]
    assert trajectories[1].reward is None
    assert (trajectories[1].outcome, trajectories[1].detail[: len(function) + 2 + len(detail)]) == (
        outcome,
        f"{function}: {detail}",
    )
    assert [t.reward for t in trajectories if t is not trajectories[1]] == [1.0, 2.0, *[3.0] * 30]


def test_a_call_that_closes_its_connection_is_named(file):
    trajectories = rows("closes everything", "a")
    rewards_of(file, "plain").score(trajectories)
    assert trajectories[0].outcome == "reward_crash" and trajectories[1].reward == 1.0


@pytest.mark.parametrize("function", ["plain", "coroutine"])
def test_three_of_two_hundred_calls_hang_and_as_many_workers_are_killed(file, function, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    trajectories = rows(*["good"] * 200)
    for i in (20, 100, 180):
        trajectories[i].text = "endless regex"
    functions = rewards_of(file, function)
    functions.score(trajectories)
    assert [i for i, t in enumerate(trajectories) if t.outcome == "reward_timeout"] == [20, 100, 180]
    assert [t.reward for t in trajectories if t.outcome == "ok"] == [4.0] * 197
    killed = [process.returncode for process in started].count(-signal.SIGKILL)
    most = 1 if function == "coroutine" else min(max(os.cpu_count(), 2), 8)
    assert killed == 3 and len(started) <= most + 3
    functions.close()
    assert {process.wait(10) for process in started} == {-signal.SIGKILL}


def test_a_coroutine_that_swallows_its_cancellation_fails_alone(file):
    trajectories = rows("bad", *["good"] * 20)
    functions = rewards_of(file, "swallows")
    functions.score(trajectories)
    assert [t.outcome for t in trajectories] == ["reward_timeout", *["ok"] * 20]
    functions.score(again := rows("good"))
    assert again[0].reward == 1.0


def test_a_task_of_a_coroutine_that_blocks_is_killed_too(file):
    trajectories = rows("endless loop")
    functions = rewards_of(file, "blocks_in_a_task")
    functions.score(trajectories)
    assert trajectories[0].outcome == "reward_timeout" and "held the event loop" in trajectories[0].detail
    functions.score(again := rows("good"))
    assert again[0].reward == 4.0


def test_a_function_cannot_change_the_trainer(file):
    before = os.getcwd(), torch.get_default_dtype(), os.environ.get("HOME"), list(sys.path)
    trajectories = rows("a", "b")
    rewards_of(file, "damages", timeout_s=60).score(trajectories)
    assert [t.reward for t in trajectories] == [1.0, 2.0]
    assert (os.getcwd(), torch.get_default_dtype(), os.environ.get("HOME"), list(sys.path)) == before
    assert [(t.prompt.content, t.text) for t in trajectories] == [("q", "a"), ("q", "b")]


def test_a_flood_of_prints_comes_through(file, capfd):
    trajectories = rows("a", "b")
    functions = rewards_of(file, "prints", timeout_s=60)
    functions.score(trajectories)
    assert [t.reward for t in trajectories] == [1.0, 1.0]
    out = capfd.readouterr().out
    assert (out.count("x"), out.count("\n")) == (4_000_000, 40_000)


def test_a_killed_call_takes_its_own_processes_with_it(file, tmp_path):
    trajectories = rows(str(tmp_path / "pid"))
    rewards_of(file, "leaves_a_process", timeout_s=1.0).score(trajectories)
    assert trajectories[0].outcome == "reward_timeout"
    child = int((tmp_path / "pid").read_text())
    assert_gone(child)


def test_functions_that_only_the_settings_name_run_in_few_processes_which_live_on(file):
    functions = rewards_of(file, "sits_in_process", timeout_s=30)
    pids = set()
    for _ in range(4):
        functions.score(trajectories := rows(*["x"] * 50))
        pids |= {t.reward for t in trajectories}
    assert os.getpid() not in pids and len(pids) <= min(max(os.cpu_count(), 2), 8)


def test_a_setting_runs_them_in_the_trainer(file):
    rewards_of(file, "sits_in_process", isolation="thread").score(trajectories := rows("x"))
    assert trajectories[0].reward == os.getpid()


def test_what_a_function_notes_in_the_program_is_there():
    noted, notes = [], []
    functions = build_rewards(
        RewardsConfig(), lambda prompt, response: noted.append(response) or 1.0, note=notes.append
    )
    functions.score(rows("a", "b"))
    assert sorted(noted) == ["a", "b"]
    assert len(notes) == 1 and notes[0].startswith("reward function lambda: it runs on a thread")


def test_a_function_that_a_process_cannot_load_runs_on_a_thread_and_says_why(monkeypatch):
    module = type(sys)("only_in_this_process")
    exec("def f(prompt, response): return 7.0", vars(module))
    monkeypatch.setitem(sys.modules, "only_in_this_process", module)
    notes = []
    functions = build_rewards(RewardsConfig(), module.f, note=notes.append)
    functions.score(trajectories := rows(*"abc"))
    assert [t.reward for t in trajectories] == [7.0] * 3
    assert len(notes) == 1 and "cannot be loaded in another process (ModuleNotFoundError" in notes[0]


def test_an_argument_that_cannot_be_sent_fails_its_row_and_says_why():
    trajectories = rows("a", "b")
    trajectories[0].prompt.columns["lock"] = threading.Lock()
    trajectories[1].prompt.columns["lock"] = 1
    build_rewards(RewardsConfig(), lambda prompt, response, lock: 1.0).attempt(trajectories)
    assert trajectories[0].outcome == "reward_error" and "cannot be sent" in trajectories[0].detail
    assert trajectories[1].reward == 1.0


def test_a_pool_that_nobody_holds_ends_its_processes():
    functions = build_rewards(RewardsConfig(), lambda prompt, response: os.getpid())
    functions.score(trajectories := rows("x"))
    pid = int(trajectories[0].reward)
    os.kill(pid, 0)
    del functions
    gc.collect()
    assert_gone(pid)


SCRIPT = """
import os, sys
from verl.config.data import RewardsConfig
from verl.data.trajectory import Trajectory
from verl.rewards.functions import build_rewards
from verl.utils.sampling_types import Prompt

print("the script runs")

def pid(prompt, response):
    while response == "hang":
        pass
    print(os.getpid(), flush=True)
    return os.getpid() != {own}

functions = build_rewards(RewardsConfig(timeout_s=100), pid)
row = Trajectory(Prompt("q"), [1], [5], [True], None, [0], 0, text="x")
functions.score([row])
print(row.outcome, row.reward)
{then}
"""


def test_a_script_without_a_guard_runs_once_and_leaves_no_process():
    program = SCRIPT.format(own="0", then="")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    script, pid, outcome = done.stdout.split("\n")[:3]
    assert (done.returncode, done.stderr, script, outcome) == (0, "", "the script runs", "ok 1.0")
    assert_gone(pid)


def test_a_killed_trainer_takes_a_hanging_call_with_it():
    then = "row.reward, row.text = None, 'hang'\nfunctions.attempt([row])"
    trainer = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(own="0", then=then)], stdout=subprocess.PIPE, text=True
    )
    pid = [trainer.stdout.readline() for _ in range(2)][1].strip()
    trainer.stdout.readline()
    time.sleep(0.5)
    assert os.path.exists(f"/proc/{pid}")
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert_gone(pid)


PROGRAM = """
import re
from verl.rewards.execution.call_pool import CallPool, RewardCall
from verl.rewards.execution.isolation import Callee

def endless_expression():
    return re.match("(a+)+$", "a" * 60 + "b")

CallPool(timeout_s=0.2).run([RewardCall("endless", Callee(endless_expression, False, "thread"))])
"""


def test_a_call_on_a_thread_that_never_gives_the_gil_back_ends_the_trainer_and_shows_where_it_is():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr and "endless_expression" in ended.stderr


def test_a_worker_that_dies_before_its_call_begins_is_tried_twice():
    class Dies:
        def __reduce__(self):
            return os._exit, (3,)

    call = RewardCall("f", isolated(lambda argument: 1.0, is_async=False), Dies())
    CallPool(timeout_s=5).run([call])
    assert (call.result.outcome, call.num_starts) == ("reward_crash", 2)
    assert call.result.detail == "its process ended with exit code 3"


def test_a_pure_function_of_our_own_runs_where_it_is_asked_for():
    call = RewardCall("f", Callee(threading.get_ident, False, "inline"))
    CallPool(timeout_s=5).run([call])
    assert call.result == threading.get_ident()
