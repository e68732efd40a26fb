"""The 3D-HybridEngine: the policy in a layout to generate in, to which only the slices travel that a rank
lacks.

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
from transformers import AutoModelForCausalLM, PretrainedConfig

from verl.config.placement import ParallelConfig
from verl.controller.dispatch import DispatchRank
from verl.engines.base import ForwardEngine
from verl.engines.hf.meta_init import empty_transformer, keep_tied_weights
from verl.engines.hf.models import PolicyModel, Precision
from verl.engines.hf.weights import local_shards
from verl.engines.tensor_parallel import TENSOR_PARALLEL, check_sizes, parallelize
from verl.utils.device import PRECISIONS
from verl.weight_sync.layout import ShardLayout, shape_of
from verl.weight_sync.meshes import Mesh, generation_groups
from verl.weight_sync.reshard_exchange import exchange_by_bucket, local_view
from verl.weight_sync.reshard_plan import BUCKET_BYTES, Copy, ReshardPlan, make_plan

# Devices of a machine, beyond which sharing every matrix is slow.
_MOST_TENSOR = 8


@dataclass(frozen=True)
class Switch:
    """What one switch to the generation layout took on this rank.

    Attributes:
        received_bytes: from other ranks.
        weight_bytes: of memory that the generation weights have beside those of training.
        wait_s: seconds that were spent on it and on nothing else.
    """

    received_bytes: int
    weight_bytes: int
    wait_s: float


def has_equal_layout(engine: ForwardEngine, tensor: int) -> bool:
    """Whether the weights that train are those that generate: shared storage, nothing travels."""
    mesh = engine.mesh
    return engine.can_generate and (mesh.tensor, mesh.shards, mesh.pipeline) == (tensor, 1, 1)


def fitting_tensor(config: PretrainedConfig, mesh: Mesh) -> int:
    """The ranks over which every matrix can be split: as many as have different parts of the model, if those
    fit into a machine.

    Shards that reach over several machines would do so in every layer: then as many as in training.
    """
    text = config.get_text_config()
    if config.model_type not in TENSOR_PARALLEL:
        return 1
    if mesh.tensor * mesh.shards > _MOST_TENSOR:
        return mesh.tensor
    sizes = [
        mesh.tensor * mesh.shards,
        text.num_attention_heads,
        text.num_key_value_heads or text.num_attention_heads,
    ]
    sizes += [text.hidden_size, text.intermediate_size, text.vocab_size]
    return math.gcd(*sizes)


class HybridEngine:
    """The policy as a model to generate with, whose weights come from those that train, slice by slice; made
    on all ranks at once.

    Between `sleep` and the next use it has no memory.

    Args:
        engine: of the policy in training.
        tensor: ranks that share every matrix in generation; it divides tensor ranks x shards of training.
        precision: of generation; weights travel in it.
        overlap: generation begins with the first weights, while the others are on their way.
        bucket_bytes: of what travels at once to a rank.

    Attributes:
        model: to generate with, inside `ready`.
        place: which prompts this rank answers.
        plan: the copies of a switch in which this rank takes part.
        switches: those since they were last taken.

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
        # With its number, as tensors say where they are.
        self._dtype, self._device = PRECISIONS[precision], torch.empty(0, device=engine.model.device).device
        self._rank, self._group = dist.get_rank(), dist.new_group()
        # In the order of ranks, as process groups number theirs; it differs from the order of columns where a
        # matrix is split further than by the tensor ranks of training, and then a little more travels.
        replicas = [sorted(ranks) for ranks in generation_groups(engine.mesh, tensor=tensor)]
        replica = next(i for i, ranks in enumerate(replicas) if self._rank in ranks)
        self.dispatch_rank = DispatchRank(replica, replicas[replica][0] == self._rank)
        self.model = self._empty_model(engine, replicas, precision)
        self.plan = self._plan(bucket_bytes)
        self._shared = self._share()
        # What travels comes to these; their memory comes and goes.
        self._homes = {
            name: _local(parameter) for name, parameter in self.model.transformer.named_parameters()
        }
        self._own = {
            name: home.untyped_storage() for name, home in self._homes.items() if name not in self._shared
        }
        self._num_bytes = {name: storage.nbytes() for name, storage in self._own.items()}
        self._buckets = self._last_buckets()
        self.switches: list[Switch] = []
        self._is_awake = self._is_checked = False
        self._version = -1
        self.sleep()

    def _empty_model(
        self, engine: ForwardEngine, replicas: list[list[int]], precision: Precision
    ) -> PolicyModel:
        transformer = empty_transformer(engine.config, AutoModelForCausalLM).requires_grad_(False)
        check_sizes(transformer, ParallelConfig(tensor=len(replicas[0])), packing=True)
        # Made on all ranks, whichever they are in.
        mesh = DeviceMesh(self._device.type, torch.tensor(replicas), mesh_dim_names=("replicas", "tensor"))
        if len(replicas[0]) > 1:
            parallelize(transformer, mesh["tensor"])
        with keep_tied_weights(transformer):
            transformer._apply(
                lambda t: (
                    torch.empty_like(t, device=self._device, dtype=self._dtype)
                    if t.is_meta
                    else t.to(self._device)
                )
            )
        return PolicyModel(transformer, precision)

    def _plan(self, bucket_bytes: int) -> ReshardPlan:
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, (self._engine.local_shards(), local_shards(self.model.transformer)))
        shapes = {
            name: tuple(parameter.shape) for name, parameter in self.model.transformer.named_parameters()
        }
        source, target = (ShardLayout(shapes, tuple(tuple(sides[i]) for sides in everyones)) for i in (0, 1))
        return make_plan(
            source, target, itemsize=self._dtype.itemsize, bucket_bytes=bucket_bytes, rank=self._rank
        )

    @torch.no_grad()
    def _share(self) -> set[str]:
        """Lets the tensors that are whole and alike on both sides have one storage; those that are made for a
        switch are not.
        """
        transformer, sources = self.model.transformer, self._engine.local_tensors()
        lasting = {
            name
            for name, home in self._engine.local_tensors().items()
            if home.data_ptr() == sources[name].data_ptr()
        }
        parameters, shared = dict(transformer.named_parameters()), set()
        held = {(piece.name, piece.bounds): piece.local_name for piece in self._engine.local_shards()}
        for piece in local_shards(transformer):
            name = held.get((piece.name, piece.bounds))
            parameter = parameters[piece.local_name]
            if name not in lasting or (sources[name].dtype, sources[name].device) != (
                self._dtype,
                self._device,
            ):
                continue
            if sources[name].shape == _local(parameter).shape == shape_of(piece.bounds):
                _replace(transformer, parameter, sources[name])
                shared.add(piece.local_name)
        return shared

    @contextmanager
    def ready(self, version: int) -> Iterator[PolicyModel]:
        """The model with the weights that train now, taken at the first use of a version and after `sleep`;
        on all ranks at once.
        """
        if self._version != version:
            self.sleep()
        if self._is_awake:
            yield self.model
            return
        for name, storage in self._own.items():
            storage.resize_(self._num_bytes[name])
        weights = _Arrivals(self._arriving(), self._buckets, self._device)
        if not self._overlap or not self._is_checked:
            weights.wait_for_all()
        if not self._is_checked:
            self.model.check_forward()
            self._is_checked = True
        with weights.waited_for(self.model.transformer):
            yield self.model
            # Also of ranks without prompts: others wait for what they have.
            weights.wait_for_all()
        self._is_awake, self._version = True, version
        self.switches.append(
            Switch(self.plan.received_bytes(self._rank), sum(self._num_bytes.values()), weights.seconds)
        )

    def sleep(self) -> None:
        """Gives the memory of the generation weights back."""
        for storage in self._own.values():
            storage.resize_(0)
        self._is_awake = False

    def take_switches(self) -> dict[str, float]:
        """Bytes and seconds of the switches since this was last asked; none, if there were none."""
        done, self.switches = self.switches, []
        if not done:
            return {}
        return {
            "hybrid/received_bytes": float(sum(switch.received_bytes for switch in done)),
            "hybrid/weight_bytes": float(max(switch.weight_bytes for switch in done)),
            "time/reshard_s": sum(switch.wait_s for switch in done),
        }

    def _last_buckets(self) -> dict[str, int]:
        """With which bucket each tensor is whole on every rank, counted from 1; 0: nothing of it travels.

        Ranks wait for the same buckets before the same layers: else one would wait in a layer for another
        that waits for a bucket of it.
        """
        own: Counter[str] = Counter()
        for number, bucket in enumerate(self.plan.buckets, 1):
            for copy in bucket:
                own[copy.name] = number
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, dict(own))
        return {name: max(buckets.get(name, 0) for buckets in everyones) for name in self._homes}

    def _arriving(self) -> Iterator[None]:
        """Puts every part in its place: first what this rank has, then bucket by bucket."""
        sources = self._engine.local_tensors()

        def read(copy: Copy) -> Tensor:
            return local_view(sources[copy.sender_tensor], copy.bounds, copy.sender_offset)

        self._put((copy, read(copy)) for copy in self.plan.local if copy.receiver_tensor not in self._shared)
        yield
        options: dict[str, Any] = {"dtype": self._dtype, "device": self._device, "overlap": self._overlap}
        for bucket in exchange_by_bucket(self.plan, self._rank, self._group, read=read, **options):
            self._put(bucket)
            yield

    def _put(self, parts: Iterable[tuple[Copy, Tensor]]) -> None:
        for copy, values in parts:
            place = local_view(self._homes[copy.receiver_tensor], copy.bounds, copy.receiver_offset)
            place.copy_(values.reshape(place.shape))


