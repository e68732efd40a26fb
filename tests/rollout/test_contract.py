"""The contract of generation, run over every engine that samples tokens from a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from tests.rollout.pool.pools import changed, generate, group_of, own_logprobs, pool_of, publish, saved
from tests.rollout.servers import KEY, running
from tests.tiny import kept_by_hand, random_prompts, tiny_codec, tiny_policy
from verl.agents.environments.session import Environments, EnvironmentSession, StepResult
from verl.agents.episodes.driver import ToolLoop
from verl.agents.episodes.runner import EpisodeRunner
from verl.agents.episodes.turn_sampler import TurnSampler
from verl.config.agent import AgentConfig
from verl.data.trajectory import Trajectory
from verl.engines.hf.models import PolicyModel
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.batching_engine import BatchingEngine
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.utils.sampling_types import Completion, Prompt, RolloutEngine, SamplingParams

PROMPTS = random_prompts([3, 11, 1, 6])
ENDS = tuple(range(20, 32))  # so many ids that answers end at different lengths
# Without a GPU SGLang draws by no seed; docs/sglang.md says when it does.
UNSEEDED = ("sglang",)
# They apply several truncations one after the other, ours to the whole distribution each; the order of each
# is tested with its engine.
# Engines that follow the policy in these tests.
FOLLOWING = ("embedded", "served", "vllm server", "sglang")
OTHER_ORDER = ("vllm", "vllm server", "sglang")


@cache
def policy() -> PolicyModel:
    """With heads that the kernels of every engine have."""
    return tiny_policy("llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


def served(module: str, folder: Path, **options: Any) -> RolloutEngine:
    """A pool of one server that follows the policy."""
    path, _, name = module.partition(":")
    make = vars(import_module(path))[name]
    return pool_of(
        group_of(policy()),
        saved(policy(), folder / "model"),
        folder,
        1,
        make=make,
        options=options,
        timeout_s=60.0,
    )


def vllm_in_process(folder: Path) -> RolloutEngine:
    made = import_module("verl.rollout.vllm.in_process").VLLMEngine(
        saved(policy(), folder), tiny_codec(), options={"max_model_len": 256}, dtype="float32", max_slots=4
    )
    made.load(policy().transformer.named_parameters(), 0)
    return BatchingEngine(made)


def made_engine(name: str, folder: Path, stack: ExitStack) -> RolloutEngine:
    """An engine that samples from the policy as it is."""
    if name == "embedded":
        return BatchingEngine(EmbeddedEngine(policy(), tiny_codec(), max_slots=4))
    if name == "vllm":
        return vllm_in_process(folder)
    if name == "http":
        model = saved(policy(), folder / "model")
        address = stack.enter_context(running({"model": model, "name": "tiny"}))
        options = {"model": "tiny", "api_key_env": "TEST_KEY", "processed_logprobs": True}
        make = import_module("verl.rollout.openai_engine").HTTPEngine
        return pool_of(None, model, folder, 1, make=make, options=options, address=address, policy=policy())
    modules = {
        "served": "verl.rollout.server.embedded_server:EmbeddedServer",
        "vllm server": "verl.rollout.vllm.server:VLLMServer",
    }
    options = {"vllm server": {"max_model_len": 256}}.get(name, {})
    return served(modules.get(name, "verl.rollout.sglang.server:SGLangServer"), folder, **options)


@pytest.fixture(
    scope="module",
    params=[
        "embedded",
        pytest.param("served", marks=pytest.mark.servers),
        pytest.param("http", marks=pytest.mark.servers),
        pytest.param("vllm", marks=pytest.mark.vllm),
        pytest.param("vllm server", marks=pytest.mark.vllm),
        pytest.param("sglang", marks=pytest.mark.sglang),
    ],
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutEngine]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("TEST_KEY", KEY)
        # Plugins of other packages beside vLLM are none of ours.
        patch.setenv("VLLM_PLUGINS", "")
        yield stack.enter_context(closing(made_engine(name, tmp_path_factory.mktemp("contract"), stack)))


@pytest.fixture
def seeded(name: str) -> None:
    if name in UNSEEDED:
        pytest.skip("without a GPU SGLang draws by no seed")


def answer(engine: RolloutEngine, prompt: list[int], **options) -> list[Completion]:
    return generate(engine, [prompt], [SamplingParams(**options)])[0]


def next_logits(ids: list[int]) -> Tensor:
    """[V] by the model's own forward."""
    with torch.no_grad():
        return policy().transformer(torch.tensor([ids])).logits[0, -1]


def test_an_answer_depends_on_its_prompt_seed_and_number_alone(engine, seeded):
    params = [
        SamplingParams(temperature=0.9, max_tokens=12, n=n, stop_ids=ENDS, seed=40 + n) for n in (2, 3, 1, 5)
    ]
    together = generate(engine, PROMPTS, params)
    reverse = generate(engine, PROMPTS[::-1], params[::-1])[::-1]
    alone = [generate(engine, [prompt], [wanted])[0] for prompt, wanted in zip(PROMPTS, params, strict=True)]
    ids = [[c.token_ids for c in group] for group in together]
    assert [len(group) for group in ids] == [2, 3, 1, 5]
    assert (
        ids
        == [[c.token_ids for c in group] for group in reverse]
        == [[c.token_ids for c in group] for group in alone]
    )


