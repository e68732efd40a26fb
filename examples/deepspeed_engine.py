"""A training engine from outside of verl: DeepSpeed ZeRO-3 as a `TrainEngine`; see docs/deepspeed.md.

`placement.policy={engine: {name: "examples.deepspeed_engine:deepspeed_engine"}}` takes it; options go to
DeepSpeed's section `zero_optimization` as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from verl.config.placement import ParallelConfig
from verl.config.roles import OptimizerConfig, RoleConfig
from verl.data.batch import Batch
from verl.engines.base import Objective, dummy_batch
from verl.engines.dcp_checkpoint import begin_save
from verl.engines.device_meshes import DeviceMeshes, make_device_meshes
from verl.engines.hf.models import Backbone, PolicyModel, RewardModel
from verl.engines.hf.pretrained import load_language_model, load_reward_model, save_model, value_model
from verl.engines.local import LocalEngine, LocalForwardEngine
from verl.engines.optimizer import build_optimizer
from verl.weight_sync.layout import Bounds, TensorShard, shape_of

T = TypeVar("T")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed replaces this function in the whole process. Here its own is in place only while its model
# computes, since DTensors need PyTorch's.
_LINEAR = nn.functional.linear
# A parameter stays gathered while this id is among the modules that use it; DeepSpeed's ids begin at 0.
_KEPT_GATHERED = -1


class Policy(PolicyModel):
    """A policy whose head runs without DeepSpeed's hooks, since ranks call it different numbers of times."""

    @override
    def logits(self, states: Tensor) -> Tensor:
        logits = self.transformer.get_output_embeddings().forward(states).float()
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits


def deepspeed_engine(
    source: str,
    kind: Literal["policy", "value", "reward"],
    role: RoleConfig,
    parallel: ParallelConfig,
    *,
    device: torch.device,
    total_updates: int | None,
) -> DeepSpeedForwardEngine:
    """Engine of a model that ZeRO-3 partitions over all ranks.

    The arguments are those of `verl.engines.fsdp.sharded_engine`. Each rank reads the whole model into the
    memory of its host once, and keeps its partition.

    Raises:
        ValueError: sizes or precisions that this example does not have.
    """
    if parallel.model_copy(update={"engine": None, "offload": False}) != ParallelConfig().model_copy(
        update={"engine": None}
    ):
        raise ValueError(
            f"need no sizes in placement for this engine, every rank is a data rank, got {parallel}"
        )
    if parallel.engine.options.get("stage", 3) != 3:
        raise ValueError(f"need ZeRO stage 3 for this engine, got {parallel.engine.options['stage']}")
    if role.precision == "fp16" or role.lora.rank:
        raise ValueError(
            f"need precision fp32 or bf16 and no LoRA for this engine, got {role.precision} and "
            f"rank {role.lora.rank}"
        )
    transformer = (
        load_reward_model(source, new_head=False) if kind == "reward" else load_language_model(source)
    )
    if kind == "value":
        model: Backbone = value_model(transformer, role.precision)
    else:
        model = (
            RewardModel(transformer, role.precision)
            if kind == "reward"
            else Policy(transformer, role.precision)
        )
    model.check_forward()
    meshes = make_device_meshes(ParallelConfig(), device)
    if total_updates is None:
        return DeepSpeedForwardEngine(model.requires_grad_(False), role, parallel, meshes, device=device)
    return DeepSpeedEngine(model, role, parallel, meshes, device=device, total_updates=total_updates)


