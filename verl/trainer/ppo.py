"""PPO on records of prompt, response and reward that come from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.config.flat_call import make_trainer_config
from verl.data.trajectory import Trajectory
from verl.trainer.base import Metrics
from verl.trainer.rl_trainer import Trainer
from verl.utils.sampling_types import Prompt


class PPOTrainer:
    """PPO on records of prompt, response and reward, wherever the responses came from.

    Args:
        model_name: folder or hub name of the policy.
        optimizer: name of the optimizer of policy and critic, as `policy.optimizer.name`.
        lr: learning rate of the policy.
        kl_coef: weight of the KL to the starting policy, in the reward.
        clip_range: of the probability ratio.
        options: further keywords of `make_trainer_config`.
    """

    def __init__(
        self,
        model_name: str,
        optimizer: str = "adamw",
        lr: float = 1e-6,
        *,
        kl_coef: float = 0.1,
        clip_range: float = 0.2,
        **options: Any,
    ) -> None:
        overrides = [
            "algorithm.correction=recompute",
            f"policy.optimizer.name={optimizer}",
            f"critic.optimizer.name={optimizer}",
            *options.pop("overrides", ()),
        ]
        config = make_trainer_config(
            "ppo",
            model_name=model_name,
            lr=lr,
            kl_coef=kl_coef,
            clip_eps=clip_range,
            overrides=overrides,
            **options,
        )
        algorithm = config.algorithm
        filters = algorithm.dynamic_sampling or algorithm.kept_groups_share < 1
        if algorithm.overlong_buffer_tokens or algorithm.mask_truncated or filters:
            raise ValueError(
                "need records that are learned from as they are, got algorithm.overlong_buffer_tokens, "
                "mask_truncated, dynamic_sampling or kept_groups_share, which act where answers are sampled; "
                "shape the rewards of the records, or use Trainer"
            )
        self.trainer = Trainer(config)

    def update(self, batch: Sequence[Mapping[str, Any]]) -> Metrics:
        """One step on records with `prompt` (text or chat messages), `response` (text) and `reward` (number).

        Raises:
            ValueError: no record, one without these keys, or a reward that is not finite.
        """
        if not batch:
            raise ValueError("need at least one record with prompt, response and reward, got none")
        trajectories = [self._trajectory(record, i) for i, record in enumerate(batch)]
        return self.trainer.update_policy(trajectories)

    def save_model(self, folder: str | Path) -> None:
        """Write the policy in Hugging Face format."""
        self.trainer.save_model(Path(folder))

    def _trajectory(self, record: Mapping[str, Any], index: int) -> Trajectory:
        missing = [key for key in ("prompt", "response", "reward") if key not in record]
        if missing:
            raise ValueError(
                "need prompt, response and reward in each record, but record "
                f"{index} has no {', '.join(missing)}"
            )
        reward = float(record["reward"])
        if not math.isfinite(reward):
            raise ValueError(
                f"need a finite reward in each record, got {reward} in record {index}; leave such records out"
            )
        given, codec = record["prompt"], self.trainer.codec
        prompt = given if isinstance(given, Prompt) else Prompt(given, index=index)
        ids = codec.encode_answer(record["response"], prompt)
        return Trajectory(
            prompt,
            codec.encode_prompt(prompt),
            ids,
            [True] * len(ids),
            None,
            [self.trainer.version] * len(ids),
            index,
            text=record["response"],
            reward=reward,
        )
