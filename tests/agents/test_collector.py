"""From prompts to rewarded groups: every form of a prompt, failures, dead groups, length shaping, numbers and
seeds.
"""

from __future__ import annotations

import asyncio
import math

import pytest

from tests.tiny import tiny_codec
from verl.agents.collector import DataCollector
from verl.agents.groups import has_no_signal
from verl.algorithms.registry import bind
from verl.config import load_config
from verl.config.fields import Choice
from verl.rewards.functions import build_rewards
from verl.rewards.shaping import LENGTH_PENALTIES
from verl.rollout.inference_server import RefusedError
from verl.utils.sampling_types import BatchGenerator, Completion, Prompt, RolloutEngine, SamplingParams


class Scripted(BatchGenerator):
    """Answers with the texts of a list, over and over; notes what it was asked."""

    def __init__(self, *texts):
        self.codec, self.texts, self.calls = tiny_codec(), texts, []
        self.given = 0

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        return [[self._answer(p.max_tokens) for _ in range(p.n)] for p in params]

    def _answer(self, max_tokens):
        ids = self.codec.encode_answer(self.texts[self.given % len(self.texts)])
        self.given += 1
        reason = "length" if len(ids) > max_tokens else "stop"
        return Completion(ids[:max_tokens], [-1.0] * min(len(ids), max_tokens), reason, self.version)


def number(prompt, response):
    """The answer as a number; one that is none has no reward."""
    return float(response)


def collector_with(engine, *overrides, **parts):
    # On a thread: worker processes take seconds to start, and tests of rewards have them.
    config = load_config("grpo", ["sampling.max_tokens=8", "rewards.isolation=thread", *overrides])
    return DataCollector(engine, tiny_codec(), build_rewards(config.rewards, number), config, **parts)


def collector(engine, *overrides):
    return collector_with(engine, *overrides)


class Server(RolloutEngine):
    """Answers beside training, and refuses prompts of more than 3 tokens."""

    async def sample(self, prompt_ids, params, affinity=None):
        if len(prompt_ids) > 3:
            raise RefusedError("prompt too long for the server")
        return Completion([tiny_codec().encode_answer("7")[0]], [-1.0], "stop", self.version)

    async def sync_weights(self, version):
        self.version = version

    def run(self, work):
        return asyncio.run(work)


def fresh(count):
    """As many new prompts as are wanted."""
    return [Prompt("more", index=100 + i) for i in range(count)]


def test_texts_chats_and_prompts_are_asked_as_the_model_reads_them():
    engine = Scripted("1", "2")
    chat = [{"role": "user", "content": "hi"}]
    collected = collector(engine).collect(["hi", chat, Prompt("ho", index=7)], samples=2)
    assert [engine.codec.decode(ids) for ids in engine.calls[0][0]] == ["hi", "u:hi\na:", "ho"]
    assert [t.prompt.content for t in collected.trajectories[::2]] == ["hi", chat, "ho"]
    assert [t.prompt.index for t in collected.trajectories[::2]] == [0, 1, 7]


def test_groups_are_numbered_and_answers_carry_what_was_sampled():
    engine = Scripted("1", "22")
    engine.version = 5
    collected = collector(engine).collect(["a", "b"], samples=2)
    assert [t.group for t in collected.trajectories] == [0, 0, 1, 1]
    assert collected.rows["group_ids"].tolist() == [0, 0, 1, 1]
    assert collected.rows["rewards"].tolist() == [1, 22, 1, 22]
    assert collected.rows["versions"].unique().tolist() == [0, 5]  # 0 is padding
    assert collected.rows.response_lengths.tolist() == [2, 3, 2, 3]
    assert collected.metrics["reward"] == 11.5
    assert collected.metrics["response_tokens"] == 2.5


def test_an_answer_without_a_reward_is_dropped_and_counted_and_never_zero():
    collected = collector(Scripted("4", "oops", "6", "nan")).collect(["a", "b"], samples=4)
    assert [t.reward for t in collected.trajectories] == [4, 6, 4, 6]
    assert collected.rows["rewards"].tolist() == [4, 6, 4, 6]
    assert collected.metrics["reward"] == 5
    assert collected.metrics["failed_share"] == 0.5
    assert (collected.metrics["outcome/reward_error"], collected.metrics["outcome/reward_not_finite"]) == (
        2,
        2,
    )


