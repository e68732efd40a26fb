"""mean@k and pass@k by hand, and that they are the same whenever they are asked for."""

from __future__ import annotations

import math

import pytest

from tests.tiny import tiny_codec
from tests.training import toy_trainer
from verl.agents.group_sampler import evaluation_params
from verl.config import load_config
from verl.data.trajectory import Trajectory
from verl.trainer.evaluation import answer_all, summarize
from verl.utils.sampling_types import Prompt


def answer(reward, accuracy=None, *, tokens=1, truncated=False):
    scores = {} if accuracy is None else {"accuracy": accuracy}
    known = {"reward": reward, "scores": scores, "outcome": "reward_error" if reward is None else "ok"}
    known["text"] = "yes" if accuracy else "no"
    return Trajectory(
        Prompt(""), [1], [2] * tokens, [True] * tokens, None, [0] * tokens, 0, truncated, **known
    )


def test_mean_and_pass_at_k_are_taken_over_answers_and_over_prompts():
    groups = [
        [answer(1.0, 1.0), answer(0.0, 0.0)],  # one vote each: half won
        [answer(0.5, 0.0, tokens=3), answer(0.5, 0.0, truncated=True)],
    ]
    metrics = summarize(groups)
    assert 0 < metrics.pop("eval/accuracy_low") < 0.25 < metrics.pop("eval/accuracy_high") < 1
    assert metrics == {
        "eval/reward": 0.5,
        "eval/accuracy": 0.25,
        "eval/pass@2": 0.5,
        "eval/maj@2": 0.25,
        "eval/response_tokens": 1.5,
        "eval/truncated_share": 0.25,
        "eval/failed_share": 0.0,
    }


def test_an_answer_without_a_reward_has_none_and_is_not_right():
    metrics = summarize([[answer(1.0, 1.0)], [answer(None)]])
    assert (metrics["eval/reward"], metrics["eval/accuracy"], metrics["eval/failed_share"]) == (1.0, 0.5, 0.5)
    assert "eval/pass@1" not in metrics


def test_rewards_without_accuracy_have_no_accuracy():
    assert summarize([[answer(0.5)]]).keys() & {"eval/accuracy", "eval/pass@1"} == set()
    assert math.isnan(summarize([[answer(None)]])["eval/reward"])


def test_a_run_without_rewards_has_no_reward_and_no_failures_to_show(letters, tmp_path):
    trainer = toy_trainer(
        "distillation",
        letters,
        tmp_path,
        "rewards.functions=[]",
        "evaluation.every_steps=1",
        "evaluation.prompts=2",
    )
    assert trainer.evaluate().keys() == {"eval/response_tokens", "eval/truncated_share", "eval/failed_share"}
    assert trainer.evaluate()["eval/failed_share"] == 0


@pytest.mark.parametrize("samples", [1, 3])
def test_the_same_weights_are_measured_the_same_at_any_time(samples, letters, tmp_path):
    trainer = toy_trainer(
        "grpo",
        letters,
        tmp_path,
        "evaluation.every_steps=1",
        f"evaluation.samples={samples}",
        "evaluation.prompts=4",
    )
    first = trainer.evaluate()
    trainer.collect_data(trainer.loader.take(4))
    assert trainer.evaluate() == first
    groups = answer_all(trainer.collector, trainer.test_prompts, trainer.config)
    assert [len(group) for group in groups] == [samples] * 4
    assert [t.prompt.index for group in groups for t in group[:1]] == [0, 1, 2, 3]


def test_evaluation_has_a_temperature_of_its_own_and_no_length_shaping(letters, tmp_path):
    trainer = toy_trainer("dapo", letters, tmp_path, "evaluation.every_steps=1", "evaluation.temperature=0")
    (first,), *_ = answer_all(trainer.collector, trainer.test_prompts, trainer.config)
    (second,), *_ = answer_all(trainer.collector, trainer.test_prompts[:1], trainer.config)
    assert first.response_ids == second.response_ids
    assert "overlong" not in first.scores


def test_an_evaluation_samples_as_training_does_except_for_what_it_sets():
    training = ["sampling.top_k=5", "sampling.max_tokens=7", "algorithm.correction=recompute"]
    same = evaluation_params(load_config("grpo", training), tiny_codec(), 3)
    assert (same.n, same.temperature, same.top_p, same.top_k, same.max_tokens) == (3, 1.0, 1.0, 5, 7)
    own = ["temperature=0.6", "top_p=0.9", "max_tokens=9", "repetition_penalty=1.1", "every_steps=1"]
    params = evaluation_params(
        load_config("grpo", [*training, "data.test=task:copy-8", *(f"evaluation.{o}" for o in own)]),
        tiny_codec(),
        1,
    )
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 5)
    assert (params.max_tokens, params.repetition_penalty) == (9, 1.1)