class DeepSpeedForwardEngine(LocalForwardEngine):
    """A model that runs forward passes only; its parameters are partitioned over the ranks (ZeRO-3)."""

    def __init__(
        self,
        model: Backbone,
        config: RoleConfig,
        parallel: ParallelConfig,
        meshes: DeviceMeshes,
        *,
        device: torch.device,
    ) -> None:
        self.model = model
        self.model.eval()
        self.model.compute_device = device
        self.dispatch_ranks, self.mesh = meshes.dispatch_ranks, meshes.mesh
        self._config, self._parallel, self._meshes = config, parallel, meshes
        self._shapes = {
            name: tuple(parameter.shape) for name, parameter in model.transformer.named_parameters()
        }
        self._begin()

    def _begin(self) -> None:
        self._deepspeed = self._initialize(None)

    def _initialize(self, optimizer: torch.optim.Optimizer | None) -> Any:
        """DeepSpeed's engine of the model, whose parameters are partitioned over the ranks from now on."""
        host = {"device": "cpu", "pin_memory": self._meshes.data.device_type == "cuda"}
        offload = {"offload_param": host, "offload_optimizer": host} if self._parallel.offload else {}
        config: dict[str, Any] = {
            # DeepSpeed requires a value; the rows of a micro-batch follow from verl's plans.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": self._config.optimizer.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, **offload, **self._parallel.engine.options},
        }
        if self._config.precision == "bf16":
            # No modules named: weights are gathered and gradients summed in fp32, so that gathered weights
            # are the trained ones.
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        # DeepSpeed's launcher would set it; a rank of a Ray pool sees only its own device.
        os.environ.setdefault("LOCAL_RANK", str(self.model.device.index or 0))
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
        engine = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
        self._linear, nn.functional.linear = nn.functional.linear, _LINEAR
        return engine

    @override
    def gather_over_data(self, item: Any) -> list[Any]:
        gathered: list[Any] = [None] * dist.get_world_size(self._meshes.data_group)
        dist.all_gather_object(gathered, item, group=self._meshes.data_group)
        return gathered

    @contextmanager
    @override
    def unsharded_weights(self) -> Iterator[None]:
        with keep_gathered(list(self.model.parameters())):
            yield

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face format; every rank gathers the whole model for it."""
        with self.unsharded_weights():
            if dist.get_rank() == 0:
                save_model(self.model, folder)
            dist.barrier(self._meshes.data_group)

    @override
    def full_tensors(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.transformer.named_parameters():
            if wanted is None or name in wanted:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
                yield name, whole

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors, noted at the start: parameters are empty between their uses."""
        return dict(self._shapes)

    @override
    def local_shards(self) -> list[TensorShard]:
        return [shard for shard, _ in self._partition_shards()]

    def local_tensors(self) -> dict[str, Tensor]:
        """Views of this rank's partitions, by the local names of `local_shards`."""
        return {shard.local_name: tensor for shard, tensor in self._partition_shards()}

    def _parameters(self) -> dict[str, Any]:
        """Parameters of the Hugging Face model; their `ds_tensor` is the partition of this rank."""
        return dict(self.model.transformer.named_parameters())

    def _partition_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """Shards of this rank and their tensors.

        A partition is a range of a tensor's elements. As shards it is a part of a row, whole rows, and a part
        of a row.
        """
        for name, parameter in self._parameters().items():
            start, stop = partition_range(parameter)
            offset = 0
            for bounds in boxes_of_range(self._shapes[name], start, stop):
                size = shape_of(bounds)
                tensor = parameter.ds_tensor.detach()[offset : offset + math.prod(size)].view(size)
                yield TensorShard(name, bounds, f"{name} from {start + offset}", (0,) * len(bounds)), tensor
                offset += math.prod(size)

    @override
    def forward(self, call: Callable[..., T], *args: Any) -> T:
        head = self.model.transformer.get_output_embeddings() if isinstance(self.model, PolicyModel) else None
        with self.model.forward_mode(), ExitStack() as kept:
            kept.enter_context(keep_gathered(list(head.parameters()) if head else []))
            kept.callback(setattr, nn.functional, "linear", _LINEAR)
            nn.functional.linear = self._linear
            result = self._deepspeed(partial(call, *args))
            if torch.is_grad_enabled():
                self._until_backward = kept.pop_all()
        return result

    @override
    def dummy_forward_backward(self) -> None:
        loss = self.forward(self.model.zero_loss, self.model_inputs(dummy_batch()))
        if torch.is_grad_enabled():
            self.backward(loss)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's loss."""
        # DeepSpeed averages gradients over ranks; here a loss is a sum over all rows of an update.
        with self._until_backward:
            self._deepspeed.backward(loss * dist.get_world_size())