def test_a_group_begins_with_the_answers_of_a_smaller_one(engine, seeded):
    few, many = (answer(engine, PROMPTS[0], max_tokens=10, n=n, seed=3) for n in (2, 6))
    assert [c.token_ids for c in few] == [c.token_ids for c in many[:2]]


def test_answers_of_a_group_and_of_other_seeds_differ(engine):
    groups = [answer(engine, PROMPTS[1], max_tokens=10, n=4, seed=seed) for seed in (0, 1)]
    assert len({tuple(c.token_ids) for group in groups for c in group}) == 8


def test_temperature_0_takes_the_most_likely_token_of_the_models_own_forward(engine):
    for prompt, (completion,) in zip(
        PROMPTS, generate(engine, PROMPTS, [SamplingParams(0, max_tokens=10)] * 4), strict=True
    ):
        ids = list(prompt)
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            logits = next_logits(ids)
            assert token == int(logits.argmax())
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
            ids.append(token)


def test_a_stop_id_ends_an_answer_and_belongs_to_it(engine):
    completions = [
        c
        for group in generate(engine, PROMPTS, [SamplingParams(max_tokens=40, n=4, stop_ids=ENDS)] * 4)
        for c in group
    ]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert len(stopped) > 8
    assert all(c.token_ids[-1] in (*ENDS, 1) and not {*ENDS, 1} & {*c.token_ids[:-1]} for c in stopped)


def test_the_end_of_the_tokenizer_ends_an_answer(engine):
    # The policy draws it once in a hundred tokens.
    completions = answer(engine, PROMPTS[2], max_tokens=120, n=8, seed=1)
    stopped = [c.token_ids for c in completions if c.finish_reason == "stop"]
    assert stopped and all(ids.index(1) == len(ids) - 1 for ids in stopped)


def test_an_answer_without_an_end_has_max_tokens(engine):
    groups = generate(
        engine, PROMPTS, [SamplingParams(max_tokens=n, stop_ids=ENDS, n=3) for n in (1, 2, 7, 20)]
    )
    for limit, group in zip((1, 2, 7, 20), groups, strict=True):
        for c in group:
            ends = c.token_ids[-1] in (*ENDS, 1)
            assert c.finish_reason == ("stop" if ends else "length") and len(c.logprobs) == len(c.token_ids)
            assert len(c.token_ids) <= limit and (ends or len(c.token_ids) == limit)


def test_a_stop_text_ends_an_answer_with_the_token_that_completes_it(engine, seeded):
    codec = tiny_codec()
    free = answer(engine, PROMPTS[0], max_tokens=30, n=3, seed=2)
    text = codec.decode(free[1].token_ids)
    stop = (text[4:7], "never such a text")
    ended = answer(engine, PROMPTS[0], max_tokens=30, n=3, seed=2, stop=stop)
    ids = ended[1].token_ids
    assert ended[1].finish_reason == "stop" and ids == free[1].token_ids[: len(ids)]
    assert codec.decode(ids).endswith(stop[0]) and stop[0] not in codec.decode(ids[:-1])
    assert codec.decode_answer(ids, stop) == text[: text.index(stop[0])]
    assert ended[0].token_ids == free[0].token_ids


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.2),
        SamplingParams(temperature=1.3, top_k=10, top_p=0.9, min_p=0.05),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=0.8, repetition_penalty=1.7, top_k=20),
    ],
    ids=["top_k", "top_p", "min_p", "all", "none", "penalty"],
)
def test_logprobs_are_of_the_truncated_and_renormalized_distribution(engine, name, params):
    if "sglang" in name and params.repetition_penalty != 1:
        pytest.skip("its penalty leaves the prompt out, so this program refuses it")
    penalized = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    if name in OTHER_ORDER and params.top_k and params.top_p < 1:
        pytest.skip("this engine applies several truncations in an order of its own")
    (completion,) = generate(engine, [PROMPTS[1]], [params])
    ids = list(PROMPTS[1])
    for token, logprob in zip(completion[0].token_ids[:30], completion[0].logprobs, strict=False):
        logits = penalized(torch.tensor([ids]), next_logits(ids)[None])[0]
        probs = (logits / params.temperature).softmax(-1).tolist()
        kept = kept_by_hand(probs, params)
        assert token in kept
        assert torch.tensor(logprob).exp() == pytest.approx(
            probs[token] / sum(probs[t] for t in kept), rel=1e-4
        )
        ids.append(token)


def test_answers_carry_the_version_that_was_published(engine):
    assert answer(engine, PROMPTS[0], max_tokens=2)[0].version == engine.version < 3
    publish(engine, 3)
    assert engine.version == 3
    assert [c.version for c in answer(engine, PROMPTS[0], max_tokens=2, n=2)] == [3, 3]


