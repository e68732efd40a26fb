"""The gateway as OpenAI's own client sees it: endpoints, the tape, repetition, limits, keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from tests.agents.episodes.scripted import ADD, CALL, play
from tests.agents.programs.agents import ASK, InProcess, episode, sampled_texts, texts_of
from verl.agents.programs.gateway import Gateway

CHATML = "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


def ask(client, messages=(ASK,), **options):
    return client.chat.completions.create(model="gpt-4o", messages=list(messages), **options)


async def tool_agent(client):
    """Calls the tool that the policy asks for, and sends the history back as frameworks do."""
    history = [ASK]
    while True:
        message = (await ask(client, history, tools=[ADD])).choices[0].message
        # Null fields and keys in another order, as `model_dump` of other libraries gives them.
        history.append(dict(sorted({**message.model_dump(), "annotations": [], "audio": None}.items())))
        if not message.tool_calls:
            return float(message.content == "5")
        for call in message.tool_calls:
            arguments = json.loads(call.function.arguments)
            parts = [{"type": "text", "text": str(arguments["a"] + arguments["b"])}]
            history.append({"role": "tool", "tool_call_id": call.id, "content": parts})


def test_a_history_that_comes_back_continues_the_tape_and_only_what_is_new_is_rendered(gateway):
    trajectory, engine = episode(gateway, tool_agent, [CALL, "5"])
    ((prompt, *turns),) = texts_of(trajectory, engine)
    assert prompt[0].endswith(CHATML) and '"add"' in prompt[0]
    assert turns == [
        (f"{CALL}<|im_end|>", True),
        ("\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n", False),
        ("5<|im_end|>", True),
    ]
    assert trajectory.episode.reward == 1.0
    counts = trajectory.episode.counts
    assert (counts["turns"], counts["segments"], counts["calls"]) == (2, 1, 1)
    assert [m["role"] for m in trajectory.episode.messages] == ["user", "assistant", "tool", "assistant"]
    # The second request reads exactly the tokens of the first and its answer.
    first, second = (ids for ids, _ in engine.requests)
    assert second[: len(first)] == first


def test_a_history_that_is_rewritten_opens_a_segment_and_the_old_one_can_go_on(gateway):
    async def agent(client):
        main = [ASK]
        main.append((await ask(client, main)).choices[0].message.model_dump())
        await ask(client, [{"role": "user", "content": "summarize"}])
        await ask(client, [*main, {"role": "user", "content": "more"}])
        await ask(client, [*main[:1], {"role": "assistant", "content": "other"}, ASK])

    trajectory, engine = episode(gateway, agent, ["one", "two", "three", "four"])
    end = "<|im_end|>"
    segments = [[f"two{end}"], [f"one{end}", f"three{end}"], [f"four{end}"]]
    assert sampled_texts(trajectory, engine) == segments
    assert trajectory.text == "four" and trajectory.episode.counts["segments"] == 3


def test_other_tools_open_a_segment_since_the_model_read_them(gateway):
    async def agent(client):
        message = (await ask(client, tools=[ADD])).choices[0].message
        await ask(client, [ASK, message.model_dump(), ASK], tools=[SEARCH])

    trajectory, _ = episode(gateway, agent, ["a", "b"])
    assert trajectory.episode.counts["segments"] == 2


def test_concurrent_requests_have_segments_and_random_numbers_of_their_own(gateway):
    async def agent(client):
        await asyncio.gather(*(ask(client) for _ in range(3)))

    trajectory, engine = episode(gateway, agent, ["a", "b", "c"])
    assert sorted(sampled_texts(trajectory, engine)) == [["a<|im_end|>"], ["b<|im_end|>"], ["c<|im_end|>"]]
    assert len({params.sample_index for _, params in engine.requests}) == 3


def test_several_answers_are_branches_of_one_history(gateway):
    async def agent(client):
        choices = (await ask(client, n=2)).choices
        await ask(client, [ASK, choices[1].message.model_dump(), ASK])

    trajectory, engine = episode(gateway, agent, ["a", "b", "c"])
    assert sorted(sampled_texts(trajectory, engine)) == [["a<|im_end|>"], ["b<|im_end|>", "c<|im_end|>"]]


def test_a_request_that_openai_repeats_has_the_same_answer_and_no_second_turn(gateway):
    async def agent(client):
        first = await ask(client)
        again = await ask(client, extra_headers={"x-stainless-retry-count": "1"})
        assert first.id == again.id
        assert (await ask(client)).id != first.id  # the agent wants another sample

    trajectory, _ = episode(gateway, agent, ["a", "b"])
    assert trajectory.episode.counts["turns"] == 2


def test_a_client_that_leaves_cancels_the_sampling_and_its_repetition_continues_the_same_segment(gateway):
    async def agent(client):
        history = [ASK, (await ask(client)).choices[0].message.model_dump(), ASK]
        engine_of[0].hold, lost = True, asyncio.ensure_future(ask(client, history))
        await engine_of[0].held.wait()
        lost.cancel()
        await engine_of[0].cancelled.wait()
        engine_of[0].hold = False
        return (await ask(client, history)).choices[0].message.content

    engine_of: list = []
    trajectory, engine = held_episode(gateway, agent, engine_of)
    assert trajectory.episode.reward == "b" and trajectory.episode.counts["turns"] == 2
    assert sampled_texts(trajectory, engine) == [["a<|im_end|>", "b<|im_end|>"]]


def held_episode(gateway, agent, engine_of):
    """An episode whose engine can be held, and then is cancelled."""

    class Held(InProcess):
        async def run(self, live):
            engine, original = live._engine, live._engine.sample
            engine_of.append(engine)
            engine.hold, engine.held, engine.cancelled = False, asyncio.Event(), asyncio.Event()

            async def sample(ids, params, affinity=None):
                if engine.hold:
                    engine.held.set()
                    try:
                        await asyncio.Event().wait()
                    finally:
                        engine.cancelled.set()
                return await original(ids, params, affinity)

            engine.sample = sample
            await super().run(live)


    def texts(read: str) -> str:
        return "b" if read.count("assistant") > 1 else "a"

    (trajectory,), engine = play(texts, driver=Held(gateway, agent))
    return trajectory, engine


def test_a_limit_is_an_error_that_is_not_repeated_and_the_ending_of_the_episode(gateway):
    async def agent(client):
        for _ in range(3):
            await ask(client)
        with pytest.raises(openai.BadRequestError, match="max_turns") as caught:
            await ask(client.with_options(max_retries=5))
        assert caught.value.code == "episode_max_turns"
        return 0.5

    trajectory, _ = episode(gateway, agent, ["a", "b", "c"], max_turns=3)
    assert trajectory.episode.ending == "max_turns" and trajectory.outcome == "ok"
    assert trajectory.episode.counts["turns"] == 3 and trajectory.episode.reward == 0.5


def test_a_conversation_that_is_full_may_be_shortened(gateway):
    async def agent(client):
        history = [ASK, (await ask(client)).choices[0].message.model_dump(), ASK]
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, history)
        assert caught.value.code == "context_length_exceeded"
        await ask(client)

    trajectory, _ = episode(gateway, agent, ["a" * 30, "b"], max_tokens=40)
    assert trajectory.episode.ending == "answer" and trajectory.episode.counts["segments"] == 2


def test_sampling_of_the_agent_is_overridden_with_a_note_and_its_limits_hold(gateway):
    async def agent(client):
        choice = (await ask(client, temperature=0, top_p=0.5, max_tokens=4, seed=3)).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("length", "long")
        choice = (await ask(client, stop=["Observation:"])).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("stop", "think ")

    driver = InProcess(gateway, agent)
    (trajectory,), engine = play(["longer", "think Observation: 5"], driver=driver)
    assert trajectory.episode.counts["overridden"] == 1
    (note,) = driver.notes
    assert note.startswith("requests of the program set seed, temperature, top_p;")
    assert [(p.temperature, p.top_p, p.seed) for _, p in engine.requests] == [(1.0, 1.0, 7)] * 2
    # Nothing is cut from the tape.
    assert trajectory.text == "think " and "Observation: 5" in sampled_texts(trajectory, engine)[-1][0]


def test_a_tool_that_must_be_called_is_asked_for_once_more_behind_the_back_of_the_agent(gateway):
    async def agent(client):
        message = (await ask(client, tools=[ADD], tool_choice="required")).choices[0].message
        assert message.tool_calls[0].function.name == "add"
        history = [ASK, message.model_dump(), {"role": "tool", "tool_call_id": "x", "content": "5"}]
        named = {"type": "function", "function": {"name": "add"}}
        message = (await ask(client, history, tools=[ADD], tool_choice=named)).choices[0].message
        assert message.content == "no" and not message.tool_calls  # asked once more in vain

    trajectory, engine = episode(gateway, agent, ["5", CALL, "no", "no"])
    (runs,) = texts_of(trajectory, engine)
    assert "user\nAnswer with a call of one of the tools." in runs[2][0] and not runs[2][1]
    assert trajectory.episode.counts["retold"] == 2 and trajectory.episode.counts["segments"] == 1


def test_a_call_that_is_none_and_one_that_is_broken_are_text(gateway):
    broken = '<tool_call>{"name": "add", "arg</tool_call>'

    async def agent(client):
        choice = (await ask(client, tools=[ADD], tool_choice="none")).choices[0]
        assert choice.message.content == CALL and choice.finish_reason == "stop"
        choice = (await ask(client, tools=[ADD])).choices[0]
        assert choice.message.content == broken

    trajectory, _ = episode(gateway, agent, [CALL, broken])
    assert trajectory.episode.counts["bad_calls"] == 1 and "calls" not in trajectory.episode.counts


def test_json_is_checked_and_asked_for_once_more(gateway):
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}

    async def agent(client):
        message = (await ask(client, response_format=form)).choices[0].message
        assert json.loads(message.content) == {"sum": 5}

    trajectory, engine = episode(gateway, agent, ['{"total": 5}', '{"sum": 5}'])
    assert "'sum' is a required property" in texts_of(trajectory, engine)[0][2][0]


def test_streams_have_the_same_message_in_parts(gateway):
    async def agent(client):
        options = {"tools": [ADD], "stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await ask(client, **options)]
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == "so "
        (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
        assert json.loads(call.function.arguments) == {"a": 2, "b": 3}
        assert chunks[-2].choices[0].finish_reason == "tool_calls" and chunks[-1].usage.completion_tokens > 9
        text = [part async for part in await client.completions.create(model="x", prompt="hi", stream=True)]
        assert "".join(part.choices[0].text for part in text) == "b"

    episode(gateway, agent, [f"so {CALL}", "b"])


def test_logprobs_and_token_ids_are_those_of_the_tape(gateway):
    async def agent(client):
        response = await ask(client, logprobs=True, extra_body={"return_token_ids": True})
        choice = response.choices[0]
        assert [entry.logprob for entry in choice.logprobs.content] == [-0.25] * len(choice.token_ids)
        given.append(response.prompt_token_ids + choice.token_ids)
        assert response.usage.total_tokens == len(given[0])

    given: list[list[int]] = []
    trajectory, _ = episode(gateway, agent, ["abc"])
    assert given == [trajectory.token_ids]


def test_completions_continue_by_ids_and_by_text(gateway):
    async def agent(client):
        create = client.completions.create
        ids = (
            (await create(model="x", prompt=[40, 41], extra_body={"return_token_ids": True}))
            .choices[0]
            .token_ids
        )
        await create(model="x", prompt=[40, 41, *ids, 50])
        text = "Q: 2+3? " + (await create(model="x", prompt="Q: 2+3? ", max_tokens=3)).choices[0].text
        await create(model="x", prompt=text + " more")

    trajectory, engine = episode(gateway, agent, ["a", "b", "think", "d"])
    assert sampled_texts(trajectory, engine) == [["a<|im_end|>", "b<|im_end|>"], ["thi", "d<|im_end|>"]]


def test_responses_hold_calls_outputs_and_the_response_before(gateway):
    flat = {"type": "function", **ADD["function"]}

    async def agent(client):
        create = client.responses.create
        first = await create(model="x", instructions="Be brief.", input="2+3?", tools=[flat])
        (call,) = [item for item in first.output if item.type == "function_call"]
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
        second = await create(
            model="x", instructions="Be brief.", previous_response_id=first.id, input=[output], tools=[flat]
        )
        assert second.output_text == "5" and second.status == "completed"
        history = [{"role": "user", "content": "2+3?"}, *first.output, output, *second.output]
        asked = [item if isinstance(item, dict) else item.model_dump() for item in history]
        asked.append({"role": "user", "content": "sure?"})
        async with client.responses.stream(
            model="x", instructions="Be brief.", input=asked, tools=[flat]
        ) as stream:
            events = [event.type async for event in stream]
            assert (await stream.get_final_response()).output_text == "yes"
        assert events[0] == "response.created" and "response.output_text.delta" in events
        with pytest.raises(openai.BadRequestError, match="no response 'resp_0'"):
            await create(model="x", input="hi", previous_response_id="resp_0")

    trajectory, engine = episode(gateway, agent, [CALL, "5", "yes"])
    assert sampled_texts(trajectory, engine) == [[f"{CALL}<|im_end|>", "5<|im_end|>", "yes<|im_end|>"]]
    assert texts_of(trajectory, engine)[0][0][0].startswith("<|im_start|>system\n")


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED = [
    ({"top_logprobs": 2, "logprobs": True}, "top_logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
    ({"extra_body": {"temprature": 1}}, "temprature"),
    ({"n": 99}, "n"),
]


def test_a_field_that_cannot_be_answered_is_refused_by_name_and_the_episode_goes_on(gateway):
    async def agent(client):
        for fields, name in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await ask(client, **{"messages": [ASK], **fields})
            assert caught.value.param == name
        await ask(client)

    trajectory, _ = episode(gateway, agent, ["a"])
    assert trajectory.episode.counts["turns"] == 1


def test_a_key_opens_its_own_episode_alone_and_only_while_it_runs(gateway):
    async def agent(client):
        names.append([model.id async for model in client.models.list()])
        for key in ("sk-other", f"{client.api_key}x"):
            with pytest.raises(openai.AuthenticationError):
                await ask(client.with_options(api_key=key))
        other = str(client.base_url).replace("/e/", "/e/x")
        with pytest.raises(openai.AuthenticationError):
            await ask(client.with_options(base_url=other))
        await ask(client)

    names: list = []
    driver = InProcess(gateway, agent)
    play(["a"], driver=driver)
    assert names == [["policy"]]
    late = openai.OpenAI(base_url=driver.access.url, api_key=driver.access.key)
    with late, pytest.raises(openai.AuthenticationError, match="is over"):
        ask(late)


def test_a_reward_may_be_sent(gateway):
    async def agent(client):
        await ask(client)
        await client.post("../reward", body={"reward": 0.25}, cast_to=object)
        with pytest.raises(openai.BadRequestError):
            await client.post("../reward", body="much", cast_to=object)
        return driver.access.session.reward

    driver = InProcess(gateway, agent)
    (trajectory,), _ = play(["a"], driver=driver)
    assert trajectory.episode.reward == {"reward": 0.25}
