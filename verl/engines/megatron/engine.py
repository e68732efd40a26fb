"""Inference and training with Megatron-Core: tensor, pipeline, context and expert parallelism."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn
from typing_extensions import override

from verl.config.roles import RoleConfig
from verl.data.batch import Batch, ModelInput
from verl.engines.base import (
    ForwardEngine,
    Objective,
    Outputs,
    UpdateTotals,
    all_finite,
    scatter_response_values,
)
from verl.engines.local import LocalEngine
from verl.engines.megatron.checkpoint import (
    OptimizerPart,
    begin_save,
    optimizer_parts,
    raise_on_all_ranks,
    read_parts,
    read_progress,
    set_steps,
    shapes_digest,
    sync_model_weights,
)
from verl.engines.megatron.grad_buffers import GradBuffers
from verl.engines.megatron.hf_io import broadcast_full_tensors, export_folder
from verl.engines.megatron.model import MegatronPolicy, MegatronValue
from verl.engines.megatron.model_spec import MegatronModelSpec
from verl.engines.megatron.parallel_dims import RankCoordinates
from verl.engines.megatron.pipeline_schedule import PipelineSchedule
from verl.engines.megatron.weight_mapping import ModelShard, map_shards, map_value_head
from verl.engines.optimizer import LossScale, lr_factor
from verl.weight_sync.layout import TensorShard


class MegatronForwardEngine(ForwardEngine):
    """A Megatron-Core model that is only read.

    Args:
        model: its chunks on this rank, and its head.
        role: precision, optimizer.
        spec: of the model.
        coordinates: of this rank.
        megatron_config: Megatron-Core's, of the model.
    """

    can_generate = False
    model: MegatronPolicy | MegatronValue

    def __init__(
        self,
        model: MegatronPolicy | MegatronValue,
        role: RoleConfig,
        *,
        spec: MegatronModelSpec,
        coordinates: RankCoordinates,
        megatron_config: TransformerConfig,
    ) -> None:
        self.model = model
        self.model.eval()
        self.dispatch_ranks, self.mesh = coordinates.dispatch_ranks, coordinates.mesh
        self._role = role
        self._spec = spec
        self._coordinates = coordinates
        self._megatron_config = megatron_config
        self._pipeline = self._make_pipeline(list(model.transformer.children()))
        self._shard = self._shard_of_rank()
        shards: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shards, self._shard)
        # Data ranks hold equal shards, of which the first one is read.
        self._first_rank_of: dict[ModelShard, int] = {}
        for rank, shard in enumerate(shards):
            self._first_rank_of.setdefault(shard, rank)

    def _make_pipeline(self, chunks: Sequence[nn.Module]) -> PipelineSchedule:
        return PipelineSchedule(
            self.model, chunks, coordinates=self._coordinates, config=self._megatron_config
        )

    def _shard_of_rank(self) -> ModelShard:
        coordinates, config, sizes = self._coordinates, self._megatron_config, self._coordinates.sizes
        layer_ranges = []
        for number in range(sizes.virtual_pipeline):
            chunk = number if sizes.virtual_pipeline > 1 else None
            start = get_transformer_layer_offset(config, chunk, coordinates.stage)
            stop = start + get_num_layers_to_build(config, chunk, coordinates.stage)
            layer_ranges.append((start, stop))
        num_experts, expert_rank = self._spec.num_experts // max(1, sizes.expert), coordinates.expert_rank
        return ModelShard(
            tensor_rank=coordinates.tensor_rank,
            tensor_size=sizes.tensor,
            layer_ranges=tuple(layer_ranges),
            is_first=coordinates.stage == 0,
            is_last=coordinates.is_last_stage,
            experts=(expert_rank * num_experts, (expert_rank + 1) * num_experts),
        )

    @torch.no_grad()
    @override
    def infer(self, batch: Batch, micro_batches: Sequence[Sequence[int]], outputs: Outputs) -> Tensor:
        computed: list[tuple[Sequence[int], Tensor]] = []

        def evaluate(rows: Sequence[int], micro: Batch, inputs: ModelInput) -> Tensor:
            values = outputs(inputs).cpu()
            if rows:
                computed.append((rows, values))
            return values

        with self._coordinates.active():
            self._pipeline.run(batch, micro_batches, evaluate, forward_only=True)
        result = scatter_response_values(batch, computed)
        # Only the last stage has computed values; all ranks with these rows return them.
        received: Tensor = self._broadcast_result(result)
        return received

    @override
    def export(self, folder: Path) -> None:
        value_head = self._broadcast_tensors(self._spec.value_head_shapes)
        export_folder(folder, self._spec, self.full_tensors(), value_head)

    @override
    def gather_over_data(self, thing: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self._coordinates.data_group)
        dist.all_gather_object(gathered, thing, group=self._coordinates.data_group)
        return gathered

    @override
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._spec.shapes)

    @override
    def local_shards(self) -> list[TensorShard]:
        return map_shards(self._spec, self._shard)

    @override
    def local_tensors(self) -> dict[str, Tensor]:
        return {
            name: parameter.detach()
            for name, parameter in self.local_parameters().items()
            if "value_head" not in name
        }

    @override
    def full_tensors(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        return self._broadcast_tensors(
            {name: shape for name, shape in self.shapes().items() if wanted is None or name in wanted}
        )

    def all_local_shards(self) -> list[TensorShard]:
        """The tensor shards of this rank, with those of a value head."""
        return self.local_shards() + map_value_head(self._spec, self._shard)

    def local_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this rank, as `CHUNK.PARAMETER`."""
        return dict(self.model.transformer.named_parameters())

    def _broadcast_tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
        shards_by_rank = {
            rank: map_shards(self._spec, shard) + map_value_head(self._spec, shard)
            for shard, rank in self._first_rank_of.items()
        }
        return broadcast_full_tensors(shapes, shards_by_rank, self.local_parameters())

    def _broadcast_result(self, result: Any) -> Any:
        """The object of the rank whose results count, on all ranks of the replica."""
        sent = [result]
        dist.broadcast_object_list(
            sent, src=self._coordinates.result_rank, group=self._coordinates.replica_group
        )
        return sent[0]


