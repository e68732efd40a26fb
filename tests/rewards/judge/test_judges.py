"""Judges of one answer, of pairs and of groups: questions, values, options, and a judge that a run serves."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from tests.rewards.answers import CHAT, rows
from tests.rewards.judge.chat_endpoint import Play, chat_endpoint, said
from tests.rewards.judge.judged import judging, rewarded
from tests.rollout.servers import tiny_model
from verl.config.data import RewardsConfig
from verl.rewards.functions import build_rewards
from verl.rewards.judge.absolute import ScoreJudge
from verl.rewards.judge.judge_options import JudgeOptions, PairwiseOptions, RankingOptions, ScoreOptions
from verl.rewards.judge.pairwise import PairwiseJudge, sibling_pairs
from verl.rewards.judge.ranking import RankingJudge
from verl.rewards.parameters import CallContext
from verl.utils.sampling_types import Prompt

HERE = {"address": "http://127.0.0.1:9", "model": "m"}


@pytest.fixture
def endpoint():
    with chat_endpoint() as endpoint:
        yield endpoint


def blocks(body, tag):
    """Texts of the blocks of a question."""
    return re.findall(rf"<{tag}\b[^>]*>\n(.*?)\n</{tag}>", body["messages"][-1]["content"], re.DOTALL)


def longer_wins(body):
    """A judge that prefers the longer answer."""
    (a,), (b,) = blocks(body, "response_a"), blocks(body, "response_b")
    winner = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return said(json.dumps({"winner": winner}))


def by_length(body):
    """A judge that gives a tenth for each character."""
    scores = [{"id": i, "score": len(text) / 10} for i, text in enumerate(blocks(body, "response"), 1)]
    return said(json.dumps({"scores": scores}))


def test_the_question_has_prompt_reference_and_answer_and_the_score_is_mapped(endpoint, tmp_path):
    with judging(endpoint, tmp_path, rubric="Be brief.", threshold=7, scale=[0, 8]) as (rewards, _, _):
        (row,) = rewarded(rewards, rows("Paris", content=CHAT, answer="paris"))
    (body,) = endpoint.bodies
    assert blocks(body, "prompt") == ["system: be brief\n\nuser: q"]
    assert blocks(body, "reference") == ["paris"] and blocks(body, "response") == ["Paris"]
    assert blocks(body, "rubric") == ["Be brief."] and "from 0 (worst) to 8 (best)" in endpoint.texts[0]
    assert body["temperature"] == 0 and [m["role"] for m in body["messages"]] == ["system", "user"]
    assert row.scores == {"judge": 7 / 8, "accuracy": 1.0}
    assert row.extras == {"judge/reply": '{"score": 7}'}
    assert row.logged["judge/input_tokens"] == 100 and row.logged["judge/total_calls"] == 2


def test_fields_that_a_server_refuses_can_be_left_out_and_others_added(endpoint, tmp_path):
    options = {"max_tokens": None, "temperature": None, "extra": {"max_completion_tokens": 9}}
    with judging(endpoint, tmp_path, system_role=False, **options) as (rewards, _, _):
        rewarded(rewards, rows("x"))
    (body,) = endpoint.bodies
    assert body.keys() == {"model", "messages", "max_completion_tokens"} and len(body["messages"]) == 1
    assert endpoint.texts[0].startswith("You are a strict")


def test_samples_are_averaged(endpoint, tmp_path):
    with judging(endpoint, tmp_path, samples=3, temperature=1.0, concurrency=1, retries=0) as (rewards, _, _):
        endpoint.replies = [said("Score: 4"), said("nonsense"), said("Score: 10")]
        (row,) = rewarded(rewards, rows("x"))
    assert row.reward == pytest.approx((3 / 9 + 9 / 9) / 2) and len(endpoint.bodies) == 3


def test_scores_can_be_weighed_by_their_probabilities(endpoint, tmp_path):
    first = json.loads(said('{"score": 4}').text)
    entries = [{"token": t, "logprob": 0.0, "top_logprobs": []} for t in ('{"score": ', "4", "}")]
    entries[1] |= {"logprob": -0.693147, "top_logprobs": [{"token": "2", "logprob": -0.693147}]}
    first["choices"][0]["logprobs"] = {"content": entries}
    with judging(endpoint, tmp_path, logprobs=True, scale=[1, 5]) as (rewards, _, _):
        endpoint.answer = lambda body: Play(json.dumps(first))
        (row,) = rewarded(rewards, rows("x"))
    assert row.reward == pytest.approx(0.5, abs=1e-5) and endpoint.bodies[0]["top_logprobs"] == 20


def test_a_prefill_is_continued_by_the_server_and_is_part_of_the_reply(endpoint, tmp_path):
    first = json.loads(said(" 4}").text)
    entries = [{"token": t, "logprob": 0.0} for t in (" ", "4", "}")]
    first["choices"][0]["logprobs"] = {"content": entries}
    endpoint.answer = lambda body: Play(json.dumps(first))
    options = {"prefill": '{"score":', "logprobs": True, "scale": [1, 5], "max_tokens": 4}
    with judging(endpoint, tmp_path, **options) as (rewards, _, _):
        (row,) = rewarded(rewards, rows("x"))
    (body,) = endpoint.bodies
    assert body["messages"][-1] == {"role": "assistant", "content": '{"score":'}
    assert body["continue_final_message"] and not body["add_generation_prompt"]
    assert row.reward == 0.75 and row.extras["judge/reply"] == '{"score": 4}'


def test_a_template_of_the_user_names_columns_and_needs_what_it_names(endpoint, tmp_path):
    path = tmp_path / "question.jinja"
    path.write_text("Level {{ level }}.\n{{ prompt }}\n{{ reference }}\n{{ response }}\nScore it.")
    with judging(endpoint, tmp_path, template=str(path)) as (rewards, judge, _):
        rewarded(rewards, rows("x", level=3))
        with pytest.raises(ValueError, match="need the column level for the judge's template, got other"):
            rewards.check_data([Prompt("q", answer="a", columns={"other": 1})])
        with pytest.raises(ValueError, match="need a reference answer for the judge"):
            judge.check(Prompt("q", columns={"level": 1}))
    assert endpoint.texts[0].startswith("Level 3.\n<prompt>\nq\n</prompt>\n<reference>\na")


@pytest.mark.parametrize(
    ("kind", "options", "cause"),
    [
        (JudgeOptions, {}, "either `address`.*or `path`"),
        (JudgeOptions, {**HERE, "path": "m"}, "either `address`.*or `path`"),
        (JudgeOptions, {"address": "localhost:1", "model": "m"}, "begins with http"),
        (JudgeOptions, {"address": "http://a"}, "need `model`"),
        (JudgeOptions, {"path": "a", "api_key_env": "K"}, "beside `address` alone"),
        (JudgeOptions, {**HERE, "samples": 3}, "temperature above 0 for 3 samples"),
        (JudgeOptions, {**HERE, "max_cost": 1}, "input_price or output_price"),
        (JudgeOptions, {**HERE, "max_cost": 1, "input_price": 1, "max_tokens": None}, "has no bound"),
        (JudgeOptions, {**HERE, "retires": 3}, "no option 'retires'; the nearest is retries"),
        (JudgeOptions, {**HERE, "retries": -1}, "retries: .*greater than or equal to 0"),
        (ScoreOptions, {**HERE, "scale": [10, 1]}, "from the worst to the best"),
        (ScoreOptions, {**HERE, "threshold": 11}, "threshold on the scale"),
        (ScoreOptions, {**HERE, "logprobs": True}, "one digit"),
        (RankingOptions, {**HERE, "max_group": 2}, "max_group"),
        (PairwiseOptions, {**HERE, "against": "all"}, "against"),
    ],
)
def test_options_that_are_wrong_are_refused(kind, options, cause):
    judges = {ScoreOptions: ScoreJudge, RankingOptions: RankingJudge, PairwiseOptions: PairwiseJudge}
    with pytest.raises(ValueError, match=cause):
        judges.get(kind, ScoreJudge)(options)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("opponents", [1, 2, 3, None])
def test_each_answer_has_as_many_pairs_and_no_pair_is_there_twice(count, opponents):
    pairs = sibling_pairs(count, opponents)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) and all(a != b for a, b in pairs)
    if opponents is None or 2 * opponents >= count - 1:
        assert set(map(frozenset, pairs)) == set(map(frozenset, combinations(range(count), 2)))
    else:
        assert len(pairs) == count * opponents
        assert {sum(i in pair for pair in pairs) for i in range(count)} == {2 * opponents}


def test_a_pairwise_reward_is_the_share_of_wins_among_siblings_alone(endpoint, tmp_path):
    endpoint.answer = longer_wins
    first = rows("a", "bb", "ccc", "bb")
    other = rows("dddd", "e", content="another")
    with judging(endpoint, tmp_path, PairwiseJudge, opponents=None) as (rewards, _, _):
        rewarded(rewards, [*first, *other])
    assert [t.reward for t in first] == [0.0, pytest.approx(0.5), 1.0, pytest.approx(0.5)]
    assert [t.reward for t in other] == [1.0, 0.0]
    assert first[0].logged["judge_pairwise/order_conflicts"] == 0
    # Equal texts tie without a question; two equal answers share their questions.
    assert len(endpoint.bodies) == 2 * (3 + 1)


def test_both_orders_cancel_a_judge_that_always_prefers_the_first(endpoint, tmp_path):
    endpoint.answer = lambda body: said("[[A]]")
    with judging(endpoint, tmp_path, PairwiseJudge) as (rewards, _, _):
        both = rewarded(rewards, rows("a", "b"))
    with judging(endpoint, tmp_path, PairwiseJudge, both_orders=False) as (rewards, _, _):
        one = rewarded(rewards, rows("a", "b"))
    assert [t.reward for t in both] == [0.5, 0.5] and [t.reward for t in one] == [1.0, 0.0]
    assert both[0].logged["judge_pairwise/order_conflicts"] == 1


def test_answers_are_compared_with_the_reference(endpoint, tmp_path):
    endpoint.answer = longer_wins
    with judging(endpoint, tmp_path, PairwiseJudge, against="reference") as (rewards, _, _):
        answers = rewarded(rewards, rows("long", "a", "", answer="a"))
        with pytest.raises(ValueError, match="need a reference answer"):
            rewards.check_data([Prompt("q")])
    assert [t.reward for t in answers] == [1.0, 0.5, 0.0]


def test_a_single_answer_has_nothing_to_be_compared_with(endpoint, tmp_path):
    with judging(endpoint, tmp_path, PairwiseJudge) as (rewards, _, _):
        (row,) = rewarded(rewards, rows("x"))
    assert (row.reward, row.outcome, endpoint.bodies) == (None, "reward_not_applicable", [])


def test_a_pair_without_a_verdict_in_one_order_does_not_count(endpoint, tmp_path):
    def half(body):
        return said("hm") if blocks(body, "response_a") == ["ccc"] else longer_wins(body)

    with judging(endpoint, tmp_path, PairwiseJudge, opponents=None, retries=0) as (rewards, _, _):
        endpoint.answer = half
        short, middle, long = rewarded(rewards, rows("a", "bb", "ccc"))
    assert (short.reward, middle.reward, long.outcome) == (0.0, 1.0, "judge_unreadable")
    assert long.logged == {} and short.logged["judge_pairwise/failures"] == pytest.approx(2 / 3)


def test_a_ranking_is_one_question_for_a_group(endpoint, tmp_path):
    endpoint.answer = by_length
    first, other = rows("a", "bb", "ccc", "bb"), rows("dddd", "e", content="another")
    same = rows("f" * 5)
    same[0].group = 1  # Another group of the same prompt.
    with judging(endpoint, tmp_path, RankingJudge) as (rewards, _, _):
        rewarded(rewards, [*first, *other, *same])
    assert [t.reward for t in first] == [0.1, 0.2, 0.3, 0.2]
    assert [t.reward for t in other] == [0.4, 0.1] and same[0].reward == 0.5
    assert sorted(len(blocks(body, "response")) for body in endpoint.bodies) == [1, 2, 3]
    assert all(len(blocks(body, "prompt")) == 1 for body in endpoint.bodies)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_a_large_group_is_split_into_parts_with_common_answers(endpoint, tmp_path, shift):
    calls = []

    def play(body):
        texts = blocks(body, "response")
        calls.append(set(texts))
        moved = shift if len(calls) > 2 else 0.0  # after the first question of the start and the first part
        return said(json.dumps({"scores": {i: len(t) / 20 + moved for i, t in enumerate(texts, 1)}}))

    endpoint.answer = play
    texts = ["x" * i for i in range(1, 11)]
    with judging(endpoint, tmp_path, RankingJudge, max_group=5, concurrency=1) as (rewards, _, _):
        answers = rewarded(rewards, rows(*texts))
    assert [t.reward for t in answers] == pytest.approx([i / 20 for i in range(1, 11)])
    parts = calls[1:]
    assert [len(part) for part in parts] == [5, 5, 4] and len(parts[0] & parts[1] & parts[2]) == 2


def test_a_ranking_that_misses_an_answer_is_asked_for_again(endpoint, tmp_path):
    with judging(endpoint, tmp_path, RankingJudge, retries=1) as (rewards, _, _):
        endpoint.replies = [said('{"scores": {"1": 0.5}}'), said('{"scores": {"1": 0.5, "2": 1}}')]
        good = rewarded(rewards, rows("a", "b"))
        endpoint.replies = [said('{"scores": [{"id": 1, "score": 0}, {"id": 1, "score": 0}]}')] * 2
        bad = rewarded(rewards, rows("c", "d"))
    assert sorted(t.reward for t in good) == [0.5, 1.0] and "has no effect" in endpoint.texts[1]
    assert [t.outcome for t in bad] == ["judge_unreadable"] * 2 and "two scores of response 1" in bad[
        0
    ].detail


def test_judges_are_named_in_the_settings_and_say_how_the_first_question_went(endpoint, tmp_path):
    endpoint.answer = lambda body: said("I cannot judge that.")
    notes = []
    choice = {"name": "judge", "address": endpoint.address + "/v1/", "model": "m", "weight": 0.5}
    rewards = build_rewards(
        RewardsConfig(functions=[choice, choice]), context=CallContext(folder=tmp_path), note=notes.append
    )
    endpoint.answer = lambda body: said("Score: 10")
    (row,) = rewarded(rewards, rows("x"))
    rewards.close()
    assert row.reward == 1.0 and row.scores == {"judge": 1.0, "judge_2": 1.0}
    assert {"judge/calls", "judge_2/judge/calls"} <= row.logged.keys()
    assert re.fullmatch(r"judge: m at \S+ answered a first question in \d+\.\d s", notes[0])
    assert "has no verdict" in notes[1] and len(notes) == 4
    (failed,) = rewarded(rewards, rows("y"))
    assert failed.outcome == "reward_error" and "the judge is closed" in failed.detail


@pytest.mark.servers
def test_a_run_serves_its_judge_itself(tmp_path):
    model = tiny_model(tmp_path / "model")
    choice = {"name": "judge", "path": str(model), "max_tokens": 4, "retries": 1, "device": "cpu"}
    notes = []
    rewards = build_rewards(
        RewardsConfig(functions=[choice]), context=CallContext(folder=tmp_path / "run"), note=notes.append
    )
    (row,) = rewarded(rewards, rows("12"))
    rewards.close()
    # A random model gives no verdict.
    assert row.outcome == "judge_unreadable" and "serving" in (tmp_path / "run" / "judge.log").read_text()
    assert "answered a first question" in notes[0] and "has no verdict" in notes[1]


def test_every_option_is_on_the_page_of_judges():
    page = (Path(__file__).parents[3] / "docs" / "judges.md").read_text(encoding="utf-8")
    options = {*ScoreOptions.model_fields, *PairwiseOptions.model_fields, *RankingOptions.model_fields}
    assert [name for name in options if f"`{name}`" not in page] == []
