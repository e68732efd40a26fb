"""AdamW, the schedule of its learning rate, and the loss scale of fp16."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from verl.config.roles import OptimizerConfig


def build_adamw(model: nn.Module, config: OptimizerConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only (https://arxiv.org/abs/1711.05101)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def lr_factor(update: int, config: OptimizerConfig, total_updates: int) -> float:
    """Learning rate of an update, counted from 0, over the peak.

    Linear warm-up, then a constant rate, or a linear or cosine decay to `min_lr_ratio`.
    """
    if update < config.warmup_steps:
        return (update + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (update - config.warmup_steps) / max(1, total_updates - config.warmup_steps))
    shape = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class LossScale:
    """Dynamic loss scale: it keeps small fp16 gradients from becoming 0.

    Halved after an overflow, doubled after 2000 updates without one. Mixed precision training,
    https://arxiv.org/abs/1710.03740, section 3.2.

    Args:
        enabled: if False the scale is always 1.
    """

    _START, _DOUBLE_AFTER = 2.0**16, 2000

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = self._START if enabled else 1.0
        self._good_updates = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss for the backward pass."""
        return loss * self.value if self.enabled else loss

    @torch.no_grad()
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        for gradient in gradients if self.enabled else ():
            gradient.mul_(1 / self.value)

    def update(self, *, is_finite: bool) -> None:
        """Adapt the scale after an update, whose gradient was finite or not."""
        if not self.enabled:
            return
        self._good_updates = self._good_updates + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self._good_updates % self._DOUBLE_AFTER == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint."""
        return {"value": self.value, "good_updates": self._good_updates}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of `state_dict`; a scale that is not enabled stays 1."""
        if self.enabled:
            self.value, self._good_updates = float(state["value"]), int(state["good_updates"])
