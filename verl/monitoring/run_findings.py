"""Steps of a run that learn little or nothing: said when they begin, and summed up at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

# A share that has grown by this much since it was said is said again.
_SAID_AGAIN = 0.25
_MAX_CAUSE_CHARS = 300
# Steps of one kind that are worth a line at the end, as a share of all.
_SUMMED_UP = 0.5


class RunFindings:
    """Notes on the metrics of a run's steps.

    Args:
        compares_groups: the advantage compares the answers to one prompt: equal rewards teach nothing.
        max_tokens: longest answer; 0: nothing is sampled.
    """

    def __init__(self, *, compares_groups: bool = False, max_tokens: int = 0) -> None:
        self._compares_groups, self._max_tokens = compares_groups, max_tokens
        self._said: dict[str, float] = {}
        self._steps: Counter[str] = Counter()
        self._num_failed = 0.0
        self._rewards: set[float] = set()

    def notes(self, step: int, metrics: Mapping[str, float], causes: Sequence[str] = ()) -> list[str]:
        """Lines on a step: each kind of trouble when it is new, or when its share has changed much.

        Args:
            step: number of the step.
            metrics: of the step.
            causes: of the answers without a reward, in words.
        """
        self._steps["all"] += 1
        if "reward" in metrics:
            self._rewards.add(metrics["reward"])
        if not metrics.get("grad_norm"):
            self._steps["no gradient"] += 1
        found = [
            ("failed", metrics.get("failed_share", 0.0), self._failed(metrics, causes)),
            ("dead", float(self._is_dead(metrics)), self._dead(metrics)),
            ("cut", float(self._is_cut(metrics)), self._cut()),
            ("skipped", float(metrics.get("skipped_updates", 0.0) > 0), self._skipped(metrics)),
        ]
        lines = []
        for name, share, text in found:
            self._steps[name] += share > 0
            if share > 0 and share - self._said.get(name, 0.0) >= min(_SAID_AGAIN, share):
                lines.append(f"step {step}: {text}")
                self._said[name] = share
        return lines

    def summary(self) -> list[str]:
        """Lines on the whole run; none if it learned in most of its steps."""
        total, lines = self._steps["all"], []
        many = max(2, _SUMMED_UP * total)
        if self._steps["dead"] >= many:
            lines.append(
                f"{self._steps['dead']} of {total} steps had no group with different rewards, and taught "
                "nothing: the task is too hard or too easy for this policy, or the reward does not tell its "
                "answers apart"
            )
        if self._steps["cut"] >= many:
            lines.append(
                f"in {self._steps['cut']} of {total} steps every answer was cut off at sampling.max_tokens "
                f"{self._max_tokens}"
            )
        if self._steps["failed"] >= 2:
            count = f"{self._num_failed:.0f} answers"
            lines.append(f"{count} had no reward, in {self._steps['failed']} of {total} steps")
        if total >= 2 and len(self._rewards) == 1 and not self._steps["dead"]:
            lines.append(f"the reward was {self._rewards.pop():.4g} in every step")
        if total and self._steps["no gradient"] == total:
            lines.append(f"the run learned nothing: in none of its {total} steps had the policy a gradient")
        return lines

    def _failed(self, metrics: Mapping[str, float], causes: Sequence[str]) -> str:
        outcomes = {
            name.removeprefix("outcome/"): count
            for name, count in metrics.items()
            if name.startswith("outcome/")
        }
        count, share = sum(outcomes.values()), metrics.get("failed_share", 0.0)
        if not count or not share:
            return ""
        total = round(count / share)
        self._num_failed += count
        kinds = ", ".join(f"{name} {number:.0f}" for name, number in outcomes.items())
        first = f"; the first: {' '.join(causes[0].split())[:_MAX_CAUSE_CHARS]}" if causes else ""
        return f"{count:.0f} of {total} answers have no reward and are left out ({kinds}){first}"

    def _is_dead(self, metrics: Mapping[str, float]) -> bool:
        return self._compares_groups and metrics.get("dead_groups_share") == 1.0

    def _dead(self, metrics: Mapping[str, float]) -> str:
        accuracy, reward = metrics.get("accuracy"), metrics.get("reward", float("nan"))
        if accuracy == 1.0:
            advice = "every answer is right: take harder prompts"
        elif accuracy == 0.0 or reward == 0.0:
            advice = (
                "no answer is right: read the samples, and check that the reward reads this form of answer; "
                "then take easier prompts or more samples_per_prompt, or fine-tune first"
            )
        else:
            advice = "take more samples_per_prompt, or a reward that tells answers apart"
        return f"no group has different rewards (mean reward {reward:.4g}), so it teaches nothing; {advice}"

    def _is_cut(self, metrics: Mapping[str, float]) -> bool:
        return metrics.get("truncated_share") == 1.0

    def _cut(self) -> str:
        return (
            f"every answer was cut off at sampling.max_tokens {self._max_tokens}; raise it, unless answers "
            "should have just this length"
        )

    def _skipped(self, metrics: Mapping[str, float]) -> str:
        return (
            f"{metrics.get('skipped_updates', 0.0):.0f} updates were skipped, since loss or gradient was not "
            "finite; if it happens again, lower policy.optimizer.lr"
        )
