"""Tests of users' own text workers behind the contract of generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.tiny import tiny_codec
from verl.rollout.text_worker import TextWorkerGenerator
from verl.utils.rollout import BaseRolloutWorker
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec, character_tokenizer

CODEC = tiny_codec()
PROMPTS = [CODEC.encode("1+1="), CODEC.encode("2+2=")]


class Worker(BaseRolloutWorker):
    """Answers with a function of the prompts; notes what it was asked."""

    def __init__(self, answers: Callable[[Sequence[str]], Any]) -> None:
        self.answers, self.asked = answers, []

    def generate(self, prompts: Sequence[str], max_tokens: int = 128) -> Any:
        self.asked.append((list(prompts), max_tokens))
        return self.answers(prompts)


class LaterWorker(Worker):
    """The same as a coroutine."""

    async def generate(self, prompts: Sequence[str], max_tokens: int = 128) -> Any:
        return super().generate(prompts, max_tokens)


def numbered(prompts: Sequence[str]) -> list[str]:
    return [f"{prompt}{i}" for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("kind", [Worker, LaterWorker])
def test_every_prompt_is_asked_n_times_and_the_texts_are_tokenized_once(kind):
    worker = kind(numbered)
    groups = TextWorkerGenerator(worker, CODEC).generate(
        PROMPTS, [SamplingParams(n=2, max_tokens=9), SamplingParams(max_tokens=20)]
    )
    assert worker.asked == [(["1+1=", "1+1=", "2+2="], 20)]
    assert [[c.text for c in group] for group in groups] == [["1+1=0", "1+1=1"], ["2+2=2"]]
    assert groups[1][0].token_ids == [*CODEC.encode("2+2=2"), 1]
    assert all(c.logprobs is None and c.finish_reason == "stop" for group in groups for c in group)


def test_a_worker_reads_the_marks_of_the_chat_template_but_no_start_token():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}"
    codec, worker = TextCodec(tokenizer), Worker(numbered)
    ids = codec.encode_prompt(Prompt([{"role": "user", "content": "1+1="}]))
    assert ids == [2, *codec.encode("1+1="), 3]
    TextWorkerGenerator(worker, codec).generate([ids], [SamplingParams()])
    assert worker.asked[0][0] == ["1+1=<unk>"]


def test_a_text_longer_than_its_own_limit_is_cut():
    engine = TextWorkerGenerator(Worker(lambda prompts: ["abcdef"] * 2), CODEC)
    (short,), (enough,) = engine.generate(
        PROMPTS, [SamplingParams(max_tokens=4), SamplingParams(max_tokens=7)]
    )
    assert (CODEC.decode(short.token_ids), short.finish_reason) == ("abcd", "length")
    assert (enough.token_ids[-1], enough.finish_reason) == (1, "stop")


def test_answers_carry_the_version_that_was_published():
    engine = TextWorkerGenerator(Worker(numbered), CODEC)
    engine.version = 4
    assert engine.generate(PROMPTS[:1], [SamplingParams()])[0][0].version == 4


def test_a_worker_is_not_asked_for_nothing():
    worker = Worker(numbered)
    assert TextWorkerGenerator(worker, CODEC).generate([], []) == [] and worker.asked == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["one"], "must return one text per prompt, got 1 for 2 prompts"),
        ("ab", "must return a list of texts, got 'ab'"),
        (None, "must return a list of texts, got None"),
        (["one", 2], r"must return a list of texts, got \['one', 2\]"),
    ],
)
def test_anything_but_one_text_per_prompt_is_an_error(answer, message):
    with pytest.raises(ValueError, match=f"Worker.generate {message}"):
        TextWorkerGenerator(Worker(lambda prompts: answer), CODEC).generate(PROMPTS, [SamplingParams()] * 2)


def test_an_error_of_the_worker_is_raised_as_it_is():
    def fails(prompts):
        raise ConnectionError("no server")

    with pytest.raises(ConnectionError, match="no server"):
        TextWorkerGenerator(Worker(fails), CODEC).generate(PROMPTS, [SamplingParams()] * 2)


def test_a_worker_must_define_generate():
    with pytest.raises(
        NotImplementedError, match=r"BaseRolloutWorker must define generate\(prompts, max_tokens=128\)"
    ):
        TextWorkerGenerator(BaseRolloutWorker(), CODEC).generate(PROMPTS, [SamplingParams()] * 2)
