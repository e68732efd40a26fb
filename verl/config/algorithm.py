"""Settings of the algorithm: advantage, losses, KL, correction, and the filters of a step's answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from verl.config.fields import Choice, Section, setting


class KLSchedule(Section):
    """A KL coefficient that changes linearly with the step."""

    start: float = setting(0.01, "Coefficient at the first step.", ge=0)
    end: float = setting(0.1, "Coefficient from step `steps` on.", ge=0)
    steps: int = setting(1000, "Steps from start to end.", unit="steps", ge=1)


class KLAdaptive(Section):
    """A KL coefficient steered towards a target KL (https://arxiv.org/abs/1909.08593, section 2.2)."""

    initial: float = setting(0.001, "Coefficient at the first step.", gt=0)
    target: float = setting(0.1, "Target KL per token.", unit="nats", source="verl", gt=0)
    horizon: int = setting(
        10_000, "Trajectories over which an error of 1 is corrected.", unit="trajectories", ge=1
    )


def kl_coef_form(value: Any) -> str:
    """Form of a KL coefficient: number, schedule or adaptive.

    pydantic then validates this form alone; otherwise an error would list the problems of all three.
    """
    if isinstance(value, KLAdaptive) or (
        isinstance(value, dict) and value.keys() & KLAdaptive.model_fields.keys()
    ):
        return "adaptive"
    return "schedule" if isinstance(value, dict | KLSchedule) else "number"


KLCoef = Annotated[
    Annotated[float, Field(ge=0), Tag("number")]
    | Annotated[KLSchedule, Tag("schedule")]
    | Annotated[KLAdaptive, Tag("adaptive")],
    Discriminator(kl_coef_form),
]


class KLConfig(Section):
    """KL to the reference policy."""

    where: Literal["off", "loss", "reward"] = setting(
        "off",
        "Add the KL to the loss, subtract it from the reward, or leave it out.",
        source="DAPO, 2503.14476, 2.3",
    )
    estimator: Choice = setting(
        Choice(name="k3"),
        "Estimator of the KL per token: k1, k2, k3, `verl.algorithms.kl`.",
        source="GRPO, 2402.03300, 4.1.1",
    )
    coef: KLCoef = setting(
        0.001, "Coefficient: a number, {start, end, steps} or {initial, target, horizon}.", source="verl"
    )


class AlgorithmConfig(Section):
    """Advantage, policy loss, aggregation, KL and correction are chosen independently of each other."""

    advantage: Choice = setting(
        Choice(name="grpo"),
        "Advantage of each token, `verl.algorithms.advantages`.",
        source="GRPO, 2402.03300",
    )
    policy_loss: Choice = setting(
        Choice(name="ppo_clip"),
        "Policy loss of each token, `verl.algorithms.losses`.",
        source="PPO, 1707.06347",
    )
    aggregation: Choice = setting(
        Choice(name="token_mean"),
        "Weight of each token in the loss, `verl.algorithms.aggregations`.",
        source="DAPO, 2503.14476, 3.3",
    )
    kl: KLConfig = setting(KLConfig(), "KL to the reference policy.")
    correction: Choice = setting(
        Choice(name="bypass"),
        "Correction of the difference between sampler and trainer, `verl.algorithms.correction`.",
        source="HybridFlow, 2409.19256, table 4",
    )
    value_loss: Choice = setting(
        Choice(name="value_clip"),
        "Critic loss of each token, `verl.algorithms.value_losses`.",
        source="PPO, 1707.06347",
    )
    entropy_coef: float = setting(
        0.0, "Weight of the entropy bonus in the policy loss.", source="DAPO, 2503.14476"
    )
    epochs: int = setting(1, "Passes over the trajectories of a step.", unit="passes", ge=1)
    minibatches: int = setting(
        1, "Optimizer updates per pass; their sizes differ by at most one trajectory.", unit="updates", ge=1
    )
    dynamic_sampling: bool = setting(
        False,
        "Replace groups without a learning signal by new prompts: all rewards of the group are equal "
        "(with gdpo: the rewards of every function).",
        source="DAPO, 2503.14476, 3.2",
    )
    max_resamples: int = setting(
        10,
        "Rounds of new prompts per step; after them dynamic sampling trains on the groups that it has.",
        unit="draws",
        source="verl",
        ge=1,
    )
    kept_groups_share: float = setting(
        1.0,
        "Share of a step's groups that is trained on, those whose rewards deviate most within the group; "
        "1: all.",
        source="StarPO-S of RAGEN, 2504.20073, 3.2; 0.25 there",
        gt=0,
        le=1,
    )
    overlong_buffer_tokens: int = setting(
        0,
        "Answers that reach into this many last tokens lose reward linearly; 0: off.",
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
        "Reward for the length of an answer compared with its group, `verl.rewards.shaping`.",
    )
    likelihood_coef: float = setting(
        0.0,
        "Weight of the negative log-likelihood of answers with a reward above 0 in the policy loss.",
        source="VAPO, 2504.05118, 4.3",
        ge=0,
    )
    skip_zero_advantages: bool = setting(
        False,
        "Leave rows whose advantages are all 0 out of forward and backward; "
        "they still count in every denominator.",
        source="2510.13786",
    )
