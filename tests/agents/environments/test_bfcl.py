"""Episodes of the Berkeley Function Calling Leaderboard, whose own ground truth is right as a policy."""

from __future__ import annotations

import ast
import asyncio
import json

import pytest

from tests.agents.episodes.scripted import ScriptedEngine, chat_codec
from verl.agents.environments.adapters.bfcl_env import (
    BfclEnvironment,
    documents_of,
    schema_of,
    steps_of,
    written,
)
from verl.agents.environments.process_environments import build_environments
from verl.agents.episodes.driver import ToolLoop
from verl.agents.episodes.runner import EpisodeRunner
from verl.config.agent import AgentConfig
from verl.data.tasks.bfcl_tasks import CATEGORIES, bfcl_rows, entry_of, lines_of
from verl.utils.sampling_types import Prompt, SamplingParams

utils = pytest.importorskip(
    "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils", reason="needs bfcl-eval"
)


@pytest.fixture(scope="module")
def rows():
    return bfcl_rows("multi_turn", {})


@pytest.fixture(scope="module")
def truths():
    names = [f"possible_answer/BFCL_v4_{category}.json" for category in CATEGORIES]
    return {row["id"]: row["ground_truth"] for name in names for row in map(json.loads, lines_of(name))}


def as_call(code, row):
    """Name and arguments of a call of the ground truth."""
    call = ast.parse(code, mode="eval").body
    values = [ast.literal_eval(value) for value in call.args]
    names = []
    if values:
        entry = entry_of(f"BFCL_v4_{row['id'].rpartition('_')[0]}.json", row["id"])
        names = list(schema_of(documents_of(entry)[call.func.id])["function"]["parameters"]["properties"])
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return call.func.id, json.loads(json.dumps({**dict(zip(names, values, strict=False)), **named}))


def played(row, turns):
    """What an episode in this process gives."""
    environment = BfclEnvironment()
    environment.reset(row["id"], row["prompt"])
    for turn in turns:
        for code in turn:
            environment.call_tool(*as_call(code, row))
        answer = environment.step({})
    assert answer.is_over
    found = environment.get_reward()
    # Each episode has a process of its own, where these objects end with it.
    for name in [name for name in vars(utils) if name.endswith("_instance")]:
        delattr(utils, name)
    return found


def without_last_calls(turns, *, keep):
    """The same with a part of the calls of the last turn that has calls: all but one for -1, none for 0."""
    last = max(i for i, turn in enumerate(turns) if turn)
    return [turn[:keep] if i == last else turn for i, turn in enumerate(turns)]


def test_the_ground_truth_of_all_800_episodes_is_right(rows, truths):
    wrong = [row["id"] for row in rows if played(row, truths[row["id"]])["score"] != 1.0]
    assert (len(rows), wrong) == (800, [])


def test_traces_without_some_calls_are_wrong(rows, truths):
    for row in rows[::16]:
        truth = truths[row["id"]]
        assert played(row, [[] for _ in truth])["bfcl_fault"] == "multi_turn:empty_turn_model_response"
        assert played(row, without_last_calls(truth, keep=0))["score"] == 0.0
        assert played(row, without_last_calls(truth, keep=-1))["score"] == 0.0


def run_episode(row, texts, **config):
    """The trajectory of a policy that writes these texts."""
    codec = chat_codec()
    config = AgentConfig(environment={"name": "bfcl:multi_turn"}, max_turns=100, **config)
    environments = build_environments(config)
    try:
        runner = EpisodeRunner(ScriptedEngine(codec, texts), codec, config, driver=ToolLoop(environments))
        prompt = Prompt(row["prompt"], columns={"id": row["id"]})
        return asyncio.run(runner.run_group(prompt, SamplingParams(n=1, max_tokens=5000)))[0]
    finally:
        environments.close()


def texts_of(row, turns):
    """The turns of a policy that makes the calls of a turn at once, and then answers."""
    texts = []
    for turn in turns:
        calls = [dict(zip(("name", "arguments"), as_call(code, row), strict=True)) for code in turn]
        texts += ["".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)] if calls else []
        texts.append("Done.")
    return texts


