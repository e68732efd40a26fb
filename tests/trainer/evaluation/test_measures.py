"""Metrics of answers by hand: votes, failures, greedy answers, rewards without accuracy, and several sets."""

from __future__ import annotations

import pytest

from verl.config.run import EvaluationConfig
from verl.trainer.evaluation.intervals import wilson
from verl.trainer.evaluation.measures import (
    AnsweredPrompt,
    ScoredAnswer,
    ks_of,
    mean_over_sets,
    measure,
    outcomes,
    over_sets,
    votes_of,
)
from verl.trainer.run.run_loop import evaluation_words


def answer(accuracy=None, text="", *, extracted=None, reward=None, outcome="ok"):
    reward = accuracy if reward is None and outcome == "ok" else reward
    return ScoredAnswer(reward, accuracy, text, extracted, 3, False, outcome)


def group(*answers, greedy=None):
    return AnsweredPrompt(answers, greedy)


def values(measured):
    return {name: estimate.value for name, estimate in measured.items()}


def test_votes_are_extracted_answers_where_there_are_some():
    assert votes_of([answer(1, "so it is 4"), answer(0, "5")]) == ["so it is 4", "5"]
    extracted = [answer(1, "so it is 4", extracted="4"), answer(0, "no idea", extracted=""), answer(0, "5")]
    assert votes_of(extracted) == ["4", None, None]


def test_a_failed_answer_is_wrong_and_votes_for_nothing_that_others_say():
    answers = [answer(1, "4"), answer(1, "4", outcome="reward_timeout"), answer(0, "5")]
    assert votes_of(answers) == ["4", 1, "5"]
    measured = values(measure([group(*answers)], [1, 3]))
    assert measured["accuracy"] == pytest.approx(1 / 3) and measured["pass@1"] == pytest.approx(1 / 3)
    assert measured["maj@3"] == pytest.approx(1 / 3) and measured["pass@3"] == 1
    assert measured["failed_share"] == pytest.approx(1 / 3)
    assert outcomes([group(*answers)]) == {"ok": 2, "reward_timeout": 1}


def test_greedy_answers_have_metrics_of_their_own():
    prompts = [group(answer(0), greedy=answer(1)) for _ in range(15)]
    prompts += [group(answer(1), greedy=answer(0)) for _ in range(133)]
    measured = measure(prompts, [])
    assert measured["accuracy"].value == pytest.approx(133 / 148)
    greedy = measured["greedy/accuracy"]
    assert (greedy.low, greedy.high) == wilson(15 / 148, 148)
    assert measured["greedy/reward"].value == pytest.approx(15 / 148)


def test_rewards_without_accuracy_have_their_best():
    measured = values(measure([group(answer(reward=0.0), answer(reward=1.0))], [1, 2]))
    assert (measured["reward"], measured["best@1"], measured["best@2"]) == (0.5, 0.5, 1.0)
    assert not {"accuracy", "pass@2", "maj@2"} & measured.keys()


def test_prompts_whose_rewards_give_no_accuracy_are_in_none():
    prompts = [group(answer(1.0)), group(answer(reward=0.3))]
    assert values(measure(prompts, []))["accuracy"] == 1.0
    failed = [group(answer(1.0)), group(answer(outcome="reward_error"))]
    assert values(measure(failed, []))["accuracy"] == 0.5


def test_an_accuracy_of_another_scale_has_no_interval_of_shares():
    measured = measure([group(answer(30.0)), group(answer(50.0))], [])
    assert measured["accuracy"].value == 40 and measured["accuracy"].high > 50


def test_k_are_powers_of_two_and_all_answers_or_those_of_the_settings():
    assert ks_of(EvaluationConfig()) == []
    assert ks_of(EvaluationConfig(samples=2)) == [2]
    assert ks_of(EvaluationConfig(samples=12)) == [2, 4, 8, 12]
    assert ks_of(EvaluationConfig(samples=12, pass_at=(4, 1))) == [1, 4]


def test_the_mean_over_sets_has_what_all_sets_have():
    first = measure([group(answer(1.0))], [])
    second = measure([group(answer(0.0)), group(answer(0.0))], [])
    third = measure([group(answer(reward=0.5))], [])
    assert values(mean_over_sets([first, second]))["accuracy"] == 0.5
    assert "accuracy" not in mean_over_sets([first, third])
    assert values(mean_over_sets([first, second, third]))["reward"] == 0.5


def test_metrics_of_one_set_keep_their_names():
    one = {"eval/loss": 1.0}
    assert over_sets({"math": one}) == one
    assert over_sets({"math": one, "code": {"eval/loss": 3.0, "eval/more": 0.0}}) == {
        "eval/loss": 2.0,
        "eval/math/loss": 1.0,
        "eval/code/loss": 3.0,
        "eval/code/more": 0.0,
    }


def test_the_line_of_an_evaluation_has_intervals_and_the_largest_k():
    metrics = {"eval/accuracy": 0.25, "eval/accuracy_low": 0.2, "eval/accuracy_high": 0.31}
    metrics |= {"eval/pass@2": 0.4, "eval/pass@4": 0.5, "eval/a/pass@2": 0.1, "eval/a/pass@4": 0.3, "lr": 1.0}
    assert evaluation_words(metrics) == ["accuracy 0.25 [0.2, 0.31]", "pass@4 0.5", "a/pass@4 0.3"]