def test_a_step_without_any_reward_stops():
    with pytest.raises(RuntimeError, match="no answer of this step has a reward"):
        collector(Scripted("oops"), "rewards.max_failed_share=1.0").collect(["a"], samples=2)


def test_a_group_is_dead_if_its_rewards_are_all_equal():
    collected = collector(Scripted("1", "1", "1", "2", "oops", "3")).collect(["a", "b", "c"], samples=2)
    groups = [[t for t in collected.trajectories if t.group == number] for number in range(3)]
    assert [has_no_signal(group) for group in groups] == [True, False, True]


def test_dynamic_sampling_replaces_dead_groups_by_fresh_prompts():
    engine = Scripted("1", "1", "1", "2", "3", "3", "4", "5")
    collected = collector(engine, "algorithm.dynamic_sampling=true").collect(
        ["dead", "alive"], samples=2, refill=fresh
    )
    assert [len(prompts) for prompts, _ in engine.calls] == [2, 1, 1]
    assert [t.reward for t in collected.trajectories] == [1, 2, 4, 5]
    assert [t.group for t in collected.trajectories] == [1, 1, 3, 3]
    assert collected.metrics["resample_draws"] == 2
    assert collected.metrics["dead_groups_share"] == 0.5
    assert collected.metrics["reward"] == 20 / 8


@pytest.mark.parametrize(("texts", "rewards"), [(("1",), [1] * 4), (("1", "2", "1", "1", "1", "1"), [1, 2])])
def test_dynamic_sampling_goes_on_with_what_it_has_after_so_many_draws(texts, rewards):
    engine = Scripted(*texts)
    limits = ["algorithm.dynamic_sampling=true", "algorithm.max_resamples=1"]
    collected = collector(engine, *limits).collect(["a", "b"], samples=2, refill=fresh)
    assert len(engine.calls) == 2
    assert [t.reward for t in collected.trajectories] == rewards


def test_without_fresh_prompts_or_dynamic_sampling_dead_groups_stay():
    for overrides, refill in (([], fresh), (["algorithm.dynamic_sampling=true"], None)):
        engine = Scripted("1")
        assert len(collector(engine, *overrides).collect(["a"], samples=2, refill=refill).trajectories) == 2
        assert len(engine.calls) == 1


def test_a_step_learns_from_the_share_of_groups_whose_rewards_deviate_most():
    engine = Scripted("1", "2", "1", "4", "3", "3", "0", "2")
    # Deviations of 0.7, 2.1, 0 and 1.4.
    collected = collector(engine, "algorithm.kept_groups_share=0.5").collect(["a"] * 4, samples=2)
    assert sorted({t.group for t in collected.trajectories}) == [1, 3]
    assert collected.metrics["reward"] == 2  # of all answers


def test_long_answers_lose_reward_linearly_over_the_buffer():
    shaping = ["algorithm.overlong_buffer_tokens=4", "algorithm.overlong_penalty=2.0"]
    collected = collector(Scripted("100", "10000", "1000000000"), *shaping).collect(["a"], samples=3)
    # 4, 6 and 8 tokens of at most 8, of which the last 4 cost.
    assert [t.scores["overlong"] for t in collected.trajectories] == [0, -1, -2]
    assert collected.rows["rewards"].tolist() == [100, 9999, 9_999_998]
    assert collected.metrics["score/overlong"] == -1


def test_answers_cut_at_the_limit_are_left_out_of_the_loss_if_asked():
    for override, counted in (("true", [[True] * 2, [False] * 8]), ("false", [[True] * 2, [True] * 8])):
        collected = collector(Scripted("1", "100000000000"), f"algorithm.mask_truncated={override}").collect(
            ["a"], samples=2
        )
        assert [t.response_mask for t in collected.trajectories] == counted
        assert [t.truncated for t in collected.trajectories] == [False, True]
        assert collected.metrics["truncated_share"] == 0.5


def test_no_two_prompts_of_a_run_share_a_seed_and_no_two_runs_do():
    engine = Scripted("1", "1", "1", "2")
    collecting = collector(engine, "algorithm.dynamic_sampling=true")
    for _ in range(2):
        collecting.collect(["same", "same"], samples=2, refill=fresh)
    collector(engine, "seed=1").collect(["same"], samples=2)
    seeds = [wanted.seed for _, params in engine.calls for wanted in params]
    assert len(seeds) == len(set(seeds)) == collecting.dispatched + 1