class MegatronEngine(MegatronForwardEngine, LocalEngine):
    """A Megatron-Core model in training.

    Gradients are fp32. The optimizer is distributed: each data rank updates its part of the weights.

    Args:
        engine: of the same model with its weights; nothing else may use it.
        total_updates: of the whole run, for the learning rate schedule.
        bucket_size: see `GradBuffers`.
        overlap_grad_reduce: see `GradBuffers`.
    """

    def __init__(
        self,
        engine: MegatronForwardEngine,
        *,
        total_updates: int,
        bucket_size: int | None,
        overlap_grad_reduce: bool,
    ) -> None:
        vars(self).update(vars(engine))
        self._config = self._role
        self._total_updates, self._updates, self._bad_updates = total_updates, 0, 0
        self._scale = LossScale(enabled=False)
        self._gradients = GradBuffers(
            list(self.model.transformer.children()),
            self._megatron_config,
            bucket_size=bucket_size,
            overlap=overlap_grad_reduce,
        )
        self._pipeline = self._make_pipeline(self._gradients.chunks)
        self.model.train()
        self._optimizer: Any = self._make_optimizer()

    def _make_optimizer(self) -> Any:
        config = self._role.optimizer
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.max_grad_norm,
            use_distributed_optimizer=True,
            bf16=self._role.precision == "bf16",
            params_dtype=self._megatron_config.params_dtype,
        )
        optimizer = get_megatron_optimizer(settings, self._gradients.chunks)
        for group in optimizer.param_groups:
            # Vectors do not decay (https://arxiv.org/abs/1711.05101). Megatron-Core applies `wd_mult` in its
            # own scheduler, which is not used here.
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        return optimizer

    @override
    def update(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective
    ) -> dict[str, float]:
        self._begin_update()
        self._forward_backward(batch, micro_batches, objective)
        return self._finish_update(1.0)

    @override
    def accumulate(self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective) -> None:
        if self._accumulated is None:
            self._begin_update()
        # Data ranks sum their gradients once, in `finish`.
        with self._gradients.accumulating():
            self._forward_backward(batch, micro_batches, objective)

    @override
    def finish(self, scale: float = 1.0) -> dict[str, float]:
        assert self._accumulated is not None, "an update is finished once, after its portions"
        with self._coordinates.active():
            self._gradients.reduce()
        return self._finish_update(scale)

    def _begin_update(self) -> None:
        self._accumulated = UpdateTotals()
        with self._coordinates.active():
            self._gradients.zero()
            self._optimizer.zero_grad()

    def _forward_backward(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]], objective: Objective
    ) -> None:
        """Add the gradients and totals of some rows to those of the update."""
        totals = self._accumulated
        assert totals is not None
        totals.rows += batch.row_ids[[row for rows in micro_batches for row in rows]].tolist()

        def evaluate(rows: Sequence[int], micro: Batch, inputs: ModelInput) -> Tensor:
            if not rows:
                return self.model.zero_loss(inputs)
            loss, monitors = objective(micro, inputs)
            if not torch.isfinite(loss):
                totals.bad_rows.extend(batch.row_ids[list(rows)].tolist())
            totals.add(loss, monitors)
            return loss

        with self._coordinates.active():
            self._pipeline.run(batch, micro_batches, evaluate, forward_only=False)

    def _finish_update(self, scale: float) -> dict[str, float]:
        """Step the optimizer, after gradients were summed over ranks."""
        totals, self._accumulated = self._accumulated, None
        assert totals is not None
        optimizer = self._role.optimizer
        with self._coordinates.active():
            # Stages before the last have no loss, so its first rank decides for all.
            metrics, bad = self._broadcast_result(totals.over_ranks(self.gather_over_data))
            if bad:
                return self.skip_update("loss", bad)
            if scale != 1:
                self._gradients.scale(scale)
                metrics["loss"] *= scale
            lr = optimizer.lr * lr_factor(self._updates, optimizer, self._total_updates)
            grad_norm = self._clip_and_step(lr)
        if not math.isfinite(grad_norm):
            return metrics | self.skip_update("gradient", totals.rows)
        self._bad_updates = 0
        return metrics | {"grad_norm": grad_norm, "lr": lr, "skipped_updates": 0.0}

    @torch.no_grad()
    def _clip_and_step(self, lr: float) -> float:
        """Clip, step if the gradient is finite, and return its norm before clipping."""
        self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return norm
        limit = self._role.optimizer.max_grad_norm
        # Each optimizer (experts have their own) clips by the norm of all gradients.
        for part in self._optimizer.chained_optimizers:
            if norm > limit and part.get_parameters():
                clip_grad_by_total_norm_fp32(part.get_parameters(), limit, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step_with_ready_grads()
        self._updates += 1
        return norm

    @override
    def has_finite_state(self) -> bool:
        return all_finite(values for _, states in self._optimizer_parts() for values in states.values())

    @override
    def checkpoint_bytes(self) -> int:
        return 3 * self.model_bytes()

    @override
    def save(self, folder: Path) -> Callable[[], None]:
        if dist.get_rank() == 0:
            self.config.save_pretrained(folder)
        # A tied head on the last stage is a copy of the embedding, which the first stage saves.
        is_copy = self._spec.is_tied and not self._shard.is_first
        parts = [
            part
            for part in self._optimizer_parts()
            if not (is_copy and part[0].local_name.endswith("output_layer.weight"))
        ]
        progress = {"updates": self._updates, "bad_updates": self._bad_updates}
        return begin_save(folder, parts, {**self._identity(), **progress})

    @override
    def load(self, folder: Path) -> None:
        error = None
        try:
            progress = read_progress(folder, self._identity())
            updates, self._bad_updates = progress["updates"], progress["bad_updates"]
            set_steps(self._optimizer, updates)
            self._updates = updates
            read_parts(folder, progress["num_files"], self._optimizer_parts())
        except ValueError as found:
            error = found
        # Before the next collective call: other ranks would wait for this one forever.
        raise_on_all_ranks(error)
        with self._coordinates.active():
            sync_model_weights(self._optimizer, self._gradients.chunks)

    def _optimizer_parts(self) -> list[OptimizerPart]:
        """The parts of weights that this rank updates, with the optimizer's states of them."""
        parameters, shards = self.local_parameters(), self.all_local_shards()
        return list(optimizer_parts(self._optimizer, parameters, shards, with_states=self._updates > 0))

    def _identity(self) -> dict[str, str]:
        """Description of the model, by which a checkpoint of another one is recognized."""
        shapes = {**self._spec.shapes, **self._spec.value_head_shapes}
        return {"kind": f"{self.config.model_type} {self._spec.kind}", "shapes": shapes_digest(shapes)}
