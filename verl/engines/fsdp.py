"""Training with weights sharded over ranks: FSDP2, by itself or with tensor and sequence parallelism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from verl.data.batch import Batch, Trajectory
from verl.engines.dcp_checkpoint import begin_save, load_trained, trained_state
from verl.engines.hf.hf_io import export_model, load_sharded, model_folder
from verl.engines.hf.lora import add_lora
from verl.engines.hf.meta_init import empty_transformer, keep_tied_weights, parameters_on_meta
from verl.engines.hf.models import Backbone, PolicyModel, RewardModel
from verl.engines.hf.pretrained import value_model
from verl.engines.local import LocalEngine, LocalForwardEngine, build_optimizer
from verl.engines.tensor_parallel import Meshes, check_sizes, is_head_norm, make_meshes, parallelize
from verl.utils.device import PRECISIONS
from verl.utils.sampling_types import Prompt

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
    """The engine of a model that is spread over all ranks of the default process group; made on all of them
    at once.

    The model is built without memory, sharded, and filled slice by slice: no rank ever holds it whole.

    Args:
        source: folder or hub name of a causal language model; of a reward model, if it becomes one.
        kind: what it becomes.
        role: precision, packing, optimizer.
        parallel: sizes of the meshes.
        device: of this rank.
        total_updates: of the whole run, for the schedule; None: the model is only read.

    Raises:
        ValueError: sizes that do not fit the model or the ranks, or no model.
    """
    if parallel.pipeline > 1 or parallel.engine.options:
        raise ValueError(
            f"need pipeline=1 and no options for the engine fsdp, got {parallel}; take engine=megatron for stages of layers"
        )
    folder = model_folder(source)
    meshes = make_meshes(parallel, device)
    transformer = empty_transformer(
        folder, AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    )
    check_sizes(transformer, parallel, packing=role.packing)
    if total_updates is not None and role.lora.rank:
        add_lora(transformer, role.lora)
    if kind == "value":
        with parameters_on_meta():
            model: Backbone = value_model(transformer, role.precision)
    else:
        model = (
            RewardModel(transformer, role.precision)
            if kind == "reward"
            else PolicyModel(transformer, role.precision)
        )
    if total_updates is None:
        model.requires_grad_(False)
    _shard(model, role, parallel, meshes, device)
    load_sharded(model, str(folder))
    model(model.check_forward)
    _root(model).reshard()
    model.sequence = meshes.sequence
    if total_updates is None:
        return FSDPForwardEngine(model, role, meshes, device=device)
    return FSDPEngine(model, role, meshes, device=device, total_updates=total_updates)


def _shard(
    model: Backbone, role: RoleConfig, parallel: ParallelConfig, meshes: Meshes, device: torch.device
) -> None:
    """Spreads a model without memory over the meshes, and gives it the memory of this rank's part."""
    if meshes.tensor is not None:
        parallelize(model.transformer, meshes.tensor)
    dtype = PRECISIONS[role.precision]
    policy = (
        MixedPrecisionPolicy()
        if role.precision == "fp32"
        else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    )
    rests = CPUOffloadPolicy(pin_memory=device.type == "cuda") if parallel.offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": meshes.data, "mp_policy": policy, "offload_policy": rests}
    for layer in model.transformer.base_model.get_submodule("layers").children():
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for module in _sharded_modules(model):
        # A loss is a sum over all rows of an update, so are its gradients.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    home = torch.device("cpu") if parallel.offload else device
    with keep_tied_weights(model.transformer):
        model._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t.to(device))
    model.compute_device = device


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _root(model: nn.Module) -> FSDPModule:
    assert isinstance(model, FSDPModule)
    return model


def _one_token() -> Batch:
    """A row that asks nothing of a model but to take part."""
    return Batch.from_trajectories([Trajectory(Prompt(""), [0], [0], [True], None, [0], 0)])