def test_sampling_settings_reach_the_engine():
    engine = Scripted("1", "2")
    collector(engine, "sampling.temperature=0.7", "sampling.stop=[x]", "sampling.stop_ids=[9]").collect(
        ["a"], samples=3
    )
    wanted = engine.calls[0][1][0]
    assert (wanted.temperature, wanted.max_tokens, wanted.n, wanted.stop, wanted.stop_ids) == (
        0.7,
        8,
        3,
        ("x",),
        (9,),
    )


def test_a_stop_text_that_is_a_token_is_a_stop_id():
    engine = Scripted("1", "2")
    collector(engine, "sampling.stop=[x, <bos>]", "sampling.stop_ids=[9]").collect(["a"], samples=2)
    wanted = engine.calls[0][1][0]
    assert (wanted.stop, wanted.stop_ids) == (("x", "<bos>"), (9, 2))


def test_an_answer_with_an_id_that_is_no_token_has_no_reward_and_says_so():
    class Padded(Scripted):
        def _answer(self, max_tokens):
            good = super()._answer(max_tokens)
            return Completion([100], [-1.0], "length", 0) if self.given == 2 else good

    batch = collector(Padded("1", "2", "3")).collect(["a"], samples=4)
    assert batch.metrics["outcome/unknown_token"] == 1 and batch.rows.num_rows == 3
    failed = next(t for t in batch.trajectories if t.outcome != "ok") if len(batch.trajectories) > 3 else None
    assert failed is None or "the engine sampled the id 100" in failed.detail


def test_the_time_of_generation_and_of_rewards_is_taken_apart():
    collecting = collector(Scripted("1", "2"))
    collecting.collect(["a"], samples=2)
    taken = collecting.clock.take()
    assert taken.keys() == {"time/generate_s", "time/reward_s"}
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in taken.values())


def test_a_greedy_baseline_is_one_more_answer_per_prompt_that_is_not_trained_on():
    engine = Scripted("1", "2", "3", "4", "7", "oops")
    collected = collector_with(engine, greedy_baseline=True).collect(["a", "b"], samples=2)
    assert collected.rows["rewards"].tolist() == [1, 2]
    assert collected.rows["greedy_rewards"].tolist() == [7, 7]
    (greedy,) = {(p.temperature, p.n) for p in engine.calls[1][1]}
    assert greedy == (0.0, 1)
    assert (
        collected.metrics["outcome/no_baseline"] == 2
    )  # the second greedy answer has no reward, so its group cannot be used


def test_a_length_penalty_compares_the_answers_of_a_group():
    penalty = bind(Choice(name="kimi_length"), LENGTH_PENALTIES)
    collected = collector_with(Scripted("1", "100", "-5", "-500"), length_penalty=penalty).collect(
        ["a"], samples=4
    )
    # Lengths 2, 4, 3 and 5: lambda 1/2, -1/6, 1/6 and -1/2, and a wrong answer earns nothing by being short.
    assert [t.scores["length"] for t in collected.trajectories] == pytest.approx([0.5, -1 / 6, 0, -0.5])
    assert collected.rows["rewards"].tolist() == pytest.approx([1.5, 100 - 1 / 6, -5, -500.5])


def test_an_answer_in_the_overlong_buffer_is_still_a_right_one_among_its_siblings():
    penalty = bind(Choice(name="relative_length"), LENGTH_PENALTIES)
    collected = collector_with(
        Scripted("1", "1.00000"), "algorithm.overlong_buffer_tokens=4", length_penalty=penalty
    ).collect(["a"], samples=2)
    # Both right: lengths 2 and 8 are one deviation below and above their mean.
    assert [t.scores["length"] for t in collected.trajectories] == pytest.approx([-0.0269, -0.0731], abs=1e-4)
    assert [t.scores["overlong"] for t in collected.trajectories] == [0, -1]


