"""Random episodes over all chat templates: sampled ids stay as they are, and nothing else is learned."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from tests.agents.episodes.random_episodes import FAMILIES, RandomEpisode
from tests.tiny import model_input, tiny_policy
from tests.utils.chat.conversation import TOOLS, result
from tests.utils.chat.family_tokenizer import family_tokenizer, sampled_ids
from verl.agents.environments.session import EpisodeStart
from verl.agents.episodes.live_episode import EpisodeLimits, LiveEpisode
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.utils.sampling_types import Completion, PrefixAffinity, Prompt, SamplingParams
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.formats import parser_for

EPISODES = 1000
BROKEN = {
    "chatml": '<tool_call>\n{"name": "add", "arg<|im_end|>',
    "mistral-v13": "[TOOL_CALLS]add[ARGS]{<eos>",
}


class Dictated:
    """An engine that samples given texts, in other tokens than the tokenizer would take."""

    def __init__(self, codec: TextCodec, texts: list[str], seed: int) -> None:
        self.codec, self.texts, self.random = codec, list(texts), random.Random(seed)
        self.read: list[list[int]] = []
        self.sampled: list[list[int]] = []

    async def sample(self, prompt_ids, params, affinity=None) -> Completion:
        self.read.append(list(prompt_ids))
        ids = sampled_ids(self.codec.tokenizer, self.texts[len(self.sampled)], self.random)
        self.sampled.append(ids)
        return Completion(ids, [-0.5] * len(ids), "stop", version=len(self.sampled))


def live(codec: TextCodec, engine, *, max_tokens: int = 4000) -> LiveEpisode:
    return LiveEpisode(
        EpisodeStart(Prompt([{"role": "user", "content": "?"}]), 0, 0, 0, "0-0-0"),
        SamplingParams(max_tokens=max_tokens),
        engine=engine,
        codec=codec,
        parser=parser_for(codec),
        limits=EpisodeLimits(max_turns=99),
        affinity=PrefixAffinity(),
    )


async def play(codec: TextCodec, engine, first, replies) -> LiveEpisode:
    """An episode of given replies."""
    episode = live(codec, engine)
    episode.begin(first, TOOLS)
    for reply in replies:
        await episode.answer()
        episode.add(reply)
    await episode.answer()
    return episode


def character_mask(codec: TextCodec, episode: LiveEpisode) -> tuple[str, list[bool]]:
    """The text of a tape, and for each character whether it was sampled; runs of tokens are decoded alone."""
    segment = episode.tape.segment()
    runs: list[tuple[bool, list[int]]] = [(False, list(segment.prompt_ids))]
    for token, own in zip(segment.response_ids, segment.response_mask, strict=True):
        if own != runs[-1][0]:
            runs.append((own, []))
        runs[-1][1].append(token)
    texts = [(own, codec.decode_all(ids)) for own, ids in runs]
    return "".join(text for _, text in texts), [own for own, text in texts for _ in text]


def check_sampled(codec: TextCodec, engine: Dictated, episode: LiveEpisode) -> None:
    """The tape is what the engine read and sampled, in order, and masks are those of the sampled ids."""
    segment = episode.tape.segment()
    whole = [*segment.prompt_ids, *segment.response_ids]
    learned = [i for i, own in zip(segment.response_ids, segment.response_mask, strict=True) if own]
    assert learned == [i for ids in engine.sampled for i in ids]
    for read, ids in zip(engine.read, engine.sampled, strict=True):
        assert whole[: len(read) + len(ids)] == [*read, *ids]
    assert len(segment.rollout_logprobs) == len(segment.response_ids)
    assert all(
        (p == -0.5) == own for p, own in zip(segment.rollout_logprobs, segment.response_mask, strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tape_has_what_was_sampled_and_reads_as_the_conversation(name):
    family, num_retokenized, num_turns = FAMILIES[name], 0, 0
    codec = TextCodec(family_tokenizer(name), template_kwargs=family.kwargs)
    for seed in range(EPISODES // len(FAMILIES) + 1):
        planned = RandomEpisode(family, seed)
        text = planned.text(codec)
        spans = planned.spans(text)
        assert len(spans) == len(planned.turns)
        # One turn stopped before the token that closes it, or before the mark of the next role. gpt-oss would
        # close it with another token than the one that it samples.
        stopped = seed % 3 if seed % 3 < len(spans) - 1 and name != "gpt-oss" else None
        spans = [(a, b - closing(text[a:b]) * (i == stopped)) for i, (a, b) in enumerate(spans)]
        engine = Dictated(codec, [text[start:end] for start, end in spans], seed)
        episode = asyncio.run(play(codec, engine, planned.first, planned.replies))
        check_sampled(codec, engine, episode)
        read, mask = character_mask(codec, episode)
        assert read == text
        expected = [False] * len(text)
        for start, end in spans:
            expected[start:end] = [True] * (end - start)
        assert mask == expected
        # The messages as they were parsed are those of the plan.
        own = [m for m in episode.record.messages if m["role"] == "assistant"]
        assert [said(m) for m in own] == [said(m) for m in planned.turns]
        num_turns += len(spans)
        num_retokenized += sum(codec.encode(codec.decode_all(ids)) != ids for ids in engine.sampled)
    assert num_turns > 100 and num_retokenized > 0.7 * num_turns  # the texts alone would give other tokens


def closing(turn: str) -> int:
    """Characters of the token at the end of a turn."""
    return len(turn) - turn.rindex("<")


def said(message) -> tuple:
    """What a turn says and calls."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return message["content"].strip(), message.get("reasoning_content", "").strip(), calls


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_call_stays_on_the_tape_as_it_was_sampled(name):
    codec = TextCodec(family_tokenizer(name))
    engine = Dictated(codec, [BROKEN[name], BROKEN[name]], 0)
    reply = [{"role": "user", "content": "Error: the call cannot be read."}]
    episode = asyncio.run(play(codec, engine, [{"role": "user", "content": "1+2?"}], [reply]))
    check_sampled(codec, engine, episode)
    read, mask = character_mask(codec, episode)
    assert read.count(BROKEN[name]) == 2 and sum(mask) == 2 * len(BROKEN[name])


