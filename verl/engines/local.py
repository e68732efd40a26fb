"""Training on one device: exact accumulation over micro-batches, AdamW, clipping, loss scaling, bad updates skipped."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from verl.data.batch import Batch, ModelInput, present_mask
from verl.engines.base import ForwardEngine, NotFiniteError, Objective, Outputs, TrainEngine
from verl.engines.models import Backbone, PolicyModel, load_language_model, restore_weights, save_model
from verl.settings import OptimizerConfig, RoleConfig

_OPTIMIZER = "optimizer.pt"


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only (https://arxiv.org/abs/1711.05101)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_factor(update: int, config: OptimizerConfig, total_updates: int) -> float:
    """Share of the peak learning rate at an update, from 0: linear warm-up, then constant, linear or cosine decay."""
    if update < config.warmup_steps:
        return (update + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (update - config.warmup_steps) / max(1, total_updates - config.warmup_steps))
    shape = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


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
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        """See `ForwardEngine.infer`."""
        present = present_mask(batch.response_lengths)
        result = torch.zeros(present.shape)
        for rows in filter(None, micro_batches):
            inputs = self._inputs(batch.select(rows))
            with self.model.ready():
                values = outputs(inputs).cpu()
            if values.ndim >= result.ndim:
                result = result.new_zeros(*present.shape, *values.shape[1:])
            block = result.new_zeros(len(rows), *result.shape[1:])
            block[present[list(rows)]] = values
            result[list(rows)] = block
        return result

    def _inputs(self, batch: Batch) -> ModelInput:
        return ModelInput.from_batch(batch, packed=self._config.packing, device=self.model.device)


def frozen_copy(policy: PolicyModel, path: str | None, config: RoleConfig, *, setting: str) -> LocalForwardEngine:
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
        raise ValueError(f"need the policy's vocabulary of {sizes[0]} tokens in {setting}, got {sizes[1]}; take a model of its family")


class LocalEngine(LocalForwardEngine, TrainEngine):
    """A model on one device that is trained.

    Args:
        model: moved to `device` in place.
        config: precision, micro-batches, optimizer.
        device: where it trains.
        total_updates: of the whole run, for the schedule.
    """

    def __init__(self, model: Backbone, config: RoleConfig, *, device: torch.device, total_updates: int) -> None:
        super().__init__(model, config, device=device)
        if config.gradient_checkpointing:
            model.recompute_activations()
            # Transformers recomputes only in training mode; dropout is off in any case.
            model.train()
        self._optimizer = build_optimizer(model, config.optimizer)
        self._schedule = LambdaLR(self._optimizer, lambda update: lr_factor(update, config.optimizer, total_updates))
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._bad_updates = 0

    def update(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> dict[str, float]:
        """See `TrainEngine.update`."""
        self._optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for rows in filter(None, micro_batches):
            micro = batch.select(rows)
            with self.model.ready():
                loss, monitors = objective(micro, self._inputs(micro))
            if not torch.isfinite(loss):
                return self._skipped("loss", self._culprits(batch, rows, objective))
            self._scaler.scale(loss).backward()
            for name, value in {"loss": loss.detach(), **monitors}.items():
                totals[name] = totals[name] + value if name in totals else value
        lr = float(self._schedule.get_last_lr()[0])  # of this update; the step moves it on
        grad_norm = self._step()
        metrics = {name: float(value) for name, value in totals.items()}
        if not math.isfinite(grad_norm):
            return metrics | self._skipped("gradient", [row for rows in micro_batches for row in rows])
        self._bad_updates = 0
        return metrics | {"grad_norm": grad_norm, "lr": lr, "skipped_updates": 0.0}

    def save(self, folder: Path) -> None:
        """See `TrainEngine.save`: weights as a Hugging Face model, the rest as plain tensors and numbers."""
        save_model(self.model, folder)
        state = {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()["last_epoch"]}
        torch.save(state | {"scaler": self._scaler.state_dict(), "bad_updates": self._bad_updates}, folder / _OPTIMIZER)

    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`."""
        restore_weights(self.model, folder)
        state = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        # PyTorch would also take over the rates and decays of the run that was saved; those of the settings hold.
        options = [{name: value for name, value in group.items() if name != "params"} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.last_epoch = state["schedule"]
        factors = [factor(self._schedule.last_epoch) for factor in self._schedule.lr_lambdas]
        self._schedule._last_lr = [base * factor for base, factor in zip(self._schedule.base_lrs, factors, strict=True)]
        for group, own, lr in zip(self._optimizer.param_groups, options, self._schedule._last_lr, strict=True):
            group.update(own, lr=lr)
        self._scaler.load_state_dict(state["scaler"])
        self._bad_updates = state["bad_updates"]

    def _step(self) -> float:
        """Clips, steps if the gradient is finite, and returns its norm before clipping."""
        self._scaler.unscale_(self._optimizer)
        parameters, limit = list(self.model.parameters()), self._config.optimizer.max_grad_norm
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        if norm > limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, total)
        if math.isfinite(norm):
            self._scaler.step(self._optimizer)
            self._schedule.step()
        self._scaler.update()
        return norm

    def _skipped(self, what: str, rows: Sequence[int]) -> dict[str, float]:
        """Counts a bad update; with a loss scale that can still fall, an overflow is no reason to stop."""
        self._optimizer.zero_grad(set_to_none=True)
        overflow = what == "gradient" and self._scaler.is_enabled() and self._scaler.get_scale() >= 1
        self._bad_updates += not overflow
        if self._bad_updates >= self._config.max_bad_updates:
            raise NotFiniteError(
                f"the {what} was not finite in {self._bad_updates} updates in a row, the last time for row {', '.join(map(str, rows))} "
                "of the step; lower optimizer.lr or optimizer.max_grad_norm, or use precision=fp32, and look at the samples of this step"
            )
        return {"skipped_updates": 1.0}

    @torch.no_grad()
    def _culprits(self, batch: Batch, rows: Sequence[int], objective: Objective) -> list[int]:
        """The rows whose own loss is not finite; all, if only their sum is not."""
        with self.model.ready():
            alone = {row: objective(batch.select([row]), self._inputs(batch.select([row])))[0] for row in rows}
        return [row for row, loss in alone.items() if not torch.isfinite(loss)] or list(rows)