def test_each_reward_function_and_what_shapes_the_reward_are_parts_of_it():
    overrides = [
        "algorithm.overlong_buffer_tokens=4",
        'rewards.functions=[{name: "tests.agents.test_collector:long", weight: 0.5}]',
    ]
    collected = collector_with(Scripted("1", "1234567"), *overrides).collect(["a"], samples=2)
    assert collected.rows["reward_weights"].tolist() == [[0.5, 1, 1]] * 2
    assert collected.rows["reward_parts"].tolist() == [[1, 1, 0], [7, 1234567, -1]]


def test_a_group_of_equal_sums_is_dead_unless_the_parts_are_compared():
    overrides = [
        "algorithm.dynamic_sampling=true",
        'rewards.functions=[{name: "tests.agents.test_collector:long", weight: -1.0}]',
    ]
    shares = {}
    for by_parts in (False, True):
        # Values 1 and 2, lengths 1 and 2 that count against them: both rewards are 0.
        collected = collector_with(Scripted("1", "02"), *overrides, by_parts=by_parts).collect(
            ["a"], samples=2
        )
        shares[by_parts] = collected.metrics["dead_groups_share"]
        assert collected.rows["rewards"].tolist() == [0, 0]
    assert shares == {False: 1, True: 0}


def test_dynamic_sampling_keeps_a_group_whose_parts_differ():
    overrides = [
        "algorithm.dynamic_sampling=true",
        'rewards.functions=[{name: "tests.agents.test_collector:long", weight: -1.0}]',
    ]
    collected = collector_with(Scripted("1", "02"), *overrides, by_parts=True).collect(
        ["a"], samples=2, refill=lambda n: ["b"] * n
    )
    assert collected.metrics["resample_draws"] == 0 and collected.rows["reward_parts"].tolist() == [
        [1, 1],
        [2, 2],
    ]


def long(prompt, response):
    return len(response)


def test_without_rewards_answers_are_kept_as_they_are():
    engine = Scripted("1", "x")
    collected = DataCollector(engine, tiny_codec(), None, load_config("grpo")).collect(["a"], samples=2)
    assert "rewards" not in collected.rows and "reward" not in collected.metrics
    assert (collected.rows.num_rows, collected.metrics["failed_share"]) == (2, 0)


def test_a_prompt_that_servers_refuse_is_an_error_unless_another_takes_its_place():
    with pytest.raises(RuntimeError, match="all 2 prompts, got none to 1: prompt too long for the server"):
        collector(Server()).collect(["abcdef", "b"], samples=2)
    collected = collector(Server()).collect(["abcdef", "b"], samples=2, refill=lambda n: ["c"] * n)
    assert [t.prompt.content for t in collected.trajectories] == ["b", "b", "c", "c"]


def asked(*texts, n=1):
    return [(Prompt(text, index=i), SamplingParams(n=n, max_tokens=4)) for i, text in enumerate(texts)]


def test_an_engine_in_turn_answers_one_portion_after_the_other():
    engine, kept = Scripted("1", "2", "3"), []
    portions = [asked("a", "b"), asked("c")]
    collector(engine).answer_each(portions, lambda groups: kept.append((len(engine.calls), groups)))
    assert [calls for calls, _ in kept] == [1, 2]
    rewards = [(number, [t.reward for t in group]) for _, groups in kept for number, group in groups]
    assert rewards == [(0, [1.0]), (1, [2.0]), (2, [3.0])]


def test_servers_hand_over_what_is_complete_and_are_asked_for_all_at_once():
    running, most, kept = 0, 0, []

    class Counted(Server):
        async def sample(self, prompt_ids, params, affinity=None):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            return await super().sample(prompt_ids, params, affinity)

    collector(Counted()).answer_each([asked("a", n=3)] * 30, kept.append)
    assert most == 90
    assert [sum(len(group) for _, group in groups) for groups in kept] == [66, 24]
    assert sorted(number for groups in kept for number, _ in groups) == list(range(30))
    assert all(t.reward == 7.0 for groups in kept for _, group in groups for t in group)


def test_a_failed_prompt_ends_all_and_too_many_failed_rewards_keep_their_portion_back():
    with pytest.raises(RefusedError):
        collector(Server()).answer_each([asked("a", "long prompt")], lambda groups: None)
    kept, failing = [], Scripted("1", "x", "x", "x")
    with pytest.raises(RuntimeError, match="3 of 4 have none"):
        collector(failing).answer_each([asked("a", "b"), asked("c", "d")], kept.append)
    assert len(kept) == 1