def test_nothing_asked_is_nothing_answered(engine):
    assert generate(engine, [], []) == []


def test_an_empty_prompt_is_an_error(engine):
    with pytest.raises(ValueError, match="prompt( 1)? has 0 tokens and may get 128 more; need at least one"):
        generate(engine, [[5], []], [SamplingParams()] * 2)


def test_a_prompt_whose_answer_may_not_fit_the_context_is_an_error(engine):
    assert len(answer(engine, [5] * 250, max_tokens=6, temperature=0)) == 1
    with pytest.raises(
        ValueError,
        match="prompt( 0)? has 250 tokens and may get 7 more; need at least one, and at most 256 in all",
    ):
        answer(engine, [5] * 250, max_tokens=7)


def test_every_prompt_needs_its_parameters(engine):
    with pytest.raises(
        ValueError, match="need sampling parameters for each prompt, got 2 prompts and 1 parameters"
    ):
        generate(engine, PROMPTS[:2], [SamplingParams()])


class Recorder:
    """The engine, with what it was asked and what it answered."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self.episode = engine, engine.episode
        self.turns: list[tuple[list[int], Completion]] = []

    async def sample(self, prompt_ids, params, affinity=None) -> Completion:
        completion = await self.engine.sample(prompt_ids, params, affinity)
        self.turns.append((list(prompt_ids), completion))
        return completion


class Talk(EnvironmentSession):
    """Says something to each turn; before one of them the policy learns, if the engine follows it."""

    steps = True

    def __init__(self, learn: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        self.learn, self.num_turns = learn, 0

    async def call(self, calls):
        raise AssertionError("there are no tools")

    async def step(self, message) -> StepResult:
        self.num_turns += 1
        if self.num_turns == 2 and self.learn is not None:
            await self.learn()
        return StepResult([{"role": "user", "content": "so?"}] if self.num_turns < 4 else [])


class Talks(Environments):
    def __init__(self, learn: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
        self.learn = learn

    async def open(self, start) -> Talk:
        return Talk(self.learn)


def episodes(engine: RolloutEngine, learn: Any, *, samples: int) -> tuple[list[Trajectory], Recorder]:
    """Episodes of up to four turns behind one prompt, which is longer than a block of any prefix cache."""
    if engine.needs_weights:
        publish(engine, engine.version)
    recorder = Recorder(engine)
    turns = TurnSampler(recorder, WaitTracker())
    config = AgentConfig(max_turns=4, tool_format="hermes")
    options: dict[str, Any] = {"driver": ToolLoop(Talks(learn)), "context": 256, "turns": turns}
    runner = EpisodeRunner(recorder, tiny_codec(), config, **options)
    params = SamplingParams(n=samples, max_tokens=30, stop_ids=ENDS, seed=11)
    prompt = Prompt(tiny_codec().decode(random_prompts([140])[0]))
    return engine.run(runner.run_group(prompt, params)), recorder


def test_turns_continue_from_what_the_engine_has_of_the_turns_before(engine, name):
    group, recorder = episodes(engine, None, samples=3)
    rows = {(*t.prompt_ids, *t.response_ids): t for t in group}
    assert max(sum(t.response_mask) for t in group) > 8 and len(recorder.turns) > 6
    for asked, completion in recorder.turns:  # the tape is what the engine read and wrote
        seen = (*asked, *completion.token_ids)
        (row,) = (row for row in rows if row[: len(seen)] == seen)
        start = len(asked) - len(rows[row].prompt_ids)
        own = slice(start, start + len(completion.token_ids))
        assert all(rows[row].response_mask[own])
        assert list(rows[row].rollout_logprobs[own]) == list(completion.logprobs)
        expected = own_logprobs(policy(), asked, list(completion.token_ids))
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    later = [(asked, c) for asked, c in recorder.turns if len(asked) > 140]
    computed = sum(len(asked) - c.num_reused for asked, c in later)
    # Blocks of vLLM's cache on a CPU have up to 128 tokens; others compute each token once.
    assert computed < (0.45 if "vllm" in name else 0.25) * sum(len(asked) for asked, _ in later)


def test_turns_behind_an_update_are_of_the_new_weights_and_compute_the_whole_history(engine, name):
    if name not in FOLLOWING:
        pytest.skip("this engine is not given weights here")
    before = copy.deepcopy(policy())
    first = engine.version

    async def learn() -> None:
        changed(policy(), 5)
        await engine.sync_weights(first + 1)

    (row,), recorder = episodes(engine, learn, samples=1)
    versions = [completion.version for _, completion in recorder.turns]
    assert versions in ([first, first, first + 1, first + 1], [first, first, first + 1]), row.detail
    for version, (asked, completion) in zip(versions, recorder.turns, strict=True):
        model = before if version == first else policy()
        expected = own_logprobs(model, asked, list(completion.token_ids))
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    assert recorder.turns[2][1].num_reused == 0
    assert [v for v, own in zip(row.versions, row.response_mask, strict=True) if own] == [
        version for version, (_, c) in zip(versions, recorder.turns, strict=True) for _ in c.token_ids
    ]
