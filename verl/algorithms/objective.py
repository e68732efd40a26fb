"""The functions that an algorithm chooses, composed: from rewards to advantages, from logprobs to losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.correction import CORRECTIONS
from verl.algorithms.dry_run import learns_from_zero_advantages, try_out
from verl.algorithms.functional import masked_mean
from verl.algorithms.kl import KL_ESTIMATORS, k3
from verl.algorithms.losses import POLICY_LOSSES
from verl.algorithms.mismatch import (
    FRESH_TOKENS,
    fresh_mask,
    mismatch,
    sampler_difference,
    weight_monitors,
)
from verl.algorithms.registry import BoundFunction
from verl.algorithms.returns import bind_as, check_finite
from verl.algorithms.value_losses import VALUE_LOSSES
from verl.config.algorithm import AlgorithmConfig
from verl.data.batch import Batch
from verl.data.columns import CHOSEN, readable_by, with_required, written_by
from verl.data.episode_rows import EpisodeRows

Columns = Mapping[str, Tensor]
Monitors = dict[str, Tensor]


@dataclass(frozen=True)
class Algorithm:
    """The chosen functions, bound to their columns and options.

    The columns that they read decide which models exist.

    Attributes:
        kl: None if KL is off.
        kl_in_reward: subtract it from the reward instead of adding it to the loss.
        likelihood_coef: weight of the likelihood of answers with a reward above 0.
        reads: all columns that a chosen function reads.
    """

    advantage: BoundFunction
    policy_loss: BoundFunction
    value_loss: BoundFunction
    aggregation: BoundFunction
    correction: BoundFunction
    kl: BoundFunction | None
    kl_in_reward: bool
    entropy_coef: float
    likelihood_coef: float
    skip_zero_advantages: bool
    reads: frozenset[str]

    @classmethod
    def bind(cls, config: AlgorithmConfig) -> Algorithm:
        """Look every choice up, check its options, and call each function once on small columns.

        Raises:
            ValueError: an unknown function or option, an option out of its bounds, or choices that do not go
                together.
        """
        advantage = bind_as("advantage", config.advantage, ADVANTAGES)
        policy_loss = bind_as("policy_loss", config.policy_loss, POLICY_LOSSES)
        correction = bind_as("correction", config.correction, CORRECTIONS)
        value_loss = bind_as("value_loss", config.value_loss, VALUE_LOSSES)
        aggregation = bind_as("aggregation", config.aggregation, AGGREGATIONS)
        where = config.kl.where
        kl = bind_as("kl", config.kl.estimator, KL_ESTIMATORS) if where != "off" else None
        chosen = [advantage, policy_loss, correction, *([kl] if kl else [])]
        for function in (advantage, correction, aggregation):
            try_out(function)
        for loss in (policy_loss, value_loss):
            try_out(loss, learns=True)
        if kl:
            try_out(kl, learns=where == "loss")
        reads = with_required(column for function in chosen for column in function.columns)
        algorithm = cls(
            advantage=advantage,
            policy_loss=policy_loss,
            value_loss=value_loss,
            aggregation=aggregation,
            correction=correction,
            kl=kl,
            kl_in_reward=where == "reward",
            entropy_coef=config.entropy_coef,
            likelihood_coef=config.likelihood_coef,
            skip_zero_advantages=config.skip_zero_advantages,
            reads=reads,
        )
        _check_choices(algorithm)
        if reads & written_by("critic", "process_reward_model"):
            return replace(algorithm, reads=reads | set(value_loss.columns))
        return algorithm

    @property
    def corrects_in_update(self) -> bool:
        """True if the correction compares the sampler with the policy as it is in each update.

        Other corrections compare it with the policy before the first update.
        """
        return "logprobs" in self.correction.columns

    @property
    def needs_whole_minibatch(self) -> bool:
        """True if the policy loss has statistics over all rows of an update."""
        return "minibatch_mask" in self.policy_loss.columns

    def policy_objective(self, columns: Columns, entropy: Tensor, kl_coef: float) -> tuple[Tensor, Monitors]:
        """Policy loss of some rows, and sums of monitors over their sampled tokens.

        A monitor whose name ends in `_max` is the largest value instead of a sum.

        Args:
            columns: [b, T] each: those that the chosen functions read, `logprobs` with gradient, `mask`, and
                `weights`, the share of each token in the loss of the whole minibatch, so that losses of parts
                add up. With `loss_gradients` of `minibatch_gradients` the policy loss is not called again.
            entropy: [b, T], with gradient if the entropy bonus is on.
            kl_coef: weight of the KL in the loss.

        Returns:
            A scalar, and scalars by name.
        """
        mask, columns = columns["mask"], _sampled_only(columns)
        logprobs, monitors = columns["logprobs"], {"entropy": entropy.detach()}
        if "loss_gradients" in columns:
            weighted = columns["weighted_losses"] + columns["loss_gradients"] * (logprobs - logprobs.detach())
        else:
            loss, own = self._policy_loss(columns)
            weighted, monitors = loss * columns["weights"], own | monitors
        if self.entropy_coef:
            weighted = weighted - self.entropy_coef * entropy * columns["weights"]
        if self.likelihood_coef:
            weighted = weighted - self.likelihood_coef * logprobs * columns["likelihood_weights"]
        if self.kl and not self.kl_in_reward:
            kl = self.kl(columns)
            weighted = weighted + kl_coef * kl * columns["weights"]
            monitors["kl"] = kl.detach()
        fresh = fresh_mask(mask, columns["staleness"]) if "staleness" in columns else mask
        if "rollout_logprobs" in columns and "staleness" in columns:
            monitors["kl_off_policy"] = k3(columns["rollout_logprobs"], logprobs.detach())
        sums = _masked_sums(monitors, mask)
        if "rollout_logprobs" in columns:
            sums |= sampler_difference(logprobs, columns["rollout_logprobs"], fresh)
        if "kl_off_policy" in monitors:
            sums[FRESH_TOKENS] = fresh.sum()
        return _masked_sum(weighted, mask), sums

    def minibatch_gradients(self, columns: Columns) -> tuple[Tensor, Tensor, Monitors]:
        """Gradients of a policy loss with statistics over all rows of an update.

        The gradient with respect to the logprobs is all that the backward pass of a part of the rows needs
        (gradient caching, https://arxiv.org/abs/2101.06983), so the update is the same for every split.

        Args:
            columns: as for `policy_objective`, of the whole minibatch.

        Returns:
            Gradients of the weighted loss [B, T], the weighted losses [B, T], both constant and 0 at masked
            positions, and sums of monitors.
        """
        mask, columns = columns["mask"], _sampled_only(columns)
        leaf = columns["logprobs"].detach().requires_grad_()
        with torch.enable_grad():
            loss, monitors = self._policy_loss({**columns, "logprobs": leaf})
            weighted = torch.where(mask, loss * columns["weights"], 0)
            # A loss without any pair or eligible token may not depend on the policy at all.
            (gradients,) = torch.autograd.grad(weighted.sum() + 0 * leaf.sum(), leaf)
        return gradients, weighted.detach(), _masked_sums(monitors, mask)

    def value_objective(self, columns: Columns, vf_coef: float) -> tuple[Tensor, Monitors]:
        """Loss of the critic on some rows, and sums of monitors over their sampled tokens.

        Args:
            columns: [b, T] each, with `new_values` (or `prm_logprobs`) with gradient, `mask`, `weights` and
                `row_weights` [b].
            vf_coef: weight of the loss.
        """
        mask, columns = columns["mask"], _sampled_only(columns)
        loss, monitors = self.value_loss(columns)
        if loss.ndim == 1:
            num_tokens = mask.sum(1)
            # A monitor of a row counts once for each of its sampled tokens, as monitors of tokens do.
            sums = {name: (monitor.float() * num_tokens).sum() for name, monitor in monitors.items()}
            return vf_coef * (loss * columns["row_weights"]).sum(), sums
        return vf_coef * _masked_sum(loss * columns["weights"], mask), _masked_sums(monitors, mask)

    def _policy_loss(self, columns: Mapping[str, Tensor]) -> tuple[Tensor, Monitors]:
        """Loss per token, times the weights of the correction, and its monitors."""
        columns = {**columns, "minibatch_mask": columns["mask"]}
        if self.corrects_in_update:
            with torch.no_grad():
                columns["old_logprobs"], weights = self.correction(
                    {**columns, "logprobs": columns["logprobs"].detach()}
                )
            if weights is not None:
                columns["correction_weights"] = weights
        loss, monitors = self.policy_loss(columns)
        if "correction_weights" not in columns:
            return loss, monitors
        weights = columns["correction_weights"]
        # A correction of the whole step is reported once, by `write_advantages`.
        if self.corrects_in_update:
            monitors = monitors | {
                "correction_weight": weights,
                "rejected_share": (weights == 0).to(weights.dtype),
            }
        return loss * weights, monitors


def write_advantages(
    batch: Batch, algorithm: Algorithm, kl_coef: float, *, version: int = 0, seed: int = 0
) -> dict[str, float]:
    """Add the columns that the losses read to a rewarded batch: old_logprobs, advantages, returns, ...

    The functions see a row for each episode, with the tokens of all its segments.

    Args:
        batch: with the columns that the chosen functions read.
        algorithm: the chosen functions.
        kl_coef: weight of the KL in the reward.
        version: of the policy that is trained next.
        seed: of the run, for `noise`.

    Returns:
        Metrics: kl, if it is in the reward; kl_teacher, if there is a teacher; explained_variance, if there
        is a critic; mismatch/*, if there are logprobs of the trainer and of the sampler, and off_policy/* of
        answers of older versions; correction/*, if the correction has weights.
    """
    rows = EpisodeRows(batch)
    metrics = _write_advantages(rows.episodes, algorithm, kl_coef, version=version, seed=seed)
    rows.write_back()
    return metrics


def _write_advantages(
    batch: Batch, algorithm: Algorithm, kl_coef: float, *, version: int, seed: int
) -> dict[str, float]:
    """As `write_advantages`, of a batch with a row for each episode."""
    mask = batch["mask"]
    for name, column in STEP_COLUMNS.items():
        if name in algorithm.reads:
            batch.write(name, column(batch, version, seed))
    if "rollout_logprobs" in batch and (mask & (batch["versions"] < version)).any():
        # It also tells on which rows sampler and trainer can be compared.
        batch.write("staleness", staleness(batch, version, seed))
    columns = {name: batch[name] for name in readable_by(*CHOSEN, "step") if name in batch}
    metrics = _write_correction(batch, columns, algorithm)
    if "teacher_logprobs" in columns:
        metrics["kl_teacher"] = float(
            masked_mean(columns["old_logprobs"] - columns["teacher_logprobs"], mask)
        )
    if "rewards" in columns:
        columns["rewards"] = columns["rewards"].float()
        columns["token_rewards"] = token_rewards(columns["rewards"], mask, columns.get("turn_rewards"))
    if algorithm.kl and algorithm.kl_in_reward:
        read = {**columns, "logprobs": columns["old_logprobs"]}
        kl = algorithm.kl(read)
        check_finite(algorithm.kl, read, [kl])
        penalties = kl_coef * torch.where(mask, kl, 0)
        # Subtracted, not summed over tokens anew: a row that is masked as a whole keeps its own reward, with
        # which its siblings are compared.
        columns["rewards"] = columns["rewards"] - penalties.sum(1)
        columns["token_rewards"] = columns["token_rewards"] - penalties
        metrics["kl"] = float(masked_mean(kl, mask))
    result = algorithm.advantage(columns)
    advantages, returns = result if isinstance(result, tuple) else (result, None)
    check_finite(algorithm.advantage, columns, [advantages, returns])
    if advantages.ndim == 1:
        advantages = advantages[:, None].expand(mask.shape)
    batch.write("advantages", torch.where(mask, advantages, 0))
    if returns is not None:
        batch.write("returns", returns)
    if returns is not None and "values" in columns:
        metrics["explained_variance"] = _explained_variance(columns["values"][mask], returns[mask])
    return metrics


def staleness(batch: Batch, version: int, seed: int) -> Tensor:
    """[B, T] int64, steps between the version that sampled each token and this one, at least 0."""
    return (version - batch["versions"]).clamp(min=0)


def noise(batch: Batch, version: int, seed: int) -> Tensor:
    """[B, T] uniform in [0, 1), the same for the same seed and version."""
    # The generator takes 32 bits: runs of neighbouring seeds meet only after a million steps.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + version) % 2**32)
    return torch.rand(batch["mask"].shape, generator=generator)


# Columns that depend on the batch, the version that is trained and the seed of the run alone.
STEP_COLUMNS: dict[str, Callable[[Batch, int, int], Tensor]] = {"staleness": staleness, "noise": noise}


def token_rewards(rewards: Tensor, mask: Tensor, turn_rewards: Tensor | None = None) -> Tensor:
    """Rewards of turns [B, T], if there are any, and the rest of the reward [B] at the last sampled token."""
    if turn_rewards is None:
        return at_last_sampled_token(rewards, mask)
    return turn_rewards + at_last_sampled_token(rewards - turn_rewards.sum(1), mask)


def at_last_sampled_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B, T] with the reward [B] of each row at its last True of `mask` [B, T]; 0 in a row without one."""
    last = torch.where(mask, torch.arange(mask.shape[1]), -1).amax(1)
    out = torch.zeros(mask.shape)
    rows = (last >= 0).nonzero().squeeze(1)
    out[rows, last[rows]] = rewards[rows].float()
    return out


def _check_choices(algorithm: Algorithm) -> None:
    """Raise ValueError if the chosen functions do not fit together."""
    advantage, policy_loss, value_loss = algorithm.advantage, algorithm.policy_loss, algorithm.value_loss
    reads_prm, reads_values = "prm_logprobs" in algorithm.reads, "values" in algorithm.reads
    learns_prm = "prm_logprobs" in value_loss.columns
    if reads_prm and (reads_values or not learns_prm):
        raise ValueError(
            f"need a loss of the process reward model for algorithm.advantage {advantage.name}, got "
            f"algorithm.value_loss {value_loss.name}; set algorithm.value_loss=outcome_cross_entropy, "
            "and read `values` nowhere"
        )
    if learns_prm and not reads_prm:
        raise ValueError(
            f"need an advantage that reads prm_logprobs for algorithm.value_loss {value_loss.name}; "
            "take the recipe prime"
        )
    if {"minibatch_mask", "top_logprobs"} <= set(policy_loss.columns):
        raise ValueError(
            f"{policy_loss.name} reads minibatch_mask and top_logprobs; a loss over the whole minibatch has "
            "logprobs alone"
        )
    # The statistics of a whole minibatch are also over its rows without advantage.
    reads_all_rows = algorithm.needs_whole_minibatch or learns_from_zero_advantages(policy_loss)
    if algorithm.skip_zero_advantages and reads_all_rows:
        raise ValueError(
            "need a policy loss that is constant in rows without advantage for "
            f"algorithm.skip_zero_advantages, got {policy_loss.name}; set skip_zero_advantages to false"
        )
    reads_rewards = bool({"rewards", "token_rewards"} & set(advantage.columns))
    ignores_rewards = not (reads_rewards and "advantages" in policy_loss.columns)
    if algorithm.kl and algorithm.kl_in_reward and ignores_rewards:
        raise ValueError(
            "need an advantage of rewards, and a policy loss that reads it, for algorithm.kl.where reward, "
            f"got {advantage.name} and {policy_loss.name}, which would ignore the KL; "
            "set algorithm.kl.where to loss or off"
        )


def _write_correction(batch: Batch, columns: dict[str, Tensor], algorithm: Algorithm) -> dict[str, float]:
    """Add old_logprobs and the correction's weights to batch and columns; return the metrics of both."""
    metrics: dict[str, float] = {}
    mask = columns["mask"]
    if {"trainer_logprobs", "rollout_logprobs"} <= columns.keys():
        logprobs = columns["trainer_logprobs"], columns["rollout_logprobs"]
        fresh = fresh_mask(mask, columns["staleness"]) if "staleness" in columns else mask
        measured = {"mismatch": fresh} if fresh.any() or not mask.any() else {}
        for kind, tokens in (measured | ({} if torch.equal(fresh, mask) else {"off_policy": mask})).items():
            monitors = mismatch(*logprobs, tokens)
            metrics |= {f"{kind}/{name}": float(value) for name, value in monitors.items()}
    if algorithm.corrects_in_update:
        # Until the update, the sampler's logprobs stand in for those that the correction gives there.
        columns["old_logprobs"], weights = columns["rollout_logprobs"], None
    else:
        columns["old_logprobs"], weights = algorithm.correction(columns)
        check_finite(algorithm.correction, columns, [columns["old_logprobs"], weights])
    batch.write("old_logprobs", columns["old_logprobs"])
    if weights is not None:
        batch.write("correction_weights", weights)
        metrics |= {
            f"correction/{name}": float(value) for name, value in weight_monitors(weights, mask).items()
        }
    return metrics


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for a constant one."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


def _sampled_only(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns with 0 at masked positions.

    A NaN there would reach the gradient as 0 * NaN.
    """
    mask = columns["mask"]

    def clean(column: Tensor) -> Tensor:
        if not column.is_floating_point() or column.ndim < 2 or column.shape[:2] != mask.shape:
            return column
        return torch.where(mask.view(*mask.shape, *[1] * (column.ndim - 2)), column, 0)

    return {name: clean(column) for name, column in columns.items()}


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    # Not a product: a value at a masked position may be infinite, and 0 * inf is NaN.
    return torch.where(mask, values.float(), 0).sum()


def _masked_sums(monitors: Monitors, mask: Tensor) -> Monitors:
    return {name: _masked_sum(values, mask) for name, values in monitors.items()}
