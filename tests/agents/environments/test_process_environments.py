"""Environments of users in processes of their own: the contract, and every way to fail."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.agents.environments import games
from verl.agents.environments.process_environments import build_environments
from verl.agents.environments.process_sessions import without_middle
from verl.agents.environments.session import EpisodeFailure, EpisodeStart
from verl.config.agent import AgentConfig
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ToolCall

GAMES = str(Path(__file__).with_name("games.py"))
ROW = Prompt([{"role": "user", "content": "Play."}], answer="x", columns={"low": 5})


def made(name=None, given=None, **settings):
    options = settings.pop("options", {})
    environment = None if name is None else {"name": f"{GAMES}:{name}", **options}
    return build_environments(AgentConfig(environment=environment, **settings), given)


@pytest.fixture(scope="module")
def guess():
    environments = made("Guess")
    yield environments
    environments.close()


@pytest.fixture(scope="module")
def talk():
    environments = made("Talk", call_timeout_s=0.2)
    yield environments
    environments.close()


def played(environments, play, prompt=ROW, seed=1, number=0):
    async def episode():
        session = await environments.open(EpisodeStart(prompt, seed, number))
        try:
            return await play(session)
        finally:
            await session.close()

    return asyncio.run(episode())


def call(name, **arguments):
    return ToolCall(name, arguments, "c")


async def start_of(session):
    (message,) = await session.reset()
    (result,) = await session.call([call("tell")])
    return message["content"], result.text


def test_public_methods_are_tools_and_reset_gets_the_columns(guess):
    async def play(session):
        first = await session.reset()
        names = [schema["function"]["name"] for schema in session.schemas]
        return first, names, session.steps

    first, names, steps = played(guess, play)
    assert first == [{"role": "user", "content": " Guess a number from 5 to 100."}]
    assert sorted(names) == ["fail", "guess", "lose", "tell"] and not steps


def test_siblings_start_in_the_same_state_and_others_do_not(guess):
    starts = {
        (seed, number): played(guess, start_of, seed=seed, number=number)
        for seed in (1, 2)
        for number in (0, 1)
    }
    assert starts[1, 0] == starts[1, 1] != starts[2, 0] == starts[2, 1]


def test_a_row_with_a_seed_of_its_own_has_it(guess):
    row = Prompt("", columns={"seed": 7})
    assert played(guess, start_of, row, seed=1) == played(guess, start_of, row, seed=2)


def test_calls_have_results_rewards_and_an_end(guess):
    async def play(session):
        await session.reset()
        (told,) = await session.call([call("tell")])
        right = int(told.text)
        results = await session.call(
            [call("guess", number=right + 1), call("guess", number=right), call("tell")]
        )
        return results, session.is_over, await session.reward()

    (wrong, right, late), is_over, reward = played(guess, play)
    assert (wrong.text, wrong.reward, right.text, right.reward) == ("wrong", -0.1, "right", 1.0)
    assert is_over and late.outcome == "error" and "over" in late.text
    assert reward == {"reward": 0.5, "guesses": 2.0}


def test_faults_of_calls_are_told_to_the_policy(guess):
    async def play(session):
        await session.reset()
        return await session.call([call("gues"), call("guess"), call("fail"), call("_private")])

    unknown, bad, failed, private = played(guess, play)
    assert (unknown.outcome, bad.outcome, failed.outcome) == ("unknown_tool", "bad_arguments", "error")
    assert "guess" in unknown.text and "number" in bad.text
    assert failed.text == "Error: KeyError: 'game over'" and "games.py" in failed.detail
    assert private.outcome == "unknown_tool"


def test_a_tool_of_an_environment_that_is_lost_fails_the_episode(guess):
    async def play(session):
        await session.reset()
        return await session.call([call("lose")])

    with pytest.raises(EpisodeFailure, match="lose: .*the board is gone") as caught:
        played(guess, play)
    assert caught.value.outcome == "environment_error"


def test_options_make_the_environment():
    environments = made("make_guess", options={"most": 3})
    try:
        assert played(environments, start_of, Prompt(""))[0] == " Guess a number from 1 to 3."
    finally:
        environments.close()


def test_a_turn_is_answered_until_the_environment_says_nothing(talk):
    async def play(session):
        assert await session.reset() == []
        first = await session.step({"role": "assistant", "content": "hi"})
        over = await session.step({"role": "assistant", "content": "bye"})
        session.conversation = [{"role": "user", "content": "Play."}] * 3
        return first.messages, over.messages, session.is_over, await session.reward()

    assert played(talk, play) == ([{"role": "user", "content": "you said hi"}], (), True, 3.0)


@pytest.mark.parametrize("place", ["reset", "step", "get_reward"])
@pytest.mark.parametrize(
    ("fault", "outcome", "detail"),
    [
        ("raises", "environment_error", "lost the board"),
        ("hangs", "environment_timeout", "no result within 0.2 s"),
        ("dies", "environment_crash", "3"),
        ("eats", "environment_crash", "SIGKILL"),
    ],
)
def test_a_failure_has_a_name_and_a_cause_and_neighbours_play_on(talk, place, fault, outcome, detail):
    async def play(session):
        await session.reset()
        await session.step({"role": "assistant", "content": "hi"})
        return await session.reward()

    async def both():
        return await asyncio.gather(
            *(asyncio.to_thread(played, talk, play, Prompt("", columns={"fault": one})) for one in faults),
            return_exceptions=True,
        )

    faults = [f"{fault} in {place}", ""]
    failure, neighbour = asyncio.run(both())
    assert neighbour == 0.0
    assert isinstance(failure, EpisodeFailure) and failure.outcome == outcome
    assert detail in failure.detail and place in failure.detail


def test_a_flood_is_cut():
    environments = made("Flood", max_result_chars=1000)

    async def play(session):
        await session.reset()
        return (await session.step({"role": "assistant", "content": "hi"})).messages

    try:
        (message,) = played(environments, play)
        assert len(message["content"]) < 1100
        assert message["content"].startswith("aaa") and message["content"].endswith("bbb")
    finally:
        environments.close()
    assert without_middle("abcdef", 4) == "ab\n... 2 characters left out ...\nef"


def test_a_step_may_return_texts_rewards_messages_and_metrics():
    environments = made("Wordy")

    async def play(session):
        await session.reset()
        return [await session.step({"role": "assistant", "content": ""}) for _ in games.Wordy.answers]

    try:
        first, second, third, last = played(environments, play)
    finally:
        environments.close()
    assert [m["content"] for m in first.messages] == ["one", "two"] and first.reward == 1.0
    assert second.messages[0]["content"] == "three" and second.reward == 0.25
    assert third.metrics == {"seen": 4.0} and third.reward is None
    assert last.messages == () and last.reward == 2.0


def test_rows_choose_among_several_environments():
    given = {"guess": games.Guess, "talk": games.Talk}
    environments = made(given=given)

    async def play(session):
        await session.reset()
        return session.steps, len(session.schemas)

    try:
        rows = [
            Prompt("", columns={"environment": one})
            for one in ("talk", {"name": "guess", "options": {"most": 2}})
        ]
        environments.check_data(rows)
        assert [played(environments, play, row) for row in rows] == [(True, 0), (False, 4)]
        assert played(environments, start_of, rows[1])[0] == " Guess a number from 1 to 2."
        for column, problem in [
            ({}, "column 'environment', it has none"),
            ({"environment": "os:system"}, "need an adapter .* got 'os:system'"),
            ({"environment": {"options": {}}}, "by name"),
        ]:
            with pytest.raises(ValueError, match=f"row 0 of the data: .*{problem}"):
                environments.check_data([Prompt("", columns=column)])
    finally:
        environments.close()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"name": "Silent"}, "need public methods"),
        ({"name": "Gues"}, "did you mean 'Guess'"),
        ({"name": "Guess", "given": games.Guess}, "got both"),
        ({"given": games.Guess()}, "need a class or a function"),
        ({"name": "Guess", "options": {"python": "/no/python"}}, "there is no /no/python"),
        ({"name": "Guess", "options": {"mots": 3}}, "mots"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_at_the_start(settings, problem):
    with pytest.raises(ValueError, match=problem):
        made(**settings)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("gymm", "did you mean gym:NAME"), ("textarena:Wordle-v0", r"pip install 'verl\[textarena\]'")],
)
def test_a_name_that_leads_nowhere_is_refused(name, problem):
    with pytest.raises(ValueError, match=problem):
        build_environments(AgentConfig(environment=name))


def test_columns_that_reset_needs_are_checked_before_the_first_step():
    class Picky:
        def reset(self, board: str) -> str:
            return board

        def step(self, message: dict) -> None:
            return None

    environments = made(given=Picky)
    try:
        environments.check_data([Prompt("", columns={"board": "b"})])
        with pytest.raises(ValueError, match=r"need the column 'board' .* row 3 of the data has low, prompt"):
            environments.check_data([Prompt("", columns={"low": 1}, index=3)])
    finally:
        environments.close()


def test_an_environment_without_data_gives_rows_with_seeds(guess):
    train, test = guess.rows("train", {"size": 3}), guess.rows("test", {"size": 3})
    assert train[0] == {"prompt": [{"role": "user", "content": "Begin.\n\n"}], "seed": 0}
    assert not {row["seed"] for row in train} & {row["seed"] for row in test}
    with pytest.raises(ValueError, match="no option 'level'"):
        guess.rows("train", {"level": 3})
