"""Settings of the algorithm: advantage, losses, KL, correction, and the filters of a step's answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from verl.config.fields import Choice, Section, setting


class KLSchedule(Section):
    """A coefficient that moves linearly with the step."""

    start: float = setting(0.01, "Coefficient at the first step.", ge=0)
    end: float = setting(0.1, "Coefficient from the last step on.", ge=0)
    steps: int = setting(1000, "Steps from start to end.", unit="steps", ge=1)


class KLAdaptive(Section):
    """A coefficient that is steered towards a target KL (https://arxiv.org/abs/1909.08593, section 2.2)."""

    initial: float = setting(0.001, "Coefficient at the first step.", gt=0)
    target: float = setting(0.1, "Wanted KL per token.", unit="nats", source="verl", gt=0)
    horizon: int = setting(
        10_000, "Trajectories over which a unit error is corrected.", unit="trajectories", ge=1
    )


def _kind_of_coef(value: Any) -> str:
    """Which of the three forms of a KL coefficient is meant, so that an error is told about that one alone."""
    if isinstance(value, KLAdaptive) or (
        isinstance(value, dict) and value.keys() & KLAdaptive.model_fields.keys()
    ):
        return "adaptive"
    return "schedule" if isinstance(value, dict | KLSchedule) else "number"


NumberCoef = Annotated[float, Field(ge=0), Tag("number")]


Coef = Annotated[
    NumberCoef | Annotated[KLSchedule, Tag("schedule")] | Annotated[KLAdaptive, Tag("adaptive")],
    Discriminator(_kind_of_coef),
]


class KLConfig(Section):
    """Distance to the reference policy."""

    where: Literal["off", "loss", "reward"] = setting(
        "off", "Add it to the loss, subtract it from the reward, or neither.", source="DAPO, 2503.14476, 2.3"
    )
    estimator: Choice = setting(
        Choice(name="k3"), "Estimator of the KL per token: k1, k2, k3.", source="GRPO, 2402.03300, 4.1.1"
    )
    coef: Coef = setting(
        0.001, "Coefficient: a number, {start, end, steps} or {initial, target, horizon}.", source="verl"
    )


class AlgorithmConfig(Section):
    """Five independent choices (advantage, policy loss, aggregation, KL, correction) and what belongs to
    them.
    """

    advantage: Choice = setting(
        Choice(name="grpo"), "Credit of each token, `verl.algorithms.advantages`.", source="GRPO, 2402.03300"
    )
    policy_loss: Choice = setting(
        Choice(name="ppo_clip"), "Loss per token, `verl.algorithms.losses`.", source="PPO, 1707.06347"
    )
    aggregation: Choice = setting(
        Choice(name="token_mean"),
        "Weight of each token in the loss, `verl.algorithms.aggregations`.",
        source="DAPO, 2503.14476, 3.3",
    )
    kl: KLConfig = setting(KLConfig(), "Distance to the reference policy.")
    correction: Choice = setting(
        Choice(name="bypass"),
        "Difference of sampler and trainer, `verl.algorithms.correction`.",
        source="HybridFlow, 2409.19256, table 4",
    )
    value_loss: Choice = setting(
        Choice(name="value_clip"),
        "Loss of the critic per token, `verl.algorithms.value_losses`.",
        source="PPO, 1707.06347",
    )
    entropy_coef: float = setting(
        0.0, "Weight of the entropy bonus in the policy loss.", source="DAPO, 2503.14476"
    )
    epochs: int = setting(1, "Passes over the trajectories of a step.", unit="passes", ge=1)
    minibatches: int = setting(
        1, "Optimizer updates per pass; the trajectories are split evenly.", unit="updates", ge=1
    )
    dynamic_sampling: bool = setting(
        False,
        "Replace groups whose rewards, for gdpo each part of them, are all equal by fresh prompts.",
        source="DAPO, 2503.14476, 3.2",
    )
    max_resamples: int = setting(
        10,
        "Fresh draws per step before dynamic sampling goes on with what it has.",
        unit="draws",
        source="verl",
        ge=1,
    )
    overlong_buffer_tokens: int = setting(
        0,
        "Answers that enter the last so many tokens lose reward linearly; 0: off.",
        unit="tokens",
        source="DAPO, 2503.14476, 3.4",
        ge=0,
    )
    overlong_penalty: float = setting(
        1.0, "Reward lost at the full length.", unit="reward", source="DAPO, 2503.14476, 3.4", ge=0
    )
    mask_truncated: bool = setting(
        False, "Leave answers cut at the length limit out of the loss.", source="DAPO, 2503.14476, 3.4"
    )
    length_penalty: Choice = setting(
        Choice(name="off"),
        "What the length of an answer among its siblings adds to its reward, `verl.rewards.shaping`.",
    )
    likelihood_coef: float = setting(
        0.0,
        "Weight of the likelihood of answers with a reward above 0 in the policy loss.",
        source="VAPO, 2504.05118, 4.3",
        ge=0,
    )
    skip_zero_advantages: bool = setting(
        False,
        "Leave rows whose advantages are all 0 out of forward and backward; they still count in every denominator.",
        source="2510.13786",
    )
