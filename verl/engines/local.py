"""Engines on one device: accumulation over micro-batches, clipping, loss scaling, and skipped bad updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from verl.config.roles import LoraConfig, OptimizerConfig, RoleConfig
from verl.data.batch import Batch, ModelInput
from verl.engines.base import (
    ForwardEngine,
    NotFiniteError,
    Objective,
    Outputs,
    TrainEngine,
    UpdateTotals,
    all_finite,
    not_finite_advice,
    scatter_response_values,
)
from verl.engines.dcp_checkpoint import begin_save, load_trained, trained_parameters, trained_state
from verl.engines.hf.adapters import add_adapter, reference_on_base
from verl.engines.hf.hf_io import write_model
from verl.engines.hf.lora import NO_ADAPTER, POLICY, REFERENCE, lora_dropout
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import load_language_model
from verl.engines.hf.weights import to_local
from verl.engines.optimizer import LossScale, build_optimizer, lr_factor

T = TypeVar("T")


class LocalForwardEngine(ForwardEngine):
    """A model on one device that runs forward passes only.

    Sharded engines override `forward` and `dummy_forward_backward`.

    Args:
        model: moved to `device` in place.
        config: decides if rows are packed.
        device: the device of the model.
    """

    def __init__(self, model: Backbone, config: RoleConfig, *, device: torch.device) -> None:
        self.model = model.to(device)
        self.model.eval()
        self._config = config

    @torch.no_grad()
    @override
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        def forward_passes() -> Iterator[tuple[Sequence[int], Tensor]]:
            for rows in micro_batches:
                if rows:
                    yield rows, self.forward(outputs, self.model_inputs(batch.select(rows))).cpu()
                else:
                    self.dummy_forward_backward()

        return scatter_response_values(batch, forward_passes())

    @override
    def export(self, folder: Path) -> None:
        write_model(self.model, folder)

    def forward(self, call: Callable[..., T], *args: Any) -> T:
        """The result of a call that uses the weights, in the precision of the model."""
        with self.model.forward_mode():
            return self.model(partial(call, *args))

    def dummy_forward_backward(self) -> None:
        """Take part in the collectives of a micro-batch of the other ranks; nothing to do on one device."""
        return

    def model_inputs(self, batch: Batch) -> ModelInput:
        """The rows of a batch as the model reads them."""
        return ModelInput.from_batch(batch, packed=self._config.packing, device=self.model.device)


class LocalEngine(LocalForwardEngine, TrainEngine):
    """A model on one device that is trained.

    Sharded engines override single steps: how the optimizer is built, the backward pass, clipping, saving.

    Args:
        model: moved to `device` in place.
        config: precision, micro-batches, optimizer.
        device: the device of the model.
        total_updates: updates of the whole run, for the schedule of the learning rate.
        adapter: name of its LoRA adapter among those of the transformer.
    """

    can_accumulate = True
    _accumulated: UpdateTotals | None = None

    def __init__(
        self,
        model: Backbone,
        config: RoleConfig,
        *,
        device: torch.device,
        total_updates: int,
        adapter: str = POLICY,
    ) -> None:
        if config.lora.is_on:
            add_adapter(model.transformer, config.lora, name=adapter)
            model.adapter = adapter
        super().__init__(model, config, device=device)
        self.prepare_training(total_updates)

    def prepare_training(self, total_updates: int) -> None:
        """Make the optimizer, the schedule and the loss scale; the model is on its device."""
        config = self._config
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
            # Transformers recomputes only in training mode.
            self.model.train()
        self.trained = list(trained_parameters(self.model).values())
        self._optimizer = self.build_optimizer(config.optimizer)
        self._schedule = LambdaLR(
            self._optimizer, lambda update: lr_factor(update, config.optimizer, total_updates)
        )
        self._scale = LossScale(enabled=config.precision == "fp16")
        self._bad_updates = 0

    def build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """The chosen optimizer over the trained parameters."""
        return build_optimizer(self.model, config)

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
        totals = self._accumulated
        totals.rows += batch.row_ids[[row for rows in micro_batches for row in rows]].tolist()
        for rows in micro_batches:
            if not rows:
                self.dummy_forward_backward()
                continue
            micro_batch = batch.select(rows)
            # Around the backward pass, too, which may compute activations again.
            with lora_dropout(self.model.transformer, self._config.lora.dropout):
                loss, monitors = self.forward(objective, micro_batch, self.model_inputs(micro_batch))
                if not torch.isfinite(loss):
                    totals.bad_rows += self.bad_rows(batch, rows, objective)
                # Also of a loss that is not finite: other ranks may wait for this backward pass.
                self.backward(self._scale.scaled(loss))
            totals.add(loss, monitors)

    @override
    def finish(self, scale: float = 1.0) -> dict[str, float]:
        totals, self._accumulated = self._accumulated, None
        assert totals is not None, "an update is finished once, after its portions"
        metrics, bad_rows = totals.over_ranks(self.gather_over_data)
        if bad_rows:
            return self.skip_update("loss", bad_rows)
        if scale != 1:
            self.scale_gradients(scale)
            metrics["loss"] *= scale
        # Read before the step, which moves the schedule on.
        lr = float(self._schedule.get_last_lr()[0])
        grad_norm = self.step()
        if not math.isfinite(grad_norm):
            return metrics | self.skip_update("gradient", totals.rows)
        self._bad_updates = 0
        return metrics | {"grad_norm": grad_norm, "lr": lr, "skipped_updates": 0.0}

    @override
    def discard(self) -> None:
        self._accumulated = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss."""
        loss.backward()

    @torch.no_grad()
    def scale_gradients(self, scale: float) -> None:
        """Multiply every gradient, in place."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        if not gradients:
            raise RuntimeError(
                f"need gradients beside the parameters to rescale, found none in {type(self).__name__}; "
                "train on whole updates"
            )
        for gradient in gradients:
            gradient.mul_(scale)

    def step(self) -> float:
        """Clip the gradients and step if they are finite; return their norm before clipping."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        self._scale.unscale(gradients)
        norm = self.clip_gradients(self._config.optimizer.max_grad_norm)
        if math.isfinite(norm):
            self._optimizer.step()
            self._schedule.step()
        self._scale.update(is_finite=math.isfinite(norm))
        return norm

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to a norm of at most `max_norm`; return their norm before."""
        parameters = self.trained
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(total)
        if norm > max_norm:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return norm

    def skip_update(self, kind: str, rows: Sequence[int]) -> dict[str, float]:
        """Count an update whose loss or gradient (`kind`) is not finite; raise after `max_bad_updates`."""
        self._optimizer.zero_grad(set_to_none=True)
        # An overflow of fp16 gradients is expected as long as the loss scale can still fall.
        is_overflow = kind == "gradient" and self._scale.enabled and self._scale.value >= 1
        self._bad_updates += not is_overflow
        if self._bad_updates >= self._config.max_bad_updates:
            weights = "are finite" if self.has_finite_state() else "are not finite either"
            raise NotFiniteError(
                f"the {kind} was not finite in {self._bad_updates} updates in a row, the last time for row "
                f"{', '.join(map(str, rows))} of the step, and the weights {weights}; look at rewards and "
                "samples of this step, and "
                f"{not_finite_advice(self._config.precision, self._config.optimizer)}"
            )
        return {"skipped_updates": 1.0}

    @torch.no_grad()
    def bad_rows(self, batch: Batch, rows: Sequence[int], objective: Objective) -> list[int]:
        """`row_ids` of the rows whose own loss is not finite; of all rows if only the sum is not."""
        alone = [(row, batch.select([row])) for row in rows]
        losses = {row: self.forward(objective, one, self.model_inputs(one))[0] for row, one in alone}
        bad = [row for row, loss in losses.items() if not torch.isfinite(loss)] or list(rows)
        return batch.row_ids[bad].tolist()

    @override
    def has_finite_state(self) -> bool:
        return all_finite(map(to_local, trained_state(self.model, self._optimizer).values()))

    @override
    def checkpoint_bytes(self) -> int:
        trained = sum(parameter.numel() for parameter in trained_parameters(self.model).values())
        saved = sum(tensor.numel() for tensor in trained_state(self.model, self._optimizer).values())
        # Before the first update there are no states: most optimizers have two numbers for each weight.
        return 4 * (saved if self._optimizer.state else 3 * trained)

    @override
    def save(self, folder: Path) -> Callable[[], None]:
        self.model.transformer.config.save_pretrained(folder)
        self._optimizer.zero_grad(set_to_none=True)  # the checkpoint may need their memory
        return begin_save(folder, trained_state(self.model, self._optimizer), self.progress())

    @override
    def load(self, folder: Path) -> None:
        progress = load_trained(folder, self.model, self._optimizer, kind=self.model_kind, is_alone=True)
        self.restore_progress(progress)

    @property
    def model_kind(self) -> str:
        """Family and use of the model, which a checkpoint must match."""
        return f"{self.model.transformer.config.model_type} {type(self.model).__name__.removeprefix('FSDP')}"

    def progress(self) -> dict[str, Any]:
        """State of a checkpoint besides tensors."""
        return {
            "kind": self.model_kind,
            "updates": self._schedule.last_epoch,
            "scale": self._scale.state_dict(),
            "bad_updates": self._bad_updates,
        }

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        """Continue at the update of a checkpoint; the learning rate follows the current settings."""
        self._schedule.last_epoch = progress["updates"]
        factors = [factor(self._schedule.last_epoch) for factor in self._schedule.lr_lambdas]
        self._schedule._last_lr = [
            base * factor for base, factor in zip(self._schedule.base_lrs, factors, strict=True)
        ]
        for group, lr in zip(self._optimizer.param_groups, self._schedule._last_lr, strict=True):
            group["lr"] = lr
        self._scale.load_state_dict(progress["scale"])
        self._bad_updates = progress["bad_updates"]


def frozen_engine(
    policy: PolicyModel, path: str | None, config: RoleConfig, *, setting: str
) -> LocalForwardEngine:
    """Engine of a frozen language model beside a policy, on its device and in its precision.

    With LoRA it is the model below the policy's adapter, if it is the policy at the start or another adapter
    of the same model.

    Args:
        policy: the policy whose tokens it reads.
        path: folder or hub name; None: the policy as it is now.
        config: of the policy.
        setting: name of the setting of the path, for messages.

    Raises:
        ValueError: it cannot be loaded, has another vocabulary, or its family is not supported.
    """
    shares_base, adapter = reference_on_base(config, path)
    if shares_base:
        return _frozen_adapter(policy, adapter, config)
    transformer = load_language_model(path) if path else copy.deepcopy(policy.transformer)
    sizes = [other.config.get_text_config().vocab_size for other in (policy.transformer, transformer)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"need the policy's vocabulary of {sizes[0]} tokens in {setting}, got {sizes[1]}; "
            "take a model of its family"
        )
    model = PolicyModel(transformer.requires_grad_(False), policy.precision).to(policy.device)
    model.check_forward()
    return LocalForwardEngine(model, config, device=policy.device)


def _frozen_adapter(policy: PolicyModel, adapter: str | None, config: RoleConfig) -> LocalForwardEngine:
    """Engine of the model below a policy's adapter, with another adapter if one is given."""
    transformer, was_training = policy.transformer, policy.training
    if adapter is not None:
        add_adapter(transformer, LoraConfig(path=adapter), name=REFERENCE, trained=False)
    model = PolicyModel(transformer, policy.precision)
    model.adapter = NO_ADAPTER if adapter is None else REFERENCE
    engine = LocalForwardEngine(model, config, device=policy.device)
    policy.train(was_training)
    return engine
