"""The five choices of a configuration put together: from rewards to advantages, from logprobs to a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.binding import COLUMNS, Bound, bind
from verl.algorithms.correction import CORRECTIONS
from verl.algorithms.functional import masked_mean
from verl.algorithms.kl import KL_ESTIMATORS, k3
from verl.algorithms.losses import POLICY_LOSSES
from verl.algorithms.value_losses import VALUE_LOSSES
from verl.data.batch import Batch
from verl.settings import AlgorithmConfig


@dataclass(frozen=True)
class Algorithm:
    """Bound functions; which columns they read decides which models exist.

    Attributes:
        kl: None if KL is off.
        kl_in_reward: subtract it from the reward instead of adding it to the loss.
        reads: all columns that some chosen function reads.
    """

    advantage: Bound
    policy_loss: Bound
    value_loss: Bound
    aggregation: Bound
    correction: Bound
    kl: Bound | None
    kl_in_reward: bool
    entropy_coef: float
    reads: frozenset[str]

    @classmethod
    def bind(cls, config: AlgorithmConfig) -> Algorithm:
        """Looks every choice up and checks its options.

        Raises:
            ValueError: an unknown function or option.
        """
        advantage = bind(config.advantage, ADVANTAGES, columns=COLUMNS)
        policy_loss = bind(config.policy_loss, POLICY_LOSSES, columns=COLUMNS)
        correction = bind(config.correction, CORRECTIONS, columns=COLUMNS)
        kl = None if config.kl.where == "off" else bind(config.kl.estimator, KL_ESTIMATORS, columns=COLUMNS)
        chosen = [advantage, policy_loss, correction, *([kl] if kl else [])]
        return cls(
            advantage,
            policy_loss,
            bind(config.value_loss, VALUE_LOSSES, columns=COLUMNS),
            bind(config.aggregation, AGGREGATIONS, columns=COLUMNS),
            correction,
            kl,
            config.kl.where == "reward",
            config.entropy_coef,
            frozenset(column for bound in chosen for column in bound.columns),
        )

    def policy_objective(self, columns: Mapping[str, Tensor], entropy: Tensor, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of some rows and sums of monitors over their sampled tokens.

        Args:
            columns: [b, T] each: what the chosen functions read, `logprobs` with gradient, `mask`, and `weights` (the
                share of each token in the loss of the whole minibatch, so that losses of parts add up).
            entropy: [b, T], with gradient if the entropy bonus is on.
            kl_coef: weight of the KL in the loss.

        Returns:
            A scalar, and scalars by name.
        """
        mask, columns = columns["mask"], _sampled_only(columns)
        loss, monitors = self.policy_loss(columns)
        if "correction_weights" in columns:
            loss = loss * columns["correction_weights"]
        monitors = {**monitors, "entropy": entropy.detach()}
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        if self.kl and not self.kl_in_reward:
            kl = self.kl(columns)
            loss = loss + kl_coef * kl
            monitors["kl"] = kl.detach()
        if "rollout_logprobs" in columns:
            monitors["kl_sampler"] = k3(columns["rollout_logprobs"], columns["logprobs"].detach())
        return _weighted_sum(loss, columns["weights"], mask), {name: _masked_sum(m, mask) for name, m in monitors.items()}

    def value_objective(self, columns: Mapping[str, Tensor], vf_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the critic on some rows and sums of monitors, from columns [b, T] with `new_values` and `weights`."""
        mask, columns = columns["mask"], _sampled_only(columns)
        loss, monitors = self.value_loss(columns)
        return vf_coef * _weighted_sum(loss, columns["weights"], mask), {name: _masked_sum(m, mask) for name, m in monitors.items()}


def write_advantages(batch: Batch, algorithm: Algorithm, kl_coef: float) -> dict[str, float]:
    """Adds the columns that the losses read (old_logprobs, advantages, returns, ...) to a rewarded batch.

    Args:
        batch: with `rewards` and whatever the chosen functions read.
        algorithm: the choices.
        kl_coef: weight of the KL in the reward.

    Returns:
        Metrics: kl (if it is in the reward), explained_variance (if there is a critic).
    """
    mask = batch["mask"]
    metrics: dict[str, float] = {}
    columns = {name: batch[name] for name in batch.names if name not in ("prompt_ids", "response_ids")}
    columns["old_logprobs"], weights = algorithm.correction(columns)
    batch.write("old_logprobs", columns["old_logprobs"])
    if weights is not None:
        batch.write("correction_weights", weights)
    rewards, token_rewards = batch["rewards"].float(), at_last_sampled_token(batch["rewards"], mask)
    if algorithm.kl and algorithm.kl_in_reward:
        kl = algorithm.kl({"logprobs": columns["old_logprobs"], "ref_logprobs": columns["ref_logprobs"]})
        penalties = kl_coef * torch.where(mask, kl, 0)
        rewards, token_rewards = rewards - penalties.sum(1), token_rewards - penalties
        metrics["kl"] = float(masked_mean(kl, mask))
    # Not the sum over tokens: a row that is masked as a whole still counts among its siblings with the reward that it got.
    columns |= {"rewards": rewards, "token_rewards": token_rewards}
    result = algorithm.advantage(columns)
    advantages, returns = result if isinstance(result, tuple) else (result, None)
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(mask.shape)
    batch.write("advantages", torch.where(mask, advantages, 0))
    if returns is not None:
        batch.write("returns", returns)
    if returns is not None and "values" in columns:
        metrics["explained_variance"] = _explained_variance(columns["values"][mask], returns[mask])
    return metrics


def at_last_sampled_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B, T] with the reward [B] of each row at its last True of `mask` [B, T]; a row without any gets none."""
    last = torch.where(mask, torch.arange(mask.shape[1]), -1).amax(1)
    out = torch.zeros(mask.shape)
    rows = (last >= 0).nonzero().squeeze(1)
    out[rows, last[rows]] = rewards[rows].float()
    return out


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 one that knows only the mean."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


def _sampled_only(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns with 0 at masked positions, as at padding: a NaN there would reach the gradient as 0 * NaN."""
    mask = columns["mask"]
    return {n: torch.where(mask, c, 0) if c.shape == mask.shape and c.is_floating_point() else c for n, c in columns.items()}


def _weighted_sum(loss: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    # Not a product alone: at masked positions the loss may be anything, and 0 * inf is no number.
    return torch.where(mask, loss * weights, 0).sum()


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.float(), 0).sum()
