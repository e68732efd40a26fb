"""Settings of asynchronous generation: staleness, oversampling, and groups that fail."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from verl.config.fields import Choice, Section, setting

# Long, since one step of a large model may take long, and calls of other processes do not report progress.
STALL_LIMIT_S = 3600.0
FailureClass = Literal["infrastructure", "data", "reward", "environment"]
_RETRIES: dict[FailureClass, int] = {"infrastructure": 2, "data": 0, "reward": 1, "environment": 2}


class PipelineConfig(Section):
    """Generation ahead of training, and groups that fail."""

    max_staleness: int = setting(
        0,
        "Largest difference in steps between the policy that is trained and the one that sampled a token. "
        "0: on-policy; 1: one step off; more: fully asynchronous.",
        unit="steps",
        source="AReaL, 2505.24298, 5.1",
        ge=0,
    )
    oversample: int = setting(
        0,
        "Additional prompts in flight; each step aborts this many of the slowest.",
        unit="prompts",
        ge=0,
    )
    batches: Literal["arrival", "streamed", "deterministic"] = setting(
        "arrival",
        "arrival: a step takes the groups that complete first. "
        "streamed: it also trains on them while the last ones are generated. "
        "deterministic: it takes the oldest groups, each sampled by one version; a run can be repeated.",
    )
    survivors: Choice = setting(
        Choice.model_validate({"name": "drop", "least": 1}),
        "For a group with fewer than `least` rewarded answers: drop it for another prompt, or refill it.",
        source="tinker",
    )
    retries: dict[FailureClass, int] = setting(
        _RETRIES,
        "Retries of a group after a failure of each class: infrastructure, data, reward, environment.",
    )
    max_failures_in_a_row: int = setting(
        16, "Consecutive failed groups after which the run stops and reports the cause.", unit="groups", ge=1
    )
    stall_limit_s: float = setting(
        STALL_LIMIT_S,
        "Time without progress after which the run stops and reports what it waits for.",
        unit="s",
        gt=0,
    )

    @field_validator("retries")
    @classmethod
    def _add_default_retries(cls, retries: dict[FailureClass, int]) -> dict[FailureClass, int]:
        if any(count < 0 for count in retries.values()):
            raise ValueError(f"need counts of at least 0, got {retries}")
        return {**_RETRIES, **retries}

    @field_validator("survivors")
    @classmethod
    def _check_survivors(cls, survivors: Choice) -> Choice:
        least = survivors.options.get("least", 1)
        known = survivors.name in ("drop", "refill") and survivors.options.keys() <= {"least"}
        if not known or type(least) is not int or least < 1:
            raise ValueError(
                f"need {{name: drop or refill, least: answers of at least 1}}, got {survivors.model_dump()}"
            )
        return survivors
