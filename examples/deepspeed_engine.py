"""A training engine from outside of verl: DeepSpeed ZeRO-3 behind the verbs of `TrainEngine`; see
docs/deepspeed.md.

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
from verl.engines.optimizer import build_adamw
from verl.weight_sync.layout import Bounds, TensorShard, shape_of

T = TypeVar("T")
_MOMENTS = ("exp_avg", "exp_avg_sq")
# DeepSpeed puts its own in this place, for the whole process; here it has it while its model computes, and
# DTensors have PyTorch's.
_LINEAR = nn.functional.linear
# A parameter stays whole as long as this is among the modules that use it; DeepSpeed numbers those from 0.
_KEPT = -1


class Policy(PolicyModel):
    """A policy whose head is used without DeepSpeed's hooks: how often it is, chunk by chunk, differs between
    ranks.
    """

    def logits(self, states: Tensor) -> Tensor:
        """See `PolicyModel.logits`."""
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
    """The engine of a model that ZeRO-3 spreads over all ranks; its arguments are those of
    `verl.engines.fsdp.sharded_engine`.

    Each rank reads the whole model into the memory of its host once, and keeps its share.

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
            f"need precision fp32 or bf16 and no LoRA for this engine, got {role.precision} and rank {role.lora.rank}"
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
    """A model that is only read, its parameters divided over the ranks (ZeRO-3)."""

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
        self._begin(device)

    def _begin(self, device: torch.device) -> None:
        self._deepspeed = self._divided(None)

    def _divided(self, optimizer: torch.optim.Optimizer | None) -> Any:
        """The model in the hands of DeepSpeed, which puts this rank's share of it on its device."""
        host = {"device": "cpu", "pin_memory": self._meshes.data.device_type == "cuda"}
        offload = {"offload_param": host, "offload_optimizer": host} if self._parallel.offload else {}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # Said to it alone: rows come as our plans deal them.
            "gradient_clipping": self._config.optimizer.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, **offload, **self._parallel.engine.options},
        }
        if self._config.precision == "bf16":
            # No modules named: weights are gathered and gradients summed in fp32, so that whole weights are
            # those that train.
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        # What DeepSpeed's own launcher would set: a rank of a Ray pool sees its device alone.
        os.environ.setdefault("LOCAL_RANK", str(self.model.device.index or 0))
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
        engine = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=config, dist_init_required=False
        )[0]
        self._linear, nn.functional.linear = nn.functional.linear, _LINEAR
        return engine

    def gather_over_data(self, thing: Any) -> list[Any]:
        """See `ForwardEngine.gather_over_data`."""
        gathered: list[Any] = [None] * dist.get_world_size(self._meshes.data_group)
        dist.all_gather_object(gathered, thing, group=self._meshes.data_group)
        return gathered

    @contextmanager
    def unsharded_weights(self) -> Iterator[None]:
        """See `ForwardEngine.unsharded_weights`."""
        with _kept_whole(list(self.model.parameters())):
            yield

    def export(self, folder: Path) -> None:
        """See `ForwardEngine.export`; every rank has the model whole meanwhile."""
        with self.unsharded_weights():
            if dist.get_rank() == 0:
                save_model(self.model, folder)
            dist.barrier(self._meshes.data_group)

    def full_tensors(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See `ForwardEngine.full_tensors`."""
        for name, parameter in self.model.transformer.named_parameters():
            if wanted is None or name in wanted:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
                yield name, whole

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `ForwardEngine.shapes`; the parameters themselves are empty between their uses."""
        return dict(self._shapes)

    def local_shards(self) -> list[TensorShard]:
        """See `ForwardEngine.pieces`."""
        return [piece for piece, _ in self._boxes()]

    def local_tensors(self) -> dict[str, Tensor]:
        """See `ForwardEngine.homes`; views of what is on this rank."""
        return {piece.local_name: home for piece, home in self._boxes()}

    def _parameters(self) -> dict[str, Any]:
        """Those of the Hugging Face model, with what DeepSpeed adds to them: `ds_tensor` is the share of this
        rank.
        """
        return dict(self.model.transformer.named_parameters())

    def _boxes(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """A share is a range of a tensor's elements, which is a few boxes: a part of a row, whole rows, a
        part of a row.
        """
        for name, parameter in self._parameters().items():
            start, stop = _own_range(parameter)
            place = 0
            for bounds in _boxes_of(self._shapes[name], start, stop):
                size = shape_of(bounds)
                home = parameter.ds_tensor.detach()[place : place + math.prod(size)].view(size)
                yield TensorShard(name, bounds, f"{name} from {start + place}", (0,) * len(bounds)), home
                place += math.prod(size)

    @override
    def forward(self, call: Callable[..., T], *args: Any) -> T:
        head = self.model.transformer.get_output_embeddings() if isinstance(self.model, PolicyModel) else None
        with self.model.forward_mode(), ExitStack() as kept:
            kept.enter_context(_kept_whole(list(head.parameters()) if head else []))
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

    @override
    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the number of ranks; a loss is a sum over all rows of an update, so are its
        # gradients.
        with self._until_backward:
            self._deepspeed.backward(loss * dist.get_world_size())


class DeepSpeedEngine(DeepSpeedForwardEngine, LocalEngine):
    """A model that is trained, its parameters, gradients and optimizer divided over the ranks (ZeRO-3)."""

    # The gradients are DeepSpeed's, out of reach of the factor that portions need at the end.
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
        # A group for each model: two that are saved at once would answer each other.
        self._saving = dist.new_group(backend="gloo")
        DeepSpeedForwardEngine.__init__(self, model, config, parallel, meshes, device=device)

    def _begin(self, device: torch.device) -> None:
        self.prepare_training(self._total_updates)

    @override
    def build_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        """AdamW as on one device; DeepSpeed gives it the shares in place of the parameters."""
        optimizer = build_adamw(self.model, config, fused=False)
        self._deepspeed = self._divided(optimizer)
        return optimizer

    @override
    def step(self) -> float:
        # Of this engine: DeepSpeed's has a number where a gradient has none, and would step.
        squares = sum(
            _own_part(p, safe_get_local_grad(p)).double().square().sum() for p in self.model.parameters()
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
        return batch.row_ids[
            list(rows)
        ].tolist()  # A forward pass of each row alone would need the other ranks.

    def save(self, folder: Path) -> Callable[[], None]:
        """See `TrainEngine.save`; each rank writes its share."""
        if dist.get_rank() == 0:
            self.model.transformer.config.save_pretrained(folder)
        return begin_save(folder, self._state(), self.progress(), group=self._saving)

    def load(self, folder: Path) -> None:
        """See `TrainEngine.load`."""
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
            self._take(parameter, *(state[key].to_local() for key in _keys(name) if key in state))
        self.restore_progress(progress)

    @torch.no_grad()
    def _take(self, parameter: Any, weights: Tensor, *moments: Tensor) -> None:
        for key, moment in zip(_MOMENTS, moments, strict=False):
            safe_set_local_optimizer_state(parameter, _padded(parameter, moment), key)
        safe_set_local_fp32_param(parameter, _padded(parameter, weights))
        parameter.ds_tensor.copy_(_padded(parameter, weights))
        if parameter.ds_persist:
            parameter.partition()
            parameter.all_gather()

    def _state(self) -> dict[str, DTensor]:
        """What training changes: each tensor as a line of elements, of which every rank has a range."""
        state = {}
        named: dict[str, Any] = dict(self.model.named_parameters())
        for name, parameter in named.items():
            parts = [safe_get_local_fp32_param(parameter)]
            parts += [
                safe_get_local_optimizer_state(parameter, key) for key in _MOMENTS if self._optimizer.state
            ]
            for key, part in zip(_keys(name), parts, strict=False):
                size = torch.Size([parameter.ds_numel])
                own = _own_part(
                    parameter, part
                ).clone()  # A view that begins elsewhere cannot be saved as a DTensor on the CPU.
                state[key] = DTensor.from_local(
                    own, self._meshes.data, [Shard(0)], run_check=False, shape=size, stride=(1,)
                )
        return state


@contextmanager
def _kept_whole(parameters: Sequence[Any]) -> Iterator[None]:
    """Inside, parameters are whole on every rank, whichever modules use them and however often."""
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(_KEPT)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(_KEPT)


def _keys(name: str) -> list[str]:
    """Names in a checkpoint."""
    return [f"model.{name}", *(f"optimizer.{name}.{key}" for key in _MOMENTS)]


def _own_range(parameter: Any) -> tuple[int, int]:
    """Which elements of a parameter are on this rank: shares are equal, the last ones may be filled up."""
    share, count = parameter.ds_tensor.numel(), parameter.ds_numel
    start = min(count, dist.get_rank() * share)
    return start, min(count, start + share)


def _own_part(parameter: Any, part: Tensor) -> Tensor:
    """A share without what it is filled up with."""
    start, stop = _own_range(parameter)
    return part.detach().flatten()[: stop - start]


def _padded(parameter: Any, part: Tensor) -> Tensor:
    return nn.functional.pad(
        part.to(parameter.ds_tensor.device), (0, parameter.ds_tensor.numel() - part.numel())
    )


def _boxes_of(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Bounds]:
    """Bounds of the elements from `start` to `stop` of a tensor in its order in memory, in this order."""
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
                ((first, first + 1), *rest) for rest in _boxes_of(shape[1:], offset, end - first * row)
            )
            start = end