class DeepSpeedEngine(DeepSpeedForwardEngine, LocalEngine):
    """A model that is trained, with parameters, gradients and optimizer partitioned over ranks (ZeRO-3)."""

    # DeepSpeed keeps the gradients, so they can't be scaled after the last portion.
    can_accumulate = False

    def __init__(
        self,
        model: Backbone,
        config: RoleConfig,
        parallel: ParallelConfig,
        meshes: DeviceMeshes,
        *,
        device: torch.device,
        total_updates: int,
    ) -> None:
        self._total_updates = total_updates
        # A group for each model: in one group two models that are saved at once would mix their messages.
        self._saving = dist.new_group(backend="gloo")
        DeepSpeedForwardEngine.__init__(self, model, config, parallel, meshes, device=device)

    def _begin(self) -> None:
        self.prepare_training(self._total_updates)

    @override
    def build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """The optimizer as on one device; DeepSpeed replaces its parameters by this rank's partitions."""
        optimizer = build_optimizer(self.model, config, fused=False, sharded_by=lambda p: None)
        self._deepspeed = self._initialize(optimizer)
        return optimizer

    @override
    def step(self) -> float:
        # Not DeepSpeed's norm, which is finite even if a gradient is not: it would step.
        squares = sum(
            without_padding(p, safe_get_local_grad(p)).double().square().sum()
            for p in self.model.parameters()
        )
        assert isinstance(squares, Tensor)
        dist.all_reduce(squares)
        norm = math.sqrt(float(squares))
        if math.isfinite(norm):
            self._deepspeed.step()
            self._schedule.step()
        return norm

    @override
    def skip_update(self, kind: str, rows: Sequence[int]) -> dict[str, float]:
        self._deepspeed.optimizer.zero_grad()
        return super().skip_update(kind, rows)

    @override
    def bad_rows(self, batch: Batch, rows: Sequence[int], objective: Objective) -> list[int]:
        # A forward pass of each row alone would need the other ranks.
        return batch.row_ids[list(rows)].tolist()

    def save(self, folder: Path) -> Callable[[], None]:
        """Begin to write a checkpoint; each rank writes its partition."""
        if dist.get_rank() == 0:
            self.model.transformer.config.save_pretrained(folder)
        return begin_save(folder, self._state(), self.progress(), group=self._saving)

    @override
    def load(self, folder: Path) -> None:
        try:
            progress = json.loads((folder / "progress.json").read_text())
            if progress["kind"] != self.model_kind:
                raise ValueError(f"need a {self.model_kind}, got a {progress['kind']}")
            for flat in self._deepspeed.optimizer.fp32_partitioned_groups_flat if progress["updates"] else ():
                moments = {key: torch.zeros_like(flat) for key in _MOMENTS}
                self._optimizer.state[flat] = {"step": torch.tensor(float(progress["updates"])), **moments}
            state = self._state()
            dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
        except (OSError, ValueError, KeyError, dcp.api.CheckpointException) as error:
            raise ValueError(
                f"cannot go on from {folder}: {error}; start with `checkpoint.resume=never`"
            ) from error
        for name, parameter in self.model.named_parameters():
            self._set_parameter(
                parameter, *(state[key].to_local() for key in checkpoint_keys(name) if key in state)
            )
        self.restore_progress(progress)

    @torch.no_grad()
    def _set_parameter(self, parameter: Any, weights: Tensor, *moments: Tensor) -> None:
        for key, moment in zip(_MOMENTS, moments, strict=False):
            safe_set_local_optimizer_state(parameter, with_padding(parameter, moment), key)
        safe_set_local_fp32_param(parameter, with_padding(parameter, weights))
        parameter.ds_tensor.copy_(with_padding(parameter, weights))
        if parameter.ds_persist:
            parameter.partition()
            parameter.all_gather()

    def _state(self) -> dict[str, DTensor]:
        """Tensors that training changes, each flattened to one dimension, of which every rank has a range."""
        state = {}
        named: dict[str, Any] = dict(self.model.named_parameters())
        for name, parameter in named.items():
            parts = [safe_get_local_fp32_param(parameter)]
            parts += [
                safe_get_local_optimizer_state(parameter, key) for key in _MOMENTS if self._optimizer.state
            ]
            for key, part in zip(checkpoint_keys(name), parts, strict=False):
                size = torch.Size([parameter.ds_numel])
                # Cloned: a view with an offset cannot be saved as a DTensor on the CPU.
                own = without_padding(parameter, part).clone()
                state[key] = DTensor.from_local(
                    own, self._meshes.data, [Shard(0)], run_check=False, shape=size, stride=(1,)
                )
        return state


@contextmanager
def keep_gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Context in which parameters stay gathered on every rank, whichever modules use them."""
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_KEPT_GATHERED)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(_KEPT_GATHERED)


def checkpoint_keys(name: str) -> list[str]:
    """Names of a parameter and its moments in a checkpoint."""
    return [f"model.{name}", *(f"optimizer.{name}.{key}" for key in _MOMENTS)]


def partition_range(parameter: Any) -> tuple[int, int]:
    """Range of a parameter's elements on this rank; partitions are of equal size, the last ones padded."""
    size, count = parameter.ds_tensor.numel(), parameter.ds_numel
    start = min(count, dist.get_rank() * size)
    return start, min(count, start + size)


def without_padding(parameter: Any, part: Tensor) -> Tensor:
    """A partition without its padding."""
    start, stop = partition_range(parameter)
    return part.detach().flatten()[: stop - start]


def with_padding(parameter: Any, part: Tensor) -> Tensor:
    """A partition with its padding, on the device of the parameter's own."""
    return nn.functional.pad(
        part.to(parameter.ds_tensor.device), (0, parameter.ds_tensor.numel() - part.numel())
    )


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Bounds]:
    """Boxes of the elements from `start` to `stop` of a tensor, in their order in memory."""
    row = math.prod(shape[1:])
    while start < stop:
        first, offset = divmod(start, row)
        if not offset and stop - start >= row:
            last = stop // row
            yield ((first, last), *((0, size) for size in shape[1:]))
            start = last * row
        else:
            end = min(stop, (first + 1) * row)
            yield from (
                ((first, first + 1), *rest) for rest in boxes_of_range(shape[1:], offset, end - first * row)
            )
            start = end
