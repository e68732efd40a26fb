"""Training on one device: exact accumulation over micro-batches, AdamW, clipping, loss scaling, bad updates
skipped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from typing_extensions import override

from verl.config.roles import OptimizerConfig, RoleConfig
from verl.data.batch import Batch, ModelInput, present_mask
from verl.engines.base import (
    ForwardEngine,
    NotFiniteError,
    Objective,
    Outputs,
    TrainEngine,
    UpdateTotals,
    combined,
)
from verl.engines.dcp_checkpoint import begin_save, load_trained, trained_state
from verl.engines.hf.hf_io import export_model
from verl.engines.hf.lora import add_lora, has_lora, reset_lora
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import load_language_model, save_model

T = TypeVar("T")


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only (https://arxiv.org/abs/1711.05101)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def lr_factor(update: int, config: OptimizerConfig, total_updates: int) -> float:
    """Share of the peak learning rate at an update, from 0: linear warm-up, then constant, linear or cosine
    decay.
    """
    if update < config.warmup_steps:
        return (update + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (update - config.warmup_steps) / max(1, total_updates - config.warmup_steps))
    shape = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


class LossScale:
    """Factor on a loss in fp16, so that small gradients are not lost: halved after an overflow, doubled after
    2000 updates without.

    Mixed precision training, https://arxiv.org/abs/1710.03740, section 3.2.

    Args:
        enabled: else it is 1, always.
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
        """Takes the factor out of gradients, in place."""
        for gradient in gradients if self.enabled else ():
            gradient.mul_(1 / self.value)

    def update(self, *, is_finite: bool) -> None:
        """Moves on after an update."""
        if not self.enabled:
            return
        self._good_updates = self._good_updates + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self._good_updates % self._DOUBLE_AFTER == 0:
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"value": self.value, "good_updates": self._good_updates}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from `state_dict`; a scale that is off stays so."""
        if self.enabled:
            self.value, self._good_updates = float(state["value"]), int(state["good_updates"])


class LocalForwardEngine(ForwardEngine):
    """A model on one device that is only read.

    Args:
        model: moved to `device` in place.
        config: whether rows are packed.
        device: where it is.
    """

    def __init__(self, model: Backbone, config: RoleConfig, *, device: torch.device) -> None:
        self.model = model.to(device)
        self.model.eval()
        self._config = config

    @torch.no_grad()
    @override
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        present = present_mask(batch.response_lengths)
        result = torch.zeros(present.shape)
        for rows in micro_batches:
            if not rows:
                self.dummy_forward_backward()
                continue
            values = self._forward(outputs, self._inputs(batch.select(rows))).cpu()
            if values.ndim >= result.ndim:
                result = result.new_zeros(*present.shape, *values.shape[1:])
            block = result.new_zeros(len(rows), *result.shape[1:])
            block[present[list(rows)]] = values
            result[list(rows)] = block
        return result

    @override
    def export(self, folder: Path) -> None:
        if has_lora(self.model.transformer):
            export_model(self.model, folder)
        else:
            save_model(self.model, folder)

    def _forward(self, call: Callable[..., T], *args: Any) -> T:
        """A use of the weights in their precision."""
        with self.model.forward_mode():
            return self.model(partial(call, *args))

    def dummy_forward_backward(self) -> None:
        """What a rank without rows does while others compute; alone, nothing."""
        return

    def _inputs(self, batch: Batch) -> ModelInput:
        return ModelInput.from_batch(batch, packed=self._config.packing, device=self.model.device)


def frozen_engine(
    policy: PolicyModel, path: str | None, config: RoleConfig, *, setting: str
) -> LocalForwardEngine:
    """A language model beside a policy that is only read, on its device and in its precision.

    Args:
        policy: whose tokens it reads.
        path: folder or hub name; none: a copy of the policy as it is now.
        config: whether rows are packed.
        setting: that names the path, for messages.

    Raises:
        ValueError: it cannot be loaded, has another vocabulary, or is of a family that cannot be run by rows.
    """
    transformer = load_language_model(path) if path else copy.deepcopy(policy.transformer)
    check_vocabulary(transformer, policy, setting)
    model = PolicyModel(transformer.requires_grad_(False), policy.precision).to(policy.device)
    model.check_forward()
    return LocalForwardEngine(model, config, device=policy.device)


def check_vocabulary(other: PreTrainedModel, policy: PolicyModel, setting: str) -> None:
    """Refuses a model for whom the policy's tokens mean something else, as far as sizes tell.

    Raises:
        ValueError: the sizes differ.
    """
    sizes = [model.config.get_text_config().vocab_size for model in (policy.transformer, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"need the policy's vocabulary of {sizes[0]} tokens in {setting}, got {sizes[1]}; take a model of its family"
        )


class LocalEngine(LocalForwardEngine, TrainEngine):
    """A model on one device that is trained.

    Args:
        model: moved to `device` in place.
        config: precision, micro-batches, optimizer.
        device: where it trains.
        total_updates: of the whole run, for the schedule.
    """

    can_accumulate = True
    _accumulated: UpdateTotals | None = None

    def __init__(
        self, model: Backbone, config: RoleConfig, *, device: torch.device, total_updates: int
    ) -> None:
        if config.lora.rank:
            add_lora(model.transformer, config.lora)
            reset_lora(model.transformer)
        super().__init__(model, config, device=device)
        self._prepare(device, total_updates)

    @override
    def update(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective
    ) -> dict[str, float]:
        self.discard()
        self.accumulate(batch, micro_batches, objective)
        return self.finish()

    @override
    def accumulate(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> None:
        if self._accumulated is None:
            self._optimizer.zero_grad(set_to_none=True)
            self._accumulated = UpdateTotals()
        so_far = self._accumulated
        so_far.rows += batch.row_ids[[row for rows in micro_batches for row in rows]].tolist()
        for rows in micro_batches:
            if not rows:
                self.dummy_forward_backward()
                continue
            micro = batch.select(rows)
            loss, monitors = self._forward(objective, micro, self._inputs(micro))
            if not torch.isfinite(loss):
                so_far.bad += self._culprits(batch, rows, objective)
            # Also of a loss that is no number: other ranks may wait for this backward pass.
            self._backward(self._scale.scaled(loss))
            so_far.add(loss, monitors)

    @override
    def finish(self, scale: float = 1.0) -> dict[str, float]:
        so_far, self._accumulated = self._accumulated, None
        assert so_far is not None, "an update is finished once, after its portions"
        metrics, bad = self._over_ranks(
            {name: float(value) for name, value in so_far.totals.items()}, so_far.bad
        )
        if bad:
            return self._skipped("loss", bad)
        if scale != 1:
            self._rescale(scale)
            metrics["loss"] *= scale
        lr = float(self._schedule.get_last_lr()[0])  # of this update; the step moves it on
        grad_norm = self._step()
        if not math.isfinite(grad_norm):
            return metrics | self._skipped("gradient", so_far.rows)
        self._bad_updates = 0
        return metrics | {"grad_norm": grad_norm, "lr": lr, "skipped_updates": 0.0}

    @override
    def discard(self) -> None:
        self._accumulated = None

    @override
    def save(self, folder: Path) -> Callable[[], None]:
        self.model.transformer.config.save_pretrained(folder)
        return begin_save(folder, trained_state(self.model, self._optimizer), self._progress())

    @override
    def load(self, folder: Path) -> None:
        self._go_on(load_trained(folder, self.model, self._optimizer, kind=self._kind, is_alone=True))

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        state = {
            "updates": self._schedule.last_epoch,
            "scale": self._scale.state_dict(),
            "bad_updates": self._bad_updates,
        }
        return {"kind": self._kind, **state}

    @property
    def _kind(self) -> str:
        """Family and use of the model."""
        return f"{self.model.transformer.config.model_type} {type(self.model).__name__.removeprefix('FSDP')}"

    def _go_on(self, progress: Mapping[str, Any]) -> None:
        """The learning rate is that of the settings at the update that was reached."""
        self._schedule.last_epoch = progress["updates"]
        factors = [factor(self._schedule.last_epoch) for factor in self._schedule.lr_lambdas]
        self._schedule._last_lr = [
            base * factor for base, factor in zip(self._schedule.base_lrs, factors, strict=True)
        ]
        for group, lr in zip(self._optimizer.param_groups, self._schedule._last_lr, strict=True):
            group["lr"] = lr
        self._scale.load_state_dict(progress["scale"])
        self._bad_updates = progress["bad_updates"]

    def _prepare(self, device: torch.device, total_updates: int) -> None:
        """What training needs besides the model."""
        config = self._config
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
            # Transformers recomputes only in training mode; dropout is off in any case.
            self.model.train()
        self._optimizer = self._build_optimizer(config.optimizer)
        self._schedule = LambdaLR(
            self._optimizer, lambda update: lr_factor(update, config.optimizer, total_updates)
        )
        self._scale = LossScale(enabled=config.precision == "fp16")
        self._bad_updates = 0

    def _build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        return build_optimizer(self.model, config)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _over_ranks(self, totals: dict[str, float], bad: list[int]) -> tuple[dict[str, float], list[int]]:
        """Sums over the data ranks, and the bad rows of all of them."""
        ranks = self.gather_over_data((totals, bad))
        if len(ranks) == 1:
            return totals, bad
        names = {name: None for sums, _ in ranks for name in sums}
        own = {name: [sums[name] for sums, _ in ranks if name in sums] for name in names}
        return {name: reduce(partial(combined, name), values) for name, values in own.items()}, [
            row for _, rows in ranks for row in rows
        ]

    @torch.no_grad()
    def _rescale(self, scale: float) -> None:
        """Multiplies every gradient, in place."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            raise RuntimeError(
                f"need gradients beside the parameters to rescale, found none in {type(self).__name__}; train on whole updates"
            )
        for gradient in gradients:
            gradient.mul_(scale)

    def _step(self) -> float:
        """Clips, steps if the gradient is finite, and returns its norm before clipping."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self._scale.unscale(gradients)
        norm = self._clipped_norm(self._config.optimizer.max_grad_norm)
        if math.isfinite(norm):
            self._optimizer.step()
            self._schedule.step()
        self._scale.update(is_finite=math.isfinite(norm))
        return norm

    def _clipped_norm(self, limit: float) -> float:
        """Scales the gradients down to the limit; returns their norm before."""
        parameters = list(self.model.parameters())
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        if norm > limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, total)
        return norm

    def _skipped(self, what: str, rows: Sequence[int]) -> dict[str, float]:
        """Counts a bad update; with a loss scale that can still fall, an overflow is no reason to stop."""
        self._optimizer.zero_grad(set_to_none=True)
        overflow = what == "gradient" and self._scale.enabled and self._scale.value >= 1
        self._bad_updates += not overflow
        if self._bad_updates >= self._config.max_bad_updates:
            raise NotFiniteError(
                f"the {what} was not finite in {self._bad_updates} updates in a row, the last time for row {', '.join(map(str, rows))} "
                "of the step; lower optimizer.lr or optimizer.max_grad_norm, or use precision=fp32, and look at the samples of this step"
            )
        return {"skipped_updates": 1.0}

    @torch.no_grad()
    def _culprits(self, batch: Batch, rows: Sequence[int], objective: Objective) -> list[int]:
        """The numbers of the rows whose own loss is not finite; of all, if only their sum is not."""
        alone = {
            row: self._forward(objective, batch.select([row]), self._inputs(batch.select([row])))[0]
            for row in rows
        }
        bad = [row for row, loss in alone.items() if not torch.isfinite(loss)] or list(rows)
        return batch.row_ids[bad].tolist()