class FSDPForwardEngine(LocalForwardEngine):
    """A sharded model that is only read.

    Args:
        model: sharded over `meshes`.
        config: whether rows are packed.
        meshes: of its ranks.
        device: of this rank.
    """

    def __init__(self, model: Backbone, config: RoleConfig, meshes: Meshes, *, device: torch.device) -> None:
        self.model = model
        self.model.eval()
        self.dispatch_ranks = meshes.dispatch_ranks
        self.mesh = meshes.mesh
        self._config = config
        self._meshes = meshes

    @override
    def gather_over_data(self, thing: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self._meshes.data_ranks)
        dist.all_gather_object(gathered, thing, group=self._meshes.data_ranks)
        return gathered

    @contextmanager
    def unsharded_weights(self) -> Iterator[None]:
        """See `ForwardEngine.unsharded_weights`; the shards of tensor parallelism stay."""
        modules = _sharded_modules(self.model)
        with torch.no_grad():
            # The root first, as FSDP2 takes for the root what is first used.
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

    def _forward(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return super()._forward(call, *args)
        finally:
            if not torch.is_grad_enabled():
                # No backward pass will: until then the root's parameters are whole ones, which no optimizer
                # knows.
                _root(self.model).reshard()

    @override
    def dummy_forward_backward(self) -> None:
        inputs = self._inputs(_one_token())
        self._forward(self.model.zero_loss, inputs)


class FSDPEngine(FSDPForwardEngine, LocalEngine):
    """A sharded model that is trained.

    Args:
        model: sharded over `meshes`.
        config: precision, micro-batches, optimizer.
        meshes: of its ranks.
        device: of this rank.
        total_updates: of the whole run, for the schedule.
    """

    def __init__(
        self, model: Backbone, config: RoleConfig, meshes: Meshes, *, device: torch.device, total_updates: int
    ) -> None:
        FSDPForwardEngine.__init__(self, model, config, meshes, device=device)
        # A group for each model: two that are saved at once would answer each other.
        self._saving = dist.new_group(backend="gloo")
        self._prepare(device, total_updates)

    @override
    def save(self, folder: Path) -> Callable[[], None]:
        if dist.get_rank() == 0:
            self.model.transformer.config.save_pretrained(folder)
        return begin_save(
            folder, trained_state(self.model, self._optimizer), self._progress(), group=self._saving
        )

    @override
    def load(self, folder: Path) -> None:
        self._go_on(load_trained(folder, self.model, self._optimizer, kind=self._kind, is_alone=False))

    def _build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """AdamW as on one device; parameters on different meshes are in groups of their own, which are
        updated as one each.
        """
        optimizer = build_optimizer(self.model, config, fused=False)
        groups = [
            {**group, "params": [p for p in group["params"] if _mesh_of(p) == mesh]}
            for group in optimizer.param_groups
            for mesh in dict.fromkeys(_mesh_of(p) for p in group["params"])
        ]
        return torch.optim.AdamW(groups)

    @override
    def dummy_forward_backward(self) -> None:
        loss = self._forward(self.model.zero_loss, self._inputs(_one_token()))
        if torch.is_grad_enabled():
            self._backward(loss)

    def _culprits(self, batch: Batch, rows: Any, objective: Any) -> list[int]:
        # A forward pass of each row alone would need the other ranks.
        return batch.row_ids[list(rows)].tolist()

    @torch.no_grad()
    def _clipped_norm(self, limit: float) -> float:
        parameters = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        self._sum_head_norms(parameters)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        norm = math.sqrt(self._sum_of_squares(gradients))
        if norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / (norm + 1e-6))
        return norm

    def _sum_head_norms(self, parameters: dict[str, nn.Parameter]) -> None:
        """Gradients of weights of which each tensor rank has seen its own heads only."""
        tensor = self._meshes.tensor
        for name in filter(is_head_norm, parameters if tensor is not None else ()):
            gradient = parameters[name].grad
            assert isinstance(gradient, DTensor) and tensor is not None
            local = gradient.to_local()
            whole = local.to(self.model.device)
            dist.all_reduce(whole, group=tensor.get_group())
            local.copy_(whole)

    def _sum_of_squares(self, gradients: list[Tensor]) -> float:
        """Over all shards; what tensor ranks have in common counts once."""
        sums = torch.zeros(2, dtype=torch.float64)
        for gradient in gradients:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            sums[int(_is_tensor_parallel(gradient, self._meshes))] += (
                local.float().square().sum().double().cpu()
            )
        sums = sums.to(self.model.device)
        shards = self._meshes.data if self._meshes.data.ndim == 1 else self._meshes.data["shards"]
        dist.all_reduce(sums, group=shards.get_group())
        if self._meshes.tensor is not None:
            of_tensor_ranks = sums[1:].clone()
            dist.all_reduce(of_tensor_ranks, group=self._meshes.tensor.get_group())
            sums[1:] = of_tensor_ranks
        return float(sums.sum())


def _mesh_of(parameter: Tensor) -> Any:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def _is_tensor_parallel(gradient: Tensor, meshes: Meshes) -> bool:
    """Whether a tensor is sharded over the tensor ranks, beside the mesh of the data ranks."""
    return isinstance(gradient, DTensor) and gradient.device_mesh.ndim > meshes.data.ndim
