"""The 3D-HybridEngine: the policy in a generation layout; each rank receives only the shards that it lacks.

HybridFlow, https://arxiv.org/abs/2409.19256, section 5.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from verl.config.placement import ParallelConfig
from verl.controller.dispatch import DispatchRank
from verl.engines.base import ForwardEngine
from verl.engines.hf.meta_init import empty_transformer, keep_tied_weights
from verl.engines.hf.models import PolicyModel, Precision
from verl.engines.hf.weights import local_shards
from verl.engines.tensor_parallel import TENSOR_PARALLEL, check_parallel_sizes, parallelize
from verl.utils.device import PRECISIONS
from verl.weight_sync.layout import ShardLayout, shape_of
from verl.weight_sync.meshes import Mesh, generation_groups
from verl.weight_sync.reshard_exchange import exchange_by_bucket, local_view
from verl.weight_sync.reshard_plan import BUCKET_BYTES, Copy, ReshardPlan, make_plan

# Devices of a node: tensor parallelism across nodes is slow.
_MAX_TENSOR = 8


@dataclass(frozen=True)
class ReshardStats:
    """Cost of one switch to the generation layout on this rank.

    Attributes:
        received_bytes: from other ranks.
        weight_bytes: of memory that the generation weights need beside those of training.
        wait_s: seconds in which this rank did nothing else.
    """

    received_bytes: int
    weight_bytes: int
    wait_s: float


def has_equal_layout(engine: ForwardEngine, tensor: int) -> bool:
    """True if training and generation can share their storage, so that no weights need to be sent."""
    mesh = engine.mesh
    return engine.can_generate and (mesh.tensor, mesh.shards, mesh.pipeline) == (tensor, 1, 1)


def default_tensor_size(config: PretrainedConfig, mesh: Mesh) -> int:
    """Tensor-parallel size for generation: as many ranks as shard the weights and divide every matrix.

    If these ranks do not fit into a node, each layer would communicate across nodes: then the size of
    training.
    """
    text = config.get_text_config()
    if config.model_type not in TENSOR_PARALLEL:
        return 1
    if mesh.tensor * mesh.shards > _MAX_TENSOR:
        return mesh.tensor
    num_heads = text.num_attention_heads
    divisible = (num_heads, text.num_key_value_heads or num_heads, text.hidden_size, text.intermediate_size)
    return math.gcd(mesh.tensor * mesh.shards, *divisible, text.vocab_size)


class HybridEngine:
    """The policy as a model to generate with, whose weights come shard by shard from those in training.

    Made on all ranks at once. Between `sleep` and the next use it holds no memory.

    Args:
        engine: of the policy in training.
        tensor: tensor-parallel size in generation; it divides tensor size x shards of training.
        precision: of generation; weights are sent in it.
        overlap: generation begins with the first weights, while the others are being sent.
        bucket_bytes: sent to a rank at a time.

    Attributes:
        model: to generate with, inside `loaded`.
        dispatch_rank: which prompts this rank answers.
        plan: the copies of a switch in which this rank takes part.
        switches: costs of the switches since the last `take_metrics`.

    Raises:
        ValueError: sizes that do not fit the model or the ranks.
    """

    def __init__(
        self,
        engine: ForwardEngine,
        *,
        tensor: int,
        precision: Precision,
        overlap: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._engine, self._overlap = engine, overlap
        # The device with its index, which `engine.model.device` may lack but tensors have.
        self._dtype, self._device = PRECISIONS[precision], torch.empty(0, device=engine.model.device).device
        self._rank, self._group = dist.get_rank(), dist.new_group()
        # Sorted by rank, as process groups number their ranks. This differs from the order of the columns if
        # a matrix is split further than by the tensor ranks of training; then a little more is sent.
        replicas = [sorted(ranks) for ranks in generation_groups(engine.mesh, tensor=tensor)]
        replica = next(i for i, ranks in enumerate(replicas) if self._rank in ranks)
        self.dispatch_rank = DispatchRank(replica, replicas[replica][0] == self._rank)
        self.model = PolicyModel(
            empty_replica(engine.config, replicas, dtype=self._dtype, device=self._device), precision
        )
        self.plan = self._make_plan(bucket_bytes)
        shared = self._share_storage()
        self._local_tensors = {name: _local(p) for name, p in self.model.transformer.named_parameters()}
        # Storages whose memory comes with `loaded` and goes with `sleep`.
        self._own_storages = {
            name: local.untyped_storage() for name, local in self._local_tensors.items() if name not in shared
        }
        self._num_bytes = {name: storage.nbytes() for name, storage in self._own_storages.items()}
        self._last_buckets = self._find_last_buckets()
        self.switches: list[ReshardStats] = []
        self._is_awake = self._is_checked = False
        self._version = -1
        self.sleep()

    @contextmanager
    def loaded(self, version: int) -> Iterator[PolicyModel]:
        """The model with the weights in training; on all ranks at once.

        Weights are sent at the first use of a version, and at the first use after `sleep`.
        """
        if self._version != version:
            self.sleep()
        if self._is_awake:
            yield self.model
            return
        for name, storage in self._own_storages.items():
            storage.resize_(self._num_bytes[name])
        weights = IncomingWeights(self._receive(), self._last_buckets, self._device)
        if not self._overlap or not self._is_checked:
            weights.wait_for_all()
        if not self._is_checked:
            self.model.check_forward()
            self._is_checked = True
        with weights.awaited_by_layers(self.model.transformer):
            yield self.model
            # Ranks without prompts, too: others wait for the shards that they send.
            weights.wait_for_all()
        self._is_awake, self._version = True, version
        self.switches.append(
            ReshardStats(self.plan.received_bytes(self._rank), sum(self._num_bytes.values()), weights.wait_s)
        )

    def sleep(self) -> None:
        """Free the memory of the generation weights."""
        for storage in self._own_storages.values():
            storage.resize_(0)
        self._is_awake = False

    def take_metrics(self) -> dict[str, float]:
        """Bytes and seconds of the switches since the last call; empty if there were none."""
        switches, self.switches = self.switches, []
        if not switches:
            return {}
        return {
            "hybrid/received_bytes": float(sum(switch.received_bytes for switch in switches)),
            "hybrid/weight_bytes": float(max(switch.weight_bytes for switch in switches)),
            "time/reshard_s": sum(switch.wait_s for switch in switches),
        }

    def _make_plan(self, bucket_bytes: int) -> ReshardPlan:
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, (self._engine.local_shards(), local_shards(self.model.transformer)))
        shapes = {name: tuple(p.shape) for name, p in self.model.transformer.named_parameters()}
        source, target = (ShardLayout(shapes, tuple(tuple(sides[i]) for sides in by_rank)) for i in (0, 1))
        return make_plan(
            source, target, itemsize=self._dtype.itemsize, bucket_bytes=bucket_bytes, rank=self._rank
        )

    @torch.no_grad()
    def _share_storage(self) -> set[str]:
        """Let tensors that are equal in both layouts share one storage; return their local names."""
        transformer, sources = self.model.transformer, self._engine.local_tensors()
        # A tensor that is created at each call, as with merged LoRA adapters, cannot be shared.
        permanent = {
            name
            for name, local in self._engine.local_tensors().items()
            if local.data_ptr() == sources[name].data_ptr()
        }
        held = {(shard.name, shard.bounds): shard.local_name for shard in self._engine.local_shards()}
        parameters, shared = dict(transformer.named_parameters()), set()
        for shard in local_shards(transformer):
            name, parameter = held.get((shard.name, shard.bounds)), parameters[shard.local_name]
            if name not in permanent:
                continue
            source = sources[name]
            is_same_kind = (source.dtype, source.device) == (self._dtype, self._device)
            if is_same_kind and source.shape == _local(parameter).shape == shape_of(shard.bounds):
                replace_parameter(transformer, parameter, source)
                shared.add(shard.local_name)
        return shared

    def _find_last_buckets(self) -> dict[str, int]:
        """Bucket, from 1, after which each tensor is complete on every rank; 0: nothing of it is sent.

        All ranks must wait for the same buckets before the same layers: otherwise one rank would wait in a
        layer for another rank, which waits for a bucket of the first one.
        """
        own: Counter[str] = Counter()
        for number, bucket in enumerate(self.plan.buckets, 1):
            for copy in bucket:
                own[copy.name] = number
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, dict(own))
        return {name: max(buckets.get(name, 0) for buckets in by_rank) for name in self._local_tensors}

    def _receive(self) -> Iterator[None]:
        """Copy all shards into place: first those of this rank, then bucket by bucket; yields after each."""
        sources = self._engine.local_tensors()

        def read(copy: Copy) -> Tensor:
            return local_view(sources[copy.sender_tensor], copy.bounds, copy.sender_offset)

        self._put(
            (copy, read(copy)) for copy in self.plan.local if copy.receiver_tensor in self._own_storages
        )
        yield
        options: dict[str, Any] = {"dtype": self._dtype, "device": self._device, "overlap": self._overlap}
        for bucket in exchange_by_bucket(self.plan, self._rank, self._group, read=read, **options):
            self._put(bucket)
            yield

    def _put(self, shards: Iterable[tuple[Copy, Tensor]]) -> None:
        for copy, values in shards:
            place = local_view(self._local_tensors[copy.receiver_tensor], copy.bounds, copy.receiver_offset)
            place.copy_(values.reshape(place.shape))


class IncomingWeights:
    """Weights that are being received: each layer waits for the buckets that complete its own weights.

    Args:
        receiving: continues after each bucket, and once before the first.
        last_buckets: number of the bucket that completes each tensor.
        device: that receives.

    Attributes:
        wait_s: seconds spent waiting.
    """

    def __init__(
        self, receiving: Iterator[None], last_buckets: Mapping[str, int], device: torch.device
    ) -> None:
        self.wait_s, self._device = 0.0, device
        self._receiving, self._last_buckets = receiving, last_buckets
        self._num_done, self._last = -1, max(last_buckets.values())

    def wait_for_all(self) -> None:
        """Wait until all weights are received, and this rank has sent all that it has to send."""
        self._advance(None)

    @contextmanager
    def awaited_by_layers(self, transformer: nn.Module) -> Iterator[None]:
        """Inside, each module waits for its own weights before it runs."""
        names = {id(parameter): name for name, parameter in transformer.named_parameters()}
        handles = []
        for module in transformer.modules():
            own = [names[id(parameter)] for parameter in module.parameters(recurse=False)]
            if own:
                hook = partial(self._wait_before, own)
                handles.append(module.register_forward_pre_hook(hook, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _wait_before(self, names: Sequence[str], module: nn.Module, args: Any) -> None:
        bucket = max(self._last_buckets[name] for name in names)
        # After the last bucket to the end of the iterator, which frees the buffers of the transfers.
        self._advance(bucket if bucket < self._last else None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _advance(self, bucket: int | None) -> None:
        """Wait for the buckets up to one; None: for all."""
        start_s = time.perf_counter()
        # LoRA adapters are merged in the precision of the weights, even inside a forward pass with autocast.
        with torch.autocast(self._device.type, enabled=False):
            while bucket is None or self._num_done < bucket:
                try:
                    next(self._receiving)
                except StopIteration:
                    break
                self._num_done += 1
        self.wait_s += time.perf_counter() - start_s


def empty_replica(
    config: PretrainedConfig, replicas: list[list[int]], *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Model of a Hugging Face configuration in the generation layout, uninitialized; on all ranks at once.

    Args:
        config: of the model.
        replicas: ranks of each tensor-parallel replica.
        dtype: of the weights.
        device: of the weights.
    """
    transformer = empty_transformer(config, AutoModelForCausalLM).requires_grad_(False)
    check_parallel_sizes(transformer, ParallelConfig(tensor=len(replicas[0])), packing=True)
    # A mesh is made by all ranks together, also by those of other replicas.
    mesh = DeviceMesh(device.type, torch.tensor(replicas), mesh_dim_names=("replicas", "tensor"))
    if len(replicas[0]) > 1:
        parallelize(transformer, mesh["tensor"])
    with keep_tied_weights(transformer):
        transformer._apply(
            lambda t: torch.empty_like(t, device=device, dtype=dtype) if t.is_meta else t.to(device)
        )
    return transformer


def replace_parameter(transformer: nn.Module, parameter: Tensor, local: Tensor) -> None:
    """Let a parameter use the storage of another local tensor, in all modules that have it."""
    if isinstance(parameter, DTensor):
        local = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
    shared = nn.Parameter(local, requires_grad=False)
    for module in transformer.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if own is parameter:
                module.register_parameter(name, shared)


@torch.no_grad()
def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
