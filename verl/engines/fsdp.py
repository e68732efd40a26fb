"""Engines with weights sharded by FSDP2, alone or with tensor and sequence parallelism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typing_extensions import override

from verl.config.placement import ParallelConfig
from verl.config.roles import OptimizerConfig, RoleConfig
from verl.data.batch import Batch
from verl.engines.base import Objective, dummy_batch
from verl.engines.dcp_checkpoint import begin_save, load_trained, trained_state
from verl.engines.device_meshes import DeviceMeshes, make_device_meshes
from verl.engines.hf.families import decoder_layers
from verl.engines.hf.hf_io import export_model, load_sharded, model_folder
from verl.engines.hf.lora import POLICY, add_lora
from verl.engines.hf.meta_init import empty_transformer, keep_tied_weights, parameters_on_meta
from verl.engines.hf.models import Backbone, PolicyModel, RewardModel
from verl.engines.hf.pretrained import value_model
from verl.engines.hf.weights import to_local
from verl.engines.local import LocalEngine, LocalForwardEngine
from verl.engines.optimizer import build_optimizer
from verl.engines.tensor_parallel import (
    check_parallel_adapter,
    check_parallel_sizes,
    is_head_norm,
    parallelize,
)
from verl.utils.device import PRECISIONS

T = TypeVar("T")


def sharded_engine(
    source: str,
    kind: Literal["policy", "value", "reward"],
    role: RoleConfig,
    parallel: ParallelConfig,
    *,
    device: torch.device,
    total_updates: int | None,
) -> FSDPForwardEngine:
    """Engine of a model that is sharded over all ranks of the default process group; a collective.

    The model is built on the meta device, sharded, and filled slice by slice: no rank ever holds it whole.

    Args:
        source: folder or hub name of a causal language model; for `kind` reward of a reward model.
        kind: use of the model.
        role: precision, packing, optimizer.
        parallel: sizes of the meshes.
        device: device of this rank.
        total_updates: updates of the whole run, for the schedule of the learning rate; None: the model is not
            trained.

    Raises:
        ValueError: sizes that do not fit the model or the ranks, or there is no such model.
    """
    if parallel.pipeline > 1 or parallel.engine.options:
        raise ValueError(
            f"need pipeline=1 and no options for the engine fsdp, got {parallel}; "
            "take engine=megatron for stages of layers"
        )
    folder = model_folder(source)
    meshes = make_device_meshes(parallel, device)
    family = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    transformer = empty_transformer(folder, family)
    check_parallel_sizes(transformer, parallel, packing=role.packing)
    has_adapter = total_updates is not None and role.lora.is_on
    if has_adapter:
        add_lora(transformer, role.lora)
        check_parallel_adapter(transformer, parallel)
    if kind == "value":
        with parameters_on_meta():
            model: Backbone = value_model(transformer, role.precision)
    else:
        model = {"policy": PolicyModel, "reward": RewardModel}[kind](transformer, role.precision)
    if total_updates is None:
        model.requires_grad_(False)
    shard_model(model, role, parallel, meshes, device=device)
    load_sharded(model, str(folder), role.lora if has_adapter else None)
    if has_adapter:
        model.adapter = POLICY
    model(model.check_forward)
    fsdp_modules(model)[0].reshard()
    # Only now, since the check compares whole sequences.
    model.sequence = meshes.sequence
    if total_updates is None:
        return FSDPForwardEngine(model, role, meshes)
    return FSDPEngine(model, role, meshes, total_updates=total_updates)


def shard_model(
    model: Backbone, role: RoleConfig, parallel: ParallelConfig, meshes: DeviceMeshes, *, device: torch.device
) -> None:
    """Shard a model on the meta device over the meshes, and allocate the local shards, not filled yet."""
    if meshes.tensor is not None:
        parallelize(model.transformer, meshes.tensor)
    precision = MixedPrecisionPolicy()
    if role.precision != "fp32":
        # Gradients are summed over ranks in fp32.
        precision = MixedPrecisionPolicy(param_dtype=PRECISIONS[role.precision], reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if parallel.offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": meshes.data, "mp_policy": precision, "offload_policy": offload}
    for layer in decoder_layers(model.transformer):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in fsdp_modules(model):
        # A loss is a sum over all rows of an update, so gradients are summed over ranks, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    storage = torch.device("cpu") if parallel.offload else device
    with keep_tied_weights(model.transformer):
        model._apply(lambda t: torch.empty_like(t, device=storage) if t.is_meta else t.to(device))
    model.compute_device = device


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Modules whose parameters are gathered together, the model itself first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class FSDPForwardEngine(LocalForwardEngine):
    """A sharded model that runs forward passes only.

    Args:
        model: sharded over `meshes`.
        config: decides if rows are packed.
        meshes: of its ranks.
    """

    def __init__(self, model: Backbone, config: RoleConfig, meshes: DeviceMeshes) -> None:
        self.model = model
        self.model.eval()
        self.dispatch_ranks = meshes.dispatch_ranks
        self.mesh = meshes.mesh
        self._config = config
        self._meshes = meshes

    @override
    def gather_over_data(self, item: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self._meshes.data_group)
        dist.all_gather_object(gathered, item, group=self._meshes.data_group)
        return gathered

    @contextmanager
    def unsharded_weights(self) -> Iterator[None]:
        """Context in which the shards of FSDP are gathered; those of tensor parallelism stay."""
        modules = fsdp_modules(self.model)
        with torch.no_grad():
            # FSDP2 takes the module that is used first for the root, so the model itself must be the first.
            self.model(lambda: None)
            for module in modules:
                module.unshard()
                module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(id(module) != id(self.model), recurse=False)

    @override
    def export(self, folder: Path) -> None:
        export_model(self.model, folder)

    @override
    def forward(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return super().forward(call, *args)
        finally:
            if not torch.is_grad_enabled():
                # Without a backward pass FSDP2 leaves the parameters of the root unsharded, and the optimizer
                # has the sharded ones.
                fsdp_modules(self.model)[0].reshard()

    @override
    def dummy_forward_backward(self) -> None:
        self.forward(self.model.zero_loss, self.model_inputs(dummy_batch()))


class FSDPEngine(FSDPForwardEngine, LocalEngine):
    """A sharded model that is trained.

    Args:
        model: sharded over `meshes`.
        config: precision, micro-batches, optimizer.
        meshes: of its ranks.
        total_updates: updates of the whole run, for the schedule of the learning rate.
    """

    def __init__(
        self, model: Backbone, config: RoleConfig, meshes: DeviceMeshes, *, total_updates: int
    ) -> None:
        FSDPForwardEngine.__init__(self, model, config, meshes)
        # A group for each model: in one group two models that are saved at once would mix their messages.
        self._saving = dist.new_group(backend="gloo")
        self.prepare_training(total_updates)

    @override
    def build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        def mesh_of(parameter: Tensor) -> Any:
            return parameter.device_mesh if isinstance(parameter, DTensor) else None

        # The parameters of a group are updated by one kernel, which wants them on one mesh.
        return build_optimizer(self.model, config, fused=False, sharded_by=mesh_of)

    @override
    def dummy_forward_backward(self) -> None:
        loss = self.forward(self.model.zero_loss, self.model_inputs(dummy_batch()))
        if torch.is_grad_enabled():
            self.backward(loss)

    @override
    def bad_rows(self, batch: Batch, rows: Sequence[int], objective: Objective) -> list[int]:
        # A forward pass of each row alone would need the other ranks.
        return batch.row_ids[list(rows)].tolist()

    @torch.no_grad()
    @override
    def clip_gradients(self, max_norm: float) -> float:
        parameters = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        self._sum_head_norms(parameters)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        norm = math.sqrt(self._sum_of_squares(gradients))
        if norm > max_norm:
            for gradient in gradients:
                gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def _sum_head_norms(self, parameters: dict[str, nn.Parameter]) -> None:
        """Sum the gradients of norms of single heads over the tensor ranks, which have different heads."""
        tensor = self._meshes.tensor
        for name in filter(is_head_norm, parameters if tensor is not None else ()):
            gradient = parameters[name].grad
            assert isinstance(gradient, DTensor) and tensor is not None
            local = gradient.to_local()
            total = local.to(self.model.device)
            dist.all_reduce(total, group=tensor.get_group())
            local.copy_(total)

    def _sum_of_squares(self, gradients: list[Tensor]) -> float:
        """Sum of squares over all shards; a gradient that tensor ranks have in common counts once."""
        data, tensor = self._meshes.data, self._meshes.tensor
        # Of gradients that all tensor ranks have, and of those that are sharded over the tensor ranks.
        sums = torch.zeros(2, dtype=torch.float64)
        for gradient in gradients:
            is_tensor_parallel = isinstance(gradient, DTensor) and gradient.device_mesh.ndim > data.ndim
            sums[int(is_tensor_parallel)] += to_local(gradient).float().square().sum().double().cpu()
        sums = sums.to(self.model.device)
        shards = data if data.ndim == 1 else data["shards"]
        dist.all_reduce(sums, group=shards.get_group())
        if tensor is not None:
            over_tensor_ranks = sums[1:].clone()
            dist.all_reduce(over_tensor_ranks, group=tensor.get_group())
            sums[1:] = over_tensor_ranks
        return float(sums.sum())

    @override
    def save(self, folder: Path) -> Callable[[], None]:
        if dist.get_rank() == 0:
            self.model.transformer.config.save_pretrained(folder)
        state = trained_state(self.model, self._optimizer)
        return begin_save(folder, state, self.progress(), group=self._saving)

    @override
    def load(self, folder: Path) -> None:
        progress = load_trained(folder, self.model, self._optimizer, kind=self.model_kind, is_alone=False)
        self.restore_progress(progress)