@pytest.mark.parametrize("number", [0, 200, 400, 600])
def test_an_episode_over_tokens_and_processes_is_right(rows, truths, number):
    row = rows[number]
    trajectory = run_episode(row, texts_of(row, truths[row["id"]]))
    assert (trajectory.outcome, trajectory.episode.reward["score"]) == ("ok", 1.0)
    assert trajectory.episode.ending == "environment"
    asked = [message["content"] for message in trajectory.episode.messages if message["role"] == "user"]
    assert len(asked) == len(truths[row["id"]])
    assert ("I have updated some more functions" in "".join(asked)) == (number == 200)


@pytest.mark.environments
def test_all_800_episodes_over_tokens_and_processes_are_right(rows, truths):
    """The ground truth as a policy, eight episodes at a time, each with processes of its own."""
    codec = chat_codec()
    config = AgentConfig(environment={"name": "bfcl:multi_turn"}, max_turns=100, max_processes=8)
    environments = build_environments(config)

    async def score(row, slots):
        async with slots:
            engine = ScriptedEngine(codec, texts_of(row, truths[row["id"]]))
            runner = EpisodeRunner(engine, codec, config, driver=ToolLoop(environments))
            prompt = Prompt(row["prompt"], columns={"id": row["id"]})
            (trajectory,) = await runner.run_group(prompt, SamplingParams(n=1, max_tokens=50_000))
            return trajectory.outcome, (trajectory.episode.reward or {}).get("score")

    async def all_scores():
        slots = asyncio.Semaphore(8)
        return await asyncio.gather(*(score(row, slots) for row in rows))

    try:
        scores = asyncio.run(all_scores())
    finally:
        environments.close()
    assert scores == [("ok", 1.0)] * 800


def test_a_policy_that_says_nothing_or_runs_out_of_turns_is_wrong(rows, truths):
    row = rows[0]
    assert run_episode(row, ["Done."] * 9).episode.reward["score"] == 0.0
    looping = ['<tool_call>{"name": "ls", "arguments": {}}</tool_call>'] * 100
    trajectory = run_episode(row, looping, max_calls=30)
    assert trajectory.episode.ending == "max_calls"
    assert trajectory.episode.reward["bfcl_fault"] == "multi_turn:force_terminated"


def test_more_than_20_steps_in_a_turn_end_it_as_in_bfcl(rows, truths):
    first, *rest = truths[rows[0]["id"]]
    more = ['<tool_call>{"name": "pwd", "arguments": {}}</tool_call>'] * 18
    texts = texts_of(rows[0], [first, *rest])
    assert run_episode(rows[0], [*more, *texts]).episode.reward["score"] == 1.0
    reward = run_episode(rows[0], [*more, *more, *texts]).episode.reward
    assert (reward["score"], reward["bfcl_fault"]) == (0.0, "multi_turn:force_terminated")
    calls = [{"tool_calls": [1, 2]}, {"content": "a"}, {"tool_calls": [1]}, {"tool_calls": [1]}]
    assert steps_of(calls, [["f()"] * 2, [], ["f()"] * 2]) == [1, 0, 2]


def test_names_and_arguments_of_a_policy_are_no_code(rows, tmp_path):
    """bfcl evaluates calls as Python: nothing but a method of its tools with plain values gets there."""
    environment = BfclEnvironment()
    environment.reset(rows[0]["id"])
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for name, arguments in (
        ("__import__", {"name": "os"}),
        (code, {}),
        ("ls", {f"a={code}, b": True}),
        ("exit", {}),
        ("_load_scenario", {"scenario": {}}),
    ):
        assert "Error during execution" in environment.call_tool(name, arguments).text
    environment.call_tool("echo", {"content": f"' + {code} + '", "file_name": "a.txt"})
    assert not mark.exists()
    assert environment.get_reward()["score"] == 0.0
    assert ast.literal_eval(written("f", ["cd (x) \\("], {})[2:-1]) == "cd (x) \\("


def test_an_unknown_category_or_option_is_an_error():
    with pytest.raises(ValueError, match="need multi_turn or one of multi_turn_base"):
        BfclEnvironment("base")
    with pytest.raises(ValueError, match="has the option size alone, got seed"):
        bfcl_rows("multi_turn", {"seed": 1})
    assert len(bfcl_rows("multi_turn", {"size": 3})) == 12