class _Arrivals:
    """Weights on their way: who needs some waits for the buckets that bring them.

    Args:
        arriving: goes on after each bucket, and before the first.
        buckets: number of the last bucket of each tensor.
        device: where they come to.
    """

    def __init__(self, arriving: Iterator[None], buckets: Mapping[str, int], device: torch.device) -> None:
        self.seconds, self._device = 0.0, device
        self._arriving, self._buckets = arriving, buckets
        self._done, self._last = -1, max(buckets.values())

    def wait_for_all(self) -> None:
        """Until all are there, and nothing that this rank has to send is left."""
        self._advance(None)

    @contextmanager
    def waited_for(self, transformer: nn.Module) -> Iterator[None]:
        """Inside, each module waits for its own weights before it runs."""
        names = {id(parameter): name for name, parameter in transformer.named_parameters()}
        handles = []
        for module in transformer.modules():
            own = [names[id(parameter)] for parameter in module.parameters(recurse=False)]
            if own:
                handles.append(module.register_forward_pre_hook(partial(self._before, own), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, names: Sequence[str], module: nn.Module, args: Any) -> None:
        bucket = max(self._buckets[name] for name in names)
        # After the last one to the end, which lets the memory of the transfers go.
        self._advance(bucket if bucket < self._last else None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _advance(self, bucket: int | None) -> None:
        start_s = time.perf_counter()
        # Additions are merged in the precision of the weights, also within a forward pass in another.
        with torch.autocast(self._device.type, enabled=False):
            while bucket is None or self._done < bucket:
                try:
                    next(self._arriving)
                except StopIteration:
                    break
                self._done += 1
        self.seconds += time.perf_counter() - start_s


@torch.no_grad()
def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _replace(transformer: nn.Module, parameter: Tensor, local: Tensor) -> None:
    """Lets a parameter have the storage of another tensor, wherever it is used."""
    if isinstance(parameter, DTensor):
        local = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
    shared = nn.Parameter(local, requires_grad=False)
    for module in transformer.modules():
        for name, own in list(module.named_parameters(recurse=False)):
            if own is parameter:
                module.register_parameter(name, shared)
