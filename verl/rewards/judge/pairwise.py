"""`judge_pairwise`: a judge compares an answer with its siblings, or with the reference answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar

from typing_extensions import override

from verl.data.trajectory import Trajectory
from verl.rewards.failures import RewardFailure
from verl.rewards.judge.endpoint import Question
from verl.rewards.judge.judge_options import PairwiseOptions
from verl.rewards.judge.judge_prompts import PAIRWISE_SYSTEM, PAIRWISE_TEMPLATE, block, column_text
from verl.rewards.judge.judging import Judge, Judgement, group_rows, settled
from verl.rewards.judge.spending import Tally
from verl.rewards.judge.verdicts import ReadVerdict, Reply, winner_in
from verl.utils.sampling_types import Prompt

_SHARE_OF_A = {"a": 1.0, "tie": 0.5, "b": 0.0}
_FORM = (
    '{"winner": "A"} if response A is better, {"winner": "B"} if response B is better, {"winner": "tie"} if '
    "they are equally good."
)


class PairwiseJudge(Judge):
    """Share of the comparisons that an answer wins; a tie counts one half.

    LLM-as-a-judge, https://arxiv.org/abs/2306.05685, section 3.1; section 3.4 for the effect of the order,
    which both orders cancel: an answer that wins in one of them alone has won one half.
    """

    name: ClassVar[str] = "judge_pairwise"
    kind = PairwiseOptions
    source = PAIRWISE_TEMPLATE
    fields = ("response_a", "response_b")
    options: PairwiseOptions

    @property
    @override
    def needs_reference(self) -> bool:
        return self.options.against == "reference" or super().needs_reference

    @override
    async def judge(self, rows: Sequence[Trajectory], tally: Tally) -> Judgement:
        pairs = self._pairs(rows)
        results = await settled(
            [self._compare(rows[i].prompt, rows[i].text, other, tally) for i, _, other in pairs]
        )
        shares: list[list[float]] = [[] for _ in rows]
        failures: list[RewardFailure | None] = [None] * len(rows)
        texts: list[list[str]] = [[] for _ in rows]
        for (i, j, _), (share, text, _) in zip(pairs, results, strict=True):
            for row, is_first in [(i, True)] + ([] if j is None else [(j, False)]):
                if isinstance(share, RewardFailure):
                    failures[row] = share
                    continue
                shares[row].append(share if is_first else 1 - share)
                texts[row].append(text)
        # An answer without any opponent: the judge does not apply to it.
        values: list[Any] = [
            sum(won) / len(won) if won else failure for won, failure in zip(shares, failures, strict=True)
        ]
        decided = [conflict for share, _, conflict in results if not isinstance(share, RewardFailure)]
        metrics = {"order_conflicts": sum(decided) / len(decided)} if decided else {}
        return Judgement(values, ["\n\n".join(each) for each in texts], metrics)

    @override
    def example(self, prompt: Prompt) -> tuple[Question, ReadVerdict]:
        return self._question(prompt, "4", "5")

    def _pairs(self, rows: Sequence[Trajectory]) -> list[tuple[int, int | None, str]]:
        """Row, sibling and text of the opponent of each comparison; the reference is no row."""
        if self.options.against == "reference":
            return [(i, None, column_text(row.prompt.answer)) for i, row in enumerate(rows)]
        return [
            (group[a], group[b], rows[group[b]].text)
            for group in group_rows(rows)
            for a, b in sibling_pairs(len(group), self.options.opponents)
        ]

    async def _compare(
        self, prompt: Prompt, first: str, second: str, tally: Tally
    ) -> tuple[float | RewardFailure, str, bool]:
        """Share that the first answer wins, the reply, and True if the two orders disagree."""
        if first == second:
            return 0.5, "the same text", False
        try:
            asked = [self._question(prompt, first, second)]
            asked += [self._question(prompt, second, first)] if self.options.both_orders else []
        except ValueError as error:
            return RewardFailure("reward_error", str(error)), "", False
        orders = await settled([self.verdicts(*each, tally) for each in asked])
        shares = []
        for verdicts in orders:
            if isinstance(verdicts, RewardFailure):
                return verdicts, "", False  # One order alone would bring back the effect of the order.
            shares.append(sum(_SHARE_OF_A[v.value] for v in verdicts) / len(verdicts))
        text = orders[0][0].text if isinstance(orders[0], list) else ""
        if len(shares) == 1:
            return shares[0], text, False
        mean = (shares[0] + 1 - shares[1]) / 2
        return mean, text, shares[0] != 1 - shares[1]

    def _question(self, prompt: Prompt, first: str, second: str) -> tuple[Question, ReadVerdict]:
        fields = {"response_a": block("response_a", first), "response_b": block("response_b", second)}

        def read(reply: Reply) -> str:
            return winner_in(reply, quotable=f"{first}\n{second}")

        return Question(PAIRWISE_SYSTEM, self.question(prompt, fields), f"{self.form}: {_FORM}"), read


def sibling_pairs(count: int, opponents: int | None) -> list[tuple[int, int]]:
    """Pairs of the answers of a group: each with the next `opponents` of a circle, or all with all.

    So an answer is the first of `opponents` pairs and the second of as many.

    Args:
        count: answers in the group.
        opponents: pairs per answer; None, or more than there are: all pairs, once.
    """
    if opponents is None or 2 * opponents >= count - 1:
        return list(combinations(range(count), 2))
    return [(i, (i + step) % count) for step in range(1, opponents + 1) for i in range(count)]
