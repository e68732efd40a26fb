"""Output and exit codes of `verl ledger` and `verl doctor`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verl.cli.main import main
from verl.monitoring.ledger import LEDGER_FILE, Ledger
from verl.monitoring.wait_tracker import WaitTracker
from verl.monitoring.watchdog import Dependency, Watchdog


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two steps with every fate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    ledger = Ledger(tmp_path / "run" / LEDGER_FILE)
    for step in (1, 2):
        numbers = [ledger.dispatch(10 * step + i, version=step - 1) for i in range(4)]
        ledger.retry(numbers[0], "infrastructure", "engine b\x1b[2J died")
        ledger.complete(numbers[0], versions=(0, step - 1))
        ledger.train(numbers[0], step=step)
        ledger.drop(numbers[1], "straggler")
        ledger.fail(numbers[2], "reward", f"judge is down {step}")
        ledger.commit(step)
    return tmp_path / "run"


def shown(capsys, *command: str) -> tuple[int, str]:
    """Exit code and output of a command, without the lines of its tables."""
    code = main([*command])
    return code, "\n".join(
        " ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()
    )


def test_the_ledger_is_summed_up(run, capsys):
    code, output = shown(capsys, "ledger", "run")
    lines = [
        "8 groups dispatched, up to step 2",
        "trained on 2 25.0%",
        "being answered 2 25.0%",
        "dropped: straggler 2 25.0%",
    ]
    lines += [
        "failed: reward 2 25.0%",
        "retried after: infrastructure 2",
        "last failure, reward: judge is down 2",
        "last retry, infrastructure: engine b",
    ]
    lines += ["oldest token of a group trained on: 0.50 versions behind, at most 1", "2 4 1 1 1 1 2 0"]
    assert code == 0 and [line for line in lines if line not in output] == []
    assert output.endswith("every group is there once, and the sums are right") and "\x1b[2J" not in output


def test_groups_that_are_missing_or_twice_are_named(run, capsys):
    text = (run / LEDGER_FILE).read_text()
    (run / LEDGER_FILE).write_text(text.replace('{"group": 5,', '{"group": 6,'))
    code, output = shown(capsys, "ledger", "run")
    assert code == 1 and output.endswith(
        "missing: 1 groups: 5\ntwice: 1 groups: 6\nthe ledger does not add up"
    )
    assert shown(capsys, "ledger", "run", "--group", "5") == (
        1,
        "group 5: missing: nothing is recorded of it",
    )
    code, output = shown(capsys, "ledger", "run", "--group", "6")
    assert code == 1 and output.count("group 6: prompt 2") == 2


def test_one_group_is_described_in_a_line(run, capsys):
    trained = "prompt 20, trained in step 2, 2 attempts, sampled by versions 0 to 1, "
    trained += "1 x infrastructure: engine b [2J died"
    assert shown(capsys, "ledger", "run", "--group", "4") == (0, f"group 4: {trained}")
    failed = "group 2: prompt 12, failed (reward: judge is down 1) in step 1, 1 attempt"
    assert shown(capsys, "ledger", "run", "--group", "2") == (0, failed)
    assert shown(capsys, "ledger", "run", "--group", "7") == (0, "group 7: answering, as of step 2")


def test_an_incomplete_commit_is_reported(run, capsys):
    (run / LEDGER_FILE).write_bytes((run / LEDGER_FILE).read_bytes()[:-10])
    code, output = shown(capsys, "ledger", "run")
    assert code == 0 and "up to step 1" in output and "4 lines at the end are not counted" in output


def test_a_group_of_a_run_that_resumed_in_another_folder_is_reported(run, capsys):
    other = Ledger(Path("other") / LEDGER_FILE)
    state = Ledger(run / LEDGER_FILE)
    state.dispatch(5, version=0)
    state.drop(0, "dead")
    state.commit(1)
    other.load_state_dict(state.state_dict())
    other.commit(2)
    code, output = shown(capsys, "ledger", "other")
    assert code == 0 and "1 groups ended before this file begins" in output
    assert shown(capsys, "ledger", "other", "--group", "0") == (0, "group 0: ended before this file begins")


def test_the_doctor_shows_stages_and_parts_and_the_likely_cause(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    waits = WaitTracker()
    parts = (Dependency("engine a", "serving"), Dependency("engine b", "failed", "out of memory"))
    with (
        waits.track("training", "a batch", limit_s=90),
        Watchdog(waits, Path("run"), 1800, dependencies=lambda: parts),
    ):
        code, output = shown(capsys, "doctor", "run")
    assert (
        code == 0
        and "training a batch 0.0 s 90 s 0.0 s ago" in output
        and "engine b failed out of memory" in output
    )
    assert (
        output.splitlines()[-1]
        == "likely cause: engine b is failed: out of memory; training has to wait for the others"
    )
    code, output = shown(capsys, "doctor", "run")
    assert (
        code == 0 and output.startswith("run: finished") and output.endswith("likely cause: nothing is wrong")
    )


def test_a_run_that_was_killed_is_found_to_be_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = """
import os, signal
from pathlib import Path
from verl.monitoring.wait_tracker import WaitTracker
from verl.monitoring.watchdog import Watchdog
with Watchdog(WaitTracker(), Path("run"), 1800):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{code}"]
    )
    code, output = shown(capsys, "doctor", "run")
    assert (
        code == 1
        and "is gone without a final record" in output
        and "it was killed, by a scheduler or because memory ran out" in output
    )


@pytest.mark.parametrize(
    "command", [["ledger", "nowhere"], ["doctor", "nowhere"], ["ledger", "run", "--group", "8"]]
)
def test_what_cannot_be_found_is_one_clear_message(command, run, capsys):
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(
        ("verl: need the output_dir of a run", "verl: need a group from 0 to 7, got 8")
    )


@pytest.mark.parametrize("command", ["ledger", "doctor"])
def test_a_run_is_asked_about_without_loading_a_model_library(command):
    program = f"import sys; from verl.cli.main import main; main(['{command}', 'nowhere'])\n"
    program += "print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.splitlines()[-1] == "False"
