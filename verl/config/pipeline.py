"""Settings of asynchronous generation: staleness, oversampling, and groups that fail."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from verl.config.fields import Choice, Section, setting

# A step of a large model may take long, and what works in other processes does not say that it moves.
STALL_LIMIT_S = 3600.0


FailureClass = Literal["infrastructure", "data", "reward", "environment"]


_RETRIES: dict[FailureClass, int] = {"infrastructure": 2, "data": 0, "reward": 1, "environment": 2}


class PipelineConfig(Section):
    """Collection ahead of training, and what is done about groups that fail."""

    max_staleness: int = setting(
        0,
        "Steps by which a token may be older than the policy that learns from it. 0: on-policy; 1: one step off; more: fully asynchronous.",
        unit="steps",
        source="AReaL, 2505.24298, 5.1",
        ge=0,
    )
    oversample: int = setting(
        0,
        "Prompts in work beyond those of the steps; as many of the slowest are aborted per step.",
        unit="prompts",
        ge=0,
    )
    batches: Literal["arrival", "streamed", "deterministic"] = setting(
        "arrival",
        "arrival: of the groups that are complete first; streamed: also learned from while the last of them are answered; deterministic: of "
        "the oldest groups, each answered by one version, so that a run can be repeated.",
    )
    survivors: Choice = setting(
        Choice.model_validate({"name": "drop", "least": 1}),
        "What becomes of a group with fewer than `least` answers that have a reward: drop it for another prompt, or refill it.",
        source="tinker",
    )
    retries: dict[FailureClass, int] = setting(
        _RETRIES,
        "Times that a group is tried again after a failure of each class: infrastructure, data, reward, environment.",
    )
    max_failures_in_a_row: int = setting(
        16, "Groups that fail one after the other before the run stops with the cause.", unit="groups", ge=1
    )
    stall_limit_s: float = setting(
        STALL_LIMIT_S,
        "Time in which nothing moves before the run stops and says what it waits for.",
        unit="s",
        gt=0,
    )

    @field_validator("retries")
    @classmethod
    def _all_classes(cls, retries: dict[FailureClass, int]) -> dict[FailureClass, int]:
        if any(count < 0 for count in retries.values()):
            raise ValueError(f"need counts of at least 0, got {retries}")
        return {**_RETRIES, **retries}

    @field_validator("survivors")
    @classmethod
    def _rule(cls, survivors: Choice) -> Choice:
        least = survivors.options.get("least", 1)
        if (
            survivors.name not in ("drop", "refill")
            or survivors.options.keys() - {"least"}
            or type(least) is not int
            or least < 1
        ):
            raise ValueError(
                f"need {{name: drop or refill, least: answers of at least 1}}, got {survivors.model_dump()}"
            )
        return survivors