class Greedless:
    """The embedded engine, asked for one answer at a time."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.engine = engine

    async def sample(self, prompt_ids, params, affinity=None) -> Completion:
        return self.engine.generate([list(prompt_ids)], [params])[0][0]


def test_the_trainer_and_the_engine_have_the_same_logprobs_on_all_turns():
    codec = TextCodec(family_tokenizer("chatml"))
    policy = tiny_policy(vocab_size=codec.num_ids, max_position_embeddings=2048, eos_token_id=None)
    engine = Greedless(EmbeddedEngine(policy, codec))
    replies = [[result(0, "3 é\n\n")], [{"role": "user", "content": "Again?"}], [result(1, "{")]]
    segments = []
    for number in range(3):
        episode = live(codec, engine, max_tokens=12)
        episode.params = SamplingParams(max_tokens=12, seed=number)
        asyncio.run(turns_of(episode, replies))
        segments.append(episode.tape.segment())
    inputs = model_input([s.prompt_ids for s in segments], [list(s.response_ids) for s in segments])
    with torch.no_grad(), policy.forward_mode():
        trainer = policy.token_logprobs(inputs, temperature=1.0, chunk=100)[0]
    mask = torch.tensor([own for s in segments for own in s.response_mask])
    sampled = torch.tensor([p for s in segments for p in s.rollout_logprobs])
    assert mask.sum() >= 3 * 4 * 2 and not mask.all()
    torch.testing.assert_close(sampled[mask], trainer[mask], atol=1e-5, rtol=0)
    assert (sampled[~mask] == 0).all()


async def turns_of(episode: LiveEpisode, replies) -> None:
    episode.begin([{"role": "user", "content": "1+2?"}], TOOLS)
    for reply in replies:
        await episode.answer()
        episode.add(reply)
    await episode.answer()
