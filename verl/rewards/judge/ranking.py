"""`judge_ranking`: a judge sees all answers of a group at once, and scores them relative to each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

from typing_extensions import override

from verl.data.trajectory import Trajectory
from verl.rewards.failures import RewardFailure
from verl.rewards.judge.endpoint import Question
from verl.rewards.judge.judge_options import RankingOptions
from verl.rewards.judge.judge_prompts import RANKING_SYSTEM, RANKING_TEMPLATE, block
from verl.rewards.judge.judging import Judge, Judgement, group_rows, settled
from verl.rewards.judge.spending import Tally
from verl.rewards.judge.verdicts import ReadVerdict, Reply, ranking_in
from verl.utils.sampling_types import Prompt

Scores = Mapping[str, float]


class RankingJudge(Judge):
    """Score of each answer in [0, 1], relative to its siblings: one question for a group.

    The idea is RULER's, of OpenPipe's ART: it is easier to compare answers than to score one alone, and a
    group-relative advantage needs no more. Equal answers are shown once.
    """

    name: ClassVar[str] = "judge_ranking"
    kind = RankingOptions
    source = RANKING_TEMPLATE
    fields = ("responses",)
    options: RankingOptions

    @override
    async def judge(self, rows: Sequence[Trajectory], tally: Tally) -> Judgement:
        groups = group_rows(rows)
        results = await settled(
            [self._rank(rows[group[0]].prompt, [rows[i].text for i in group], tally) for group in groups]
        )
        values: list[float | RewardFailure] = [0.0] * len(rows)
        texts = [""] * len(rows)
        for group, (scores, reply) in zip(groups, results, strict=True):
            for i in group:
                values[i] = scores if isinstance(scores, RewardFailure) else scores[rows[i].text]
                texts[i] = reply
        return Judgement(values, texts)

    @override
    def example(self, prompt: Prompt) -> tuple[Question, ReadVerdict]:
        return self._question(prompt, ["4", "5"])

    async def _rank(
        self, prompt: Prompt, texts: Sequence[str], tally: Tally
    ) -> tuple[Scores | RewardFailure, str]:
        """Score of each text, and the first reply."""
        # By a hash: the order in the question says nothing, and is the same in the next run.
        shown = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
        most = self.options.max_group
        if len(shown) <= most:
            return await self._rank_part(prompt, shown, tally)
        scores, reply = await self._rank_part(prompt, shown[:most], tally)
        if isinstance(scores, RewardFailure):
            return scores, reply
        # The worst and the best answer are in every part, which is moved to where they were in the first.
        order = sorted(shown[:most], key=lambda text: scores[text])
        anchors, rest = [order[0], order[-1]], shown[most:]
        parts = [rest[i : i + most - 2] for i in range(0, len(rest), most - 2)]
        ranked = await settled([self._rank_part(prompt, [*anchors, *part], tally) for part in parts])
        joined = dict(scores)
        for part, (own, _) in zip(parts, ranked, strict=True):
            if isinstance(own, RewardFailure):
                return own, reply
            moved = sum(scores[anchor] - own[anchor] for anchor in anchors) / len(anchors)
            joined |= {text: min(1.0, max(0.0, own[text] + moved)) for text in part}
        return joined, reply

    async def _rank_part(
        self, prompt: Prompt, texts: Sequence[str], tally: Tally
    ) -> tuple[Scores | RewardFailure, str]:
        try:
            question, read = self._question(prompt, texts)
        except ValueError as error:
            return RewardFailure("reward_error", str(error)), ""
        verdicts = await self.verdicts(question, read, tally)
        if isinstance(verdicts, RewardFailure):
            return verdicts, ""
        columns = zip(*(verdict.value for verdict in verdicts), strict=True)
        means = [sum(column) / len(verdicts) for column in columns]
        return dict(zip(texts, means, strict=True)), verdicts[0].text

    def _question(self, prompt: Prompt, texts: Sequence[str]) -> tuple[Question, ReadVerdict]:
        blocks = [block("response", text, id=i) for i, text in enumerate(texts, 1)]
        ids = "1" if len(texts) == 1 else f"1 to {len(texts)}"
        form = (
            f"{self.form} that has each id "
            f'({ids}) once: {{"scores": [{{"id": 1, "score": s}}, ...]}}, with s from 0 to 1.'
        )

        def read(reply: Reply) -> list[float]:
            return ranking_in(reply, len(texts), quotable="\n".join(texts))

        return Question(RANKING_SYSTEM, self.question(prompt, {"responses": "\n\n".join(blocks)}), form), read
