"""Functions and commands as agents, in processes of their own: rewards, failures, limits, safety."""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents.episodes.scripted import CALL, chat_codec, play
from tests.agents.programs.agents import sampled_texts
from verl.agents.programs.program_driver import ProgramDriver
from verl.config.agent import AgentConfig

SOLVE = """
import os, sys, time

def ask(client, text="2+3?"):
    return client.chat.completions.create(model="policy", messages=[{"role": "user", "content": text}])

async def solve(task, client):
    answer = await ask(client, task["prompt"][-1]["content"])
    return {"reward": float(answer.choices[0].message.content == "5"), "seeds": task["seed"]}

def plain(task, client):
    return len(ask(client).choices[0].message.content)

def nothing(task, client):
    ask(client)

def silent(task, client):
    return 1.0

def raising(task, client):
    raise KeyError("column")

def dying(task, client):
    os._exit(7)

def hanging(task, client):
    ask(client)
    time.sleep(1e6)

def forever(task, client):
    while True:
        ask(client)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("programs") / "my_agent.py"
    path.write_text(SOLVE)
    return path


@pytest.fixture
def played() -> Iterator:
    drivers = []

    def run(program, texts=("5",) * 9, **settings):
        config = AgentConfig.model_validate({"program": program, "max_processes": 2, **settings})
        drivers.append(ProgramDriver(config, chat_codec()))
        (trajectory,), engine = play(list(texts), driver=drivers[-1], **settings)
        return trajectory, engine

    yield run
    for driver in drivers:
        driver.close()


def test_a_function_gets_the_row_and_a_client_and_its_reward_is_that_of_the_episode(played, file):
    trajectory, engine = played(f"{file}:solve")
    assert (trajectory.outcome, trajectory.episode.ending) == ("ok", "answer")
    assert trajectory.episode.reward == {"reward": 1.0, "seeds": 7}
    assert sampled_texts(trajectory, engine) == [["5<|im_end|>"]]


FAILURES = [
    ("silent", {}, "environment_error", "without a request"),
    ("raising", {}, "environment_error", "KeyError: 'column' .*my_agent.py:"),
    ("dying", {}, "environment_crash", "exit code 7"),
    ("forever", {"max_turns": 2}, "episode_max_turns", "BadRequestError"),
    ("hanging", {"timeout_s": 3.0}, "episode_timeout", ""),
]


@pytest.mark.parametrize(("name", "settings", "outcome", "detail"), FAILURES, ids=lambda v: str(v)[:9])
def test_a_function_that_fails_is_a_named_outcome(played, file, name, settings, outcome, detail):
    trajectory, _ = played(f"{file}:{name}", **settings)
    assert trajectory.outcome == outcome
    assert re.search(detail, trajectory.detail), trajectory.detail


def test_a_function_may_be_plain_and_may_leave_the_reward_to_functions(played, file):
    assert played(f"{file}:plain", ["abc"])[0].episode.reward == 3
    trajectory, _ = played(f"{file}:nothing")
    assert trajectory.episode.reward is None and trajectory.outcome == "ok"


def test_a_function_object_is_sent_by_value(played):
    wanted = "5"

    async def solve(task, client):
        completion = await client.completions.create(model="policy", prompt="2+3=", max_tokens=1)
        return float(completion.choices[0].text == wanted)

    config = AgentConfig(max_processes=1)
    driver = ProgramDriver(config, chat_codec(), given=solve)
    try:
        driver.check_data([])
        (trajectory,), _ = play(["5"], driver=driver)
    finally:
        driver.close()
    assert trajectory.episode.reward == 1.0


def test_a_function_that_cannot_be_loaded_ends_the_run_at_its_start(file):
    driver = ProgramDriver(AgentConfig(program=f"{file}:slove"), chat_codec())
    with pytest.raises(ValueError, match="did you mean 'solve'"):
        driver.check_data([])
    driver.close()
    driver = ProgramDriver(AgentConfig(program=("no-such-program",)), chat_codec())
    with pytest.raises(ValueError, match="'no-such-program'"):
        driver.check_data([])
    driver.close()


SHELL = """
ask() {
    curl -sf "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $OPENAI_API_KEY" \\
        -H "Content-Type: application/json" -d "{\\"model\\": \\"$OPENAI_MODEL\\", \\"messages\\": $1}"
}
"""


def test_a_shell_script_with_curl_is_an_agent(played, tmp_path, monkeypatch):
    # A proxy of the environment must not get the key of the episode.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    script = tmp_path / "agent.sh"
    script.write_text(
        SHELL
        + textwrap.dedent(
            """
            first='{"role": "user", "content": "2+3?"}'
            answer=$(ask "[$first]" | python -c '
            import json, sys
            print(json.dumps(json.load(sys.stdin)["choices"][0]["message"]))')
            ask "[$first, $answer, {\\"role\\": \\"user\\", \\"content\\": \\"sure?\\"}]" > last.json
            test -s task.json && echo "$TASK_JSON" | grep -q '"answer"' && grep -q yes last.json
            echo "some log"
            echo '{"reward": 0.5}'
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    trajectory, engine = played(["sh", "-e", "agent.sh"], ["5", "yes"])
    assert (trajectory.outcome, trajectory.detail) == ("ok", "")
    assert trajectory.episode.reward == {"reward": 0.5}
    assert sampled_texts(trajectory, engine) == [["5<|im_end|>", "yes<|im_end|>"]]
    assert os.listdir(tmp_path) == ["agent.sh"]  # it ran in a folder of its own


COMMANDS = [
    ("echo lost >&2; exit 3", "environment_error", "ended with exit code 3.*\nlost"),
    ("kill -9 $$", "environment_crash", "SIGKILL"),
    ("yes", "environment_error", "more than 16 MiB"),
]


@pytest.mark.parametrize(("script", "outcome", "detail"), COMMANDS, ids=["exit", "kill", "flood"])
def test_a_command_that_fails_is_a_named_outcome(played, script, outcome, detail):
    trajectory, _ = played(["sh", "-c", script])
    assert trajectory.outcome == outcome
    assert re.search(detail, trajectory.detail), trajectory.detail


def test_a_command_is_killed_with_its_children_at_the_limit(played, tmp_path):
    script = SHELL + 'ask \'[{"role": "user", "content": "hi"}]\'; sleep 1000 & echo $! > $0; wait'
    pid = tmp_path / "pid"
    trajectory, _ = played(["sh", "-c", script, str(pid)], timeout_s=3.0)
    assert trajectory.outcome == "episode_timeout"
    for _ in range(100):
        if not Path(f"/proc/{pid.read_text().strip()}").exists():
            break
        time.sleep(0.02)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_calls_are_not_needed_for_a_turn_with_them(played, file):
    trajectory, _ = played(f"{file}:solve", [CALL])
    assert trajectory.episode.reward["reward"] == 0.0
