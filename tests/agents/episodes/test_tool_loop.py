import asyncio

import pytest

from tests.agents.episodes.scripted import (
    CALL,
    AddSession,
    AddTools,
    Dialogue,
    ScriptedEngine,
    chat_codec,
    play,
)
from verl.agents.environments.session import EpisodeFailure, ToolResult
from verl.agents.episodes.runner import EpisodeRunner
from verl.config.agent import AgentConfig
from verl.utils.sampling_types import Prompt, SamplingParams

CODEC = chat_codec()


def runs(trajectory) -> list[tuple[bool, str]]:
    """Runs of equal mask, as text with special tokens."""
    found: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(trajectory.response_ids, trajectory.response_mask, strict=True):
        if not found or found[-1][0] != sampled:
            found.append((sampled, []))
        found[-1][1].append(token)
    return [(sampled, CODEC.decode_all(ids)) for sampled, ids in found]


def test_a_call_is_answered_and_only_what_the_policy_wrote_is_trained_on():
    (trajectory,), engine = play([CALL, "it is 5"])
    assert runs(trajectory) == [
        (True, f"{CALL}<|im_end|>"),
        (False, "\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n"),
        (True, "it is 5<|im_end|>"),
    ]
    assert trajectory.text == "it is 5" and trajectory.episode.ending == "answer"
    assert [m["role"] for m in trajectory.episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert trajectory.episode.counts["turns"] == 2 and trajectory.episode.counts["calls"] == 1


def test_each_request_is_the_tape_so_far():
    (trajectory,), engine = play([CALL, CALL, "done"])
    tape = [*trajectory.prompt_ids, *trajectory.response_ids]
    for ids, _ in engine.requests:
        assert tape[: len(ids)] == ids


def test_turns_have_random_numbers_and_versions_of_their_own():
    (first, second), engine = play([CALL, "5"], samples=2)
    numbers = [params.sample_index for _, params in engine.requests]
    assert len(set(numbers)) == 4 and {params.seed for _, params in engine.requests} == {7}
    assert first.versions[0] == 0 and first.versions[-1] == 1
    assert len(first.versions) == len(first.response_ids) == len(first.rollout_logprobs)


def test_a_turn_that_is_cut_ends_the_episode_as_nothing_may_follow_it():
    (trajectory,), engine = play(["it is...", "never asked"])
    assert trajectory.truncated and trajectory.episode.ending == "max_tokens" and len(engine.requests) == 1


@pytest.mark.parametrize(
    ("settings", "ending", "requests"),
    [
        ({"max_turns": 3}, "max_turns", 3),
        ({"max_calls": 2}, "max_calls", 3),
        ({"max_tokens": 150}, "max_tokens", 2),
    ],
)
def test_an_endless_loop_of_calls_ends_at_a_limit(settings, ending, requests):
    (trajectory,), engine = play(lambda _: CALL, **settings)
    assert trajectory.episode.ending == ending and len(engine.requests) == requests
    assert trajectory.outcome == "ok"


def test_the_context_of_the_model_is_a_limit_too():
    (trajectory,), engine = play(lambda _: CALL, context=200)
    assert trajectory.episode.ending == "max_tokens" and trajectory.truncated
    assert all(len(ids) + params.max_tokens <= 200 for ids, params in engine.requests)


def test_a_result_longer_than_the_context_ends_the_episode_and_is_not_trained_on():
    class Flooding(AddSession):
        async def call(self, calls):
            return [ToolResult("x" * 500)]

    (trajectory,), _ = play([CALL, "never asked"], AddTools(Flooding), context=400)
    assert trajectory.episode.ending == "max_tokens" and all(trajectory.response_mask)
    assert len(trajectory.prompt_ids) + len(trajectory.response_ids) <= 400


def test_a_prompt_that_leaves_no_room_has_an_outcome_of_its_own():
    (trajectory,), engine = play(["5"], context=20)
    assert trajectory.outcome == "episode_no_answer" and not engine.requests


def test_malformed_calls_are_told_counted_and_limited():
    (trajectory,), engine = play(lambda _: "<tool_call>{oops</tool_call>", max_bad_calls=2)
    assert trajectory.episode.ending == "bad_calls" and len(engine.requests) == 2
    assert "cannot be read" in CODEC.decode_all(engine.requests[1][0])
    assert trajectory.episode.counts["bad_calls"] == 2


def test_an_unknown_tool_is_told_and_counted():
    (trajectory,), _ = play(['<tool_call>{"name": "sub"}</tool_call>', "ok"])
    assert trajectory.episode.counts["calls_unknown_tool"] == 1
    assert "there is no tool sub" in trajectory.episode.messages[2]["content"]


def test_an_environment_talks_rewards_turns_and_ends():
    (trajectory,), engine = play(["a", "b"], AddTools(Dialogue))
    record = trajectory.episode
    assert record.ending == "environment" and len(engine.requests) == 2
    assert record.turn_rewards == [1.0, 1.0] and record.reward == {"reward": 0.5, "won": 1.0}


@pytest.mark.parametrize("treatment", ["fail", "reward"])
def test_the_treatment_of_an_ending_is_a_choice(treatment):
    (trajectory,), _ = play(lambda _: CALL, max_turns=2, endings={"max_turns": treatment})
    assert trajectory.outcome == ("episode_max_turns" if treatment == "fail" else "ok")


class Dying(AddSession):
    async def call(self, calls):
        if self.start.number == 1:
            raise EpisodeFailure("environment_crash", "its process died")
        return await super().call(calls)


def test_an_environment_that_dies_costs_its_own_episode_alone():
    environments = AddTools(Dying)
    trajectories, _ = play([CALL, "5"], environments, samples=3)
    assert [t.outcome for t in trajectories] == ["ok", "environment_crash", "ok"]
    assert trajectories[1].detail == "its process died"
    assert [session.num_closed for session in environments.sessions] == [1, 1, 1]


class Hanging(AddSession):
    async def call(self, calls):
        if self.start.number == 0:
            await asyncio.Event().wait()
        return await super().call(calls)


def test_an_episode_has_a_time_limit_and_its_session_is_closed():
    environments = AddTools(Hanging)
    trajectories, _ = play([CALL, "5"], environments, samples=2, timeout_s=0.05)
    assert [t.outcome for t in trajectories] == ["episode_timeout", "ok"]
    assert [session.num_closed for session in environments.sessions] == [1, 1]


def test_siblings_start_with_the_same_seed():
    environments = AddTools()
    play(["5"], environments, samples=3)
    assert {session.start.seed for session in environments.sessions} == {7}
    assert [session.start.number for session in environments.sessions] == [0, 1, 2]


def test_a_single_answer_is_an_episode_of_one_turn():
    engine = ScriptedEngine(CODEC, ["it is 5"])
    runner = EpisodeRunner(engine, CODEC, AgentConfig())
    prompt = Prompt([{"role": "user", "content": "2+3?"}])
    (trajectory,) = asyncio.run(runner.run_group(prompt, SamplingParams()))
    assert trajectory.text == "it is 5" and trajectory.episode is None and all(trajectory.response_mask)
