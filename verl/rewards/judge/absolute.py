"""`judge`: a judge gives each answer a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from verl.data.trajectory import Trajectory
from verl.rewards.failures import RewardFailure
from verl.rewards.judge.endpoint import Question
from verl.rewards.judge.judge_options import ScoreOptions
from verl.rewards.judge.judge_prompts import SCORE_SYSTEM, SCORE_TEMPLATE, block
from verl.rewards.judge.judging import Judge, Judgement, settled
from verl.rewards.judge.spending import Tally
from verl.rewards.judge.verdicts import ReadVerdict, Reply, expected_score, score_in
from verl.utils.sampling_types import Prompt

_TOP_LOGPROBS = 20


class ScoreJudge(Judge):
    """Score of each answer on a scale, mapped to [0, 1].

    LLM-as-a-judge, https://arxiv.org/abs/2306.05685, section 3.1, single answer grading.
    """

    name: ClassVar[str] = "judge"
    kind = ScoreOptions
    source = SCORE_TEMPLATE
    fields = ("response",)
    options: ScoreOptions

    @override
    async def judge(self, rows: Sequence[Trajectory], tally: Tally) -> Judgement:
        results = await settled([self._score(row, tally) for row in rows])
        return Judgement([value for value, _ in results], [text for _, text in results])

    @override
    def example(self, prompt: Prompt) -> tuple[Question, ReadVerdict]:
        return self._question(prompt, "4")

    async def _score(
        self, row: Trajectory, tally: Tally
    ) -> tuple[float | dict[str, float] | RewardFailure, str]:
        try:
            question, read = self._question(row.prompt, row.text)
        except ValueError as error:
            return RewardFailure("reward_error", str(error)), ""
        verdicts = await self.verdicts(question, read, tally)
        if isinstance(verdicts, RewardFailure):
            return verdicts, ""
        score = sum(verdict.value for verdict in verdicts) / len(verdicts)
        low, high = self.options.scale
        reward = (score - low) / (high - low)
        threshold = self.options.threshold
        if threshold is None:
            return reward, verdicts[0].text
        return {"reward": reward, "accuracy": float(score >= threshold)}, verdicts[0].text

    def _question(self, prompt: Prompt, text: str) -> tuple[Question, ReadVerdict]:
        low, high = self.options.scale
        body = self.question(prompt, {"response": block("response", text)})
        form = f'{self.form}: {{"score": n}}, with a number n from {low:g} (worst) to {high:g} (best).'

        def read(reply: Reply) -> float:
            score, place = score_in(reply, low, high, quotable=text)
            return expected_score(reply, place, low, high) if self.options.logprobs else score

        fields = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS} if self.options.logprobs else {}
        return Question(SCORE_SYSTEM, body, form, fields), read
