"""`verl serve` as its users see it: OpenAI's own client and plain HTTP against a real server with a tiny
model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch

from tests.rollout.servers import KEY, SECRET, next_logprobs, running, tiny_model
from tests.tiny import tiny_codec
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.server.app import ServeOptions, serve
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec

PROMPT = [40, 50, 60, 70]
SLOTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    with running({"model": str(folder), "name": "tiny", "max_slots": SLOTS}) as address:
        yield address


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(folder) -> EmbeddedEngine:
    return EmbeddedEngine(PolicyModel(load_language_model(str(folder)), "fp32"), TextCodec.load(str(folder)))


# Fields that OpenAI's client does not know.
_OWN = ("top_k", "min_p", "repetition_penalty", "stop_token_ids")


def complete(client: openai.OpenAI, prompt: Any = PROMPT, *, ids: bool = True, **options: Any) -> Any:
    extra = {
        "return_token_ids": ids,
        **{name: options.pop(name) for name in _OWN if name in options},
    }
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **options)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], **options
    )


def post(url: str, body: Any, path: str = "completions", **options: Any) -> requests.Response:
    return requests.post(f"{url}/v1/{path}", json=body, headers={"Authorization": f"Bearer {KEY}"}, **options)


def state(url: str) -> dict[str, Any]:
    return requests.get(f"{url}/control/state", headers={"Authorization": f"Bearer {SECRET}"}).json()


def becomes_idle(url: str) -> bool:
    for _ in range(100):
        if state(url)["num_running"] == 0:
            return True
        time.sleep(0.05)
    return False


def test_the_model_is_listed_under_its_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_token_ids_go_in_and_come_out_with_the_logprobs_of_the_models_own_forward(client, engine):
    response = complete(client, max_tokens=20, seed=5, logprobs=0)
    (choice,) = response.choices
    assert (
        choice.prompt_token_ids == PROMPT and len(choice.token_ids) == len(choice.logprobs.token_logprobs) > 1
    )
    expected = next_logprobs(engine.model, PROMPT, choice.token_ids)
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), expected, atol=1e-4, rtol=0)
    assert choice.text == tiny_codec().decode(choice.token_ids)
    assert response.usage.prompt_tokens == 4 and response.usage.completion_tokens == len(choice.token_ids)
    assert response.weight_version == 0


def test_answer_i_of_n_follows_from_seed_and_i(client, engine):
    common = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.3}
    params = SamplingParams(**common, max_tokens=12, n=6, seed=7, stop_ids=(44, 45))
    (expected,) = engine.generate([PROMPT], [params])
    options = {**common, "stop_token_ids": [44, 45]}
    response = complete(client, max_tokens=12, n=6, seed=7, logprobs=0, **options)
    assert [choice.token_ids for choice in response.choices] == [c.token_ids for c in expected]
    assert [choice.finish_reason for choice in response.choices] == [c.finish_reason for c in expected]
    logprobs = [logprob for choice in response.choices for logprob in choice.logprobs.token_logprobs]
    assert logprobs == pytest.approx([logprob for c in expected for logprob in c.logprobs], abs=1e-5)


def test_several_prompts_are_answered_in_order(client):
    prompts = [[40, 41], [50], [60, 61, 62]]
    alone = [complete(client, prompt, max_tokens=6, seed=3, n=2).choices for prompt in prompts]
    together = complete(client, prompts, max_tokens=6, seed=3, n=2).choices
    assert [c.token_ids for c in together] == [c.token_ids for choices in alone for c in choices]
    assert [c.index for c in together] == [0, 1, 2, 3, 4, 5]
    assert [c.prompt_token_ids for c in together] == [prompt for prompt in prompts for _ in range(2)]


def test_texts_are_tokenized_as_the_models_own_tokenizer_does(client):
    response = complete(client, ["add 2", "7"], max_tokens=3)
    assert [c.prompt_token_ids for c in response.choices] == [
        tiny_codec().encode("add 2"),
        tiny_codec().encode("7"),
    ]
    assert response.usage.prompt_tokens == 6


def test_without_a_seed_answers_differ(client):
    answers = {tuple(complete(client, max_tokens=12).choices[0].token_ids) for _ in range(3)}
    assert len(answers) == 3


def test_messages_go_through_the_chat_template(client):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    create = client.chat.completions.create
    response = create(
        model="tiny",
        messages=messages,
        max_completion_tokens=5,
        seed=1,
        extra_body={"return_token_ids": True},
    )
    prompt = tiny_codec().encode_prompt(
        Prompt([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
    )
    assert response.prompt_token_ids == prompt and response.usage.prompt_tokens == len(prompt)
    choice = response.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == tiny_codec().decode(
        choice.token_ids
    )


def test_an_opening_is_continued_only_where_the_client_asks_for_it(url):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so "}]

    def read(**fields) -> str:
        body = {"messages": messages, "max_tokens": 1, "return_token_ids": True, **fields}
        ids = post(url, body, "chat/completions").json()["prompt_token_ids"]
        return tiny_codec().decode(ids)

    assert read() == "u:hi\na:so a:"  # the end token closes it
    assert read(continue_final_message=True, add_generation_prompt=False) == "u:hi\na:so "
    assert read(add_generation_prompt=False) == "u:hi\na:so "


def test_likely_tokens_are_those_of_the_models_own_forward(client, engine):
    response = chat(
        client, max_tokens=6, seed=2, logprobs=True, top_logprobs=4, extra_body={"return_token_ids": True}
    )
    choice, prompt = response.choices[0], response.prompt_token_ids
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        next_logprobs(engine.model, prompt, choice.token_ids).tolist(), abs=1e-4
    )
    for i, one in enumerate(choice.logprobs.content):
        with torch.no_grad():
            logits = engine.model.transformer(torch.tensor([[*prompt, *choice.token_ids[:i]]])).logits[0, -1]
        values, ids = logits.log_softmax(-1).topk(4)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        assert [top.token for top in one.top_logprobs] == [
            tiny_codec().tokenizer.decode([i]) for i in ids.tolist()
        ]
        assert bytes(one.bytes).decode() == one.token


def test_completions_name_likely_tokens_and_where_each_begins(client):
    logprobs = complete(client, max_tokens=8, seed=4, logprobs=3).choices[0].logprobs
    assert all(len(top) == 3 and list(top.values()) == sorted(top.values()) for top in logprobs.top_logprobs)
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]


def streamed(chunks: Any, read: Callable[[Any], Any]) -> dict[int, list[Any]]:
    parts: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            parts.setdefault(choice.index, []).extend(read(choice) or [])
    return parts


def test_a_stream_says_what_the_whole_answer_says(client):
    options = {"max_tokens": 40, "seed": 11, "n": 3, "stop": ["a", "1", ".."], "logprobs": 2}
    whole = complete(client, **options).choices
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **options))
    text = streamed(chunks, lambda choice: choice.text)
    assert {i: "".join(parts) for i, parts in text.items()} == {c.index: c.text for c in whole}
    assert streamed(chunks, lambda choice: choice.token_ids) == {c.index: c.token_ids for c in whole}
    assert streamed(chunks, lambda choice: choice.logprobs.token_logprobs) == {
        c.index: c.logprobs.token_logprobs for c in whole
    }
    assert streamed(chunks, lambda choice: choice.logprobs.text_offset) == {
        c.index: c.logprobs.text_offset for c in whole
    }
    reasons = streamed(chunks, lambda choice: choice.finish_reason and [choice.finish_reason])
    assert reasons == {c.index: [c.finish_reason] for c in whole}
    assert [i for i, chunk in enumerate(chunks) if chunk.usage] == [len(chunks) - 1]
    assert chunks[-1].usage.completion_tokens == sum(len(c.token_ids) for c in whole)


def test_a_chat_stream_says_what_the_whole_answer_says(client):
    options = {"max_tokens": 30, "seed": 12, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = chat(client, **options).choices
    chunks = list(chat(client, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = streamed(chunks, lambda choice: choice.delta.content)
    assert {i: "".join(parts) for i, parts in text.items()} == {c.index: c.message.content for c in whole}
    assert streamed(chunks, lambda choice: choice.logprobs and choice.logprobs.content) == {
        c.index: c.logprobs.content for c in whole
    }


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client):
    free = complete(client, max_tokens=30, seed=8, temperature=1.0).choices[0]
    stop = free.text[5:7]
    ended = complete(client, max_tokens=30, seed=8, stop=stop).choices[0]
    assert ended.text == free.text[: free.text.index(stop)] and ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]


SAY_A = {"messages": [{"role": "user", "content": "a"}]}
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no prompt": ("completions", {}, "need prompt as token ids, a text"),
    "prompt of another kind": ("completions", {"prompt": {"text": "a"}}, "need prompt as token ids, a text"),
    "empty prompt": ("completions", {"prompt": ["a", ""]}, "at least one token"),
    "id beyond the vocabulary": (
        "completions",
        {"prompt": [5, 10_000]},
        "need token ids from 0 to 99 in prompt, got 10000",
    ),
    "negative id": ("completions", {"prompt": [-1]}, "got -1"),
    "too long": (
        "completions",
        {"prompt": [5] * 1000, "max_tokens": 100},
        "context is 1024 tokens, but the prompt has 1000",
    ),
    "temperature": (
        "completions",
        {"prompt": "a", "temperature": -1},
        "need temperature as a number, at least 0, got -1",
    ),
    "temperature as text": ("completions", {"prompt": "a", "temperature": "1"}, "got '1'"),
    "top_p": ("completions", {"prompt": "a", "top_p": 0}, "need top_p"),
    "n": ("completions", {"prompt": "a", "n": True}, "need n as a whole number"),
    "max_tokens": (
        "completions",
        {"prompt": "a", "max_tokens": 0},
        "need max_tokens as a whole number from 1",
    ),
    "logprobs": (
        "completions",
        {"prompt": "a", "logprobs": 100},
        "need logprobs as a whole number from 0 to 20",
    ),
    "echo": (
        "completions",
        {"prompt": "a", "echo": True},
        "echo is not supported; leave it out, or give False",
    ),
    "best_of": ("completions", {"prompt": "a", "best_of": 3}, "best_of is not supported"),
    "unknown": (
        "completions",
        {"prompt": "a", "temprature": 1},
        "not a field that this server knows; did you mean temperature?",
    ),
    "logit_bias": ("completions", {"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias is not supported"),
    "messages to completions": ("completions", {"messages": []}, "messages is not a field"),
    "empty stop": (
        "completions",
        {"prompt": "a", "stop": [""]},
        "need stop as a text or a list of texts, none empty",
    ),
    "no messages": ("chat/completions", {}, "need messages"),
    "message without a role": (
        "chat/completions",
        {"messages": [{"content": "a"}]},
        "each with a role and with text alone as its content, got nothing at messages.0.role",
    ),
    "image": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "with text alone as its content, got [{'type': 'image_url'}] at messages.0.content",
    ),
    "tool call": (
        "chat/completions",
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
        "got 1 at messages.0.tool_calls",
    ),
    "no content": ("chat/completions", {"messages": [{"role": "user"}]}, "at messages.0"),
    "no variable": (
        "chat/completions",
        {**SAY_A, "chat_template_kwargs": {"thinking": True}},
        "which the chat template does not read",
    ),
    "continued and opened": (
        "chat/completions",
        {**SAY_A, "continue_final_message": True},
        "continue_final_message needs add_generation_prompt: false",
    ),
    "format": (
        "chat/completions",
        {**SAY_A, "response_format": {"type": "json_object"}},
        "response_format",
    ),
    "top_logprobs alone": ("chat/completions", {**SAY_A, "top_logprobs": 2}, "needs logprobs: true"),
    "two limits": (
        "chat/completions",
        {**SAY_A, "max_tokens": 2, "max_completion_tokens": 3},
        "differ",
    ),
    "no object": ("completions", [1], "need a JSON object"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_as_asked_is_refused_with_the_reason(url, case):
    path, body, message = BAD[case]
    response = post(url, body, path)
    error = response.json()["error"]
    assert (
        response.status_code == 400
        and message in error["message"]
        and error["type"] == "invalid_request_error"
    )


def test_fields_that_change_nothing_are_taken(url):
    body = {
        "prompt": "a",
        "max_tokens": 2,
        "user": "me",
        "echo": False,
        "best_of": 1,
        "logit_bias": None,
        "frequency_penalty": 0.0,
        "top_k": -1,
    }
    assert post(url, body).status_code == 200


def test_other_mistakes_have_their_status(url):
    assert post(url, {"model": "other", "prompt": "a"}).json()["error"]["code"] == "model_not_found"
    statuses = [
        post(url, {"model": "other", "prompt": "a"}).status_code,
        post(url, {}, "embeddings").status_code,
    ]
    statuses += [
        requests.get(f"{url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"}).status_code
    ]
    assert statuses == [404, 404, 405]
    broken = requests.post(
        f"{url}/v1/completions", data=b'{"prompt": ', headers={"Authorization": f"Bearer {KEY}"}
    )
    assert broken.status_code == 400 and "need JSON" in broken.json()["error"]["message"]


def test_a_key_is_asked_for_on_every_path_but_health(url):
    assert requests.get(f"{url}/health").json() == {"status": "ok"}
    for path in ("v1/models", "v1/nothing", "control/state"):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer \u00e4".encode().decode("latin-1")},
        ):
            response = requests.get(f"{url}/{path}", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert requests.get(f"{url}/control/state", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401


def test_many_requests_at_once_get_the_answers_that_they_get_alone(client):
    def ask(i: int) -> list[int]:
        return complete(client, [40 + i, 41], max_tokens=5 + i % 7, seed=i).choices[0].token_ids

    alone = [ask(i) for i in range(24)]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(24))) == alone


@pytest.mark.parametrize("stream", [True, False] * 3)
def test_a_client_that_leaves_frees_the_slots(url, client, stream):
    # Long answers in all slots, and as many waiting: nothing else could run for seconds.
    body = {
        "prompt": PROMPT,
        "max_tokens": 1000,
        "n": 2 * SLOTS,
        "seed": 1,
        "stream": stream,
        "temperature": 0.01,
    }
    if stream:
        with post(url, body, stream=True) as response:
            lines = response.iter_lines()  # kept: where it is forgotten, requests closes the connection
            while not next(lines).startswith(b"data:"):
                pass
            assert state(url)["num_running"] == SLOTS
    else:
        with pytest.raises(requests.exceptions.Timeout):
            post(url, body, timeout=0.3)
    assert becomes_idle(url)
    assert complete(client, max_tokens=2).choices


def test_another_host_than_loopback_needs_a_key(folder):
    with pytest.raises(ValueError, match="need a key to serve on 0.0.0.0, which others can reach"):
        ServeOptions(str(folder), host="0.0.0.0")
    assert ServeOptions(str(folder), host="0.0.0.0", api_key="k").port == 8000


def test_a_port_that_is_taken_is_said(folder, url):
    with pytest.raises(RuntimeError, match="cannot listen at 127.0.0.1"):
        serve(ServeOptions(str(folder), port=int(url.rpartition(":")[2])))


def test_a_model_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="/nowhere"):
        serve(ServeOptions("/nowhere/model"))


def test_events_are_lines_of_json_with_a_last_mark(url):
    response = post(url, {"prompt": "a", "max_tokens": 3, "stream": True})
    assert response.headers["Content-Type"] == "text/event-stream"
    *events, last = [
        line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")
    ]
    assert last == "[DONE]" and all(json.loads(event)["object"] == "text_completion" for event in events)
