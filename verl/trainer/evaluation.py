"""Evaluation of a policy on held-out prompts: mean@k and pass@k."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from verl.agents.collector import DataCollector
from verl.agents.group_sampler import evaluation_params
from verl.config.run import PairsConfig, SFTConfig, TrainerConfig
from verl.data.batch import Trajectory
from verl.data.reading.sources import sources_of
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

# Seeds of training count prompts from 0; those of evaluation start far beyond them.
_FIRST_SEED = 1 << 62


def evaluation_schedule(config: TrainerConfig | SFTConfig | PairsConfig) -> tuple[int, bool]:
    """Steps between evaluations (0: none at all), and True if one comes before the first step.

    Without `every_steps` there is one before the first and one after the last step.
    """
    every_steps, at_start = config.evaluation.every_steps, config.evaluation.at_start
    if isinstance(config, PairsConfig) and every_steps == 0:
        every_steps = config.eval_every_steps
    if config.data.test is None or every_steps is None:
        return 0, False
    return every_steps or sys.maxsize, at_start


def evaluation_size(prompts: Sequence[Prompt], config: TrainerConfig) -> str:
    """The number of prompts and answers of an evaluation, in words."""
    k = config.evaluation.samples
    sources = ", ".join(one.path for one in sources_of(config.data.test))
    return f"{len(prompts)} prompts of {sources}" + (f", {k} answers each" if k > 1 else "")


def answer_all(
    collector: DataCollector, prompts: Sequence[Prompt], config: TrainerConfig
) -> list[list[Trajectory]]:
    """`config.evaluation.samples` rewarded answers to every prompt.

    The seeds are fixed, so the same weights always give the same answers.
    """
    sampling = evaluation_params(config, collector.codec, config.evaluation.samples)
    return collector.answer(prompts, [replace(sampling, seed=_FIRST_SEED + i) for i in range(len(prompts))])


def evaluate(collector: DataCollector, prompts: Sequence[Prompt], config: TrainerConfig) -> dict[str, float]:
    """Answer the prompts, and return the metrics of `summarize`."""
    return summarize(answer_all(collector, prompts, config))


def summarize(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """Metrics of answered groups of k answers each.

    Returns:
        eval/reward: mean reward of the answers that have one, NaN if rewards failed; absent in a run without
            reward functions.
        eval/accuracy: mean@k, the share of correct answers; an answer without a reward counts as wrong.
        eval/pass@k: share of prompts with at least one correct answer; only for k > 1.
        eval/response_tokens, eval/truncated_share, eval/failed_share: means over answers.
        The accuracies are absent if no reward function gives `accuracy`.
    """
    answers = [t for group in groups for t in group]
    rewards = [t.reward for t in answers if t.reward is not None]
    failed = [t for t in answers if t.outcome != "ok"]
    metrics = {}
    if rewards or failed:
        metrics["eval/reward"] = sum(rewards) / len(rewards) if rewards else float("nan")
    metrics |= {
        "eval/response_tokens": sum(len(t.response_ids) for t in answers) / len(answers),
        "eval/truncated_share": sum(t.truncated for t in answers) / len(answers),
        "eval/failed_share": len(failed) / len(answers),
    }
    if any("accuracy" in t.scores for t in answers):
        correct = [[t.scores.get("accuracy", 0.0) for t in group] for group in groups]
        metrics["eval/accuracy"] = sum(map(sum, correct)) / len(answers)
        k = max(len(group) for group in groups)
        if k > 1:
            metrics[f"eval/pass@{k}"] = sum(max(group) >= 1 for group in correct) / len(groups)
    return metrics


def sample_row(trajectory: Trajectory, codec: TextCodec) -> dict[str, Any]:
    """One answer as a row for readers.

    Returns:
        prompt: the text of the prompt, or of its last message.
        prompt_text, response_text: prompt and answer as the model reads and writes them, with special tokens.
        response: the text that the reward functions get.
        prompt_tokens, tokens: lengths of prompt and answer.
        columns: the other columns of the row in the data.
        extras: values that the reward functions logged.
        reference, reward, scores, truncated, mean_logprob, group, outcome, detail: see `Trajectory`.
    """
    t = trajectory
    content = t.prompt.content
    logprobs = t.rollout_logprobs or []
    return {
        "prompt": content if isinstance(content, str) else content[-1].get("content", ""),
        "prompt_text": codec.decode_all(t.prompt_ids),
        "response": t.text,
        "response_text": codec.decode_all(list(t.response_ids)),
        "reference": t.prompt.answer,
        "reward": t.reward,
        "scores": t.scores,
        "truncated": t.truncated,
        "prompt_tokens": len(t.prompt_ids),
        "tokens": len(t.response_ids),
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "group": t.group,
        "outcome": t.outcome,
        "detail": t.detail,
        "columns": t.prompt.columns,
        **({"extras": t.extras} if t.extras else {}),
    }
