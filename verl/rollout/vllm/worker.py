"""Extension of vLLM's worker processes: they load weights in chunks, and report digests of what they loaded.

vLLM imports this module by `--worker-extension-cls`, and nothing else of verl. The import registers the
weight transfer engine under the name `BACKEND`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm
from safetensors import safe_open
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from verl.rollout.vllm.auth import OWNED_VARIABLE
from verl.weight_sync.fingerprint import digest
from verl.weight_sync.process_group import shared_memory_id
from verl.weight_sync.receiver import WeightReceiver
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import TensorInfo, Transport, WeightChunk

BACKEND = "verl"
_LOG = logging.getLogger(__name__)
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """Process group to join, see `verl.rollout.inference_server.InferenceServer.join_group`."""

    address: str
    port: int
    first_rank: int
    num_ranks: int
    backend: str
    timeout_s: float


@dataclass
class ChunkInfo(WeightTransferUpdateInfo):
    """Fields of a `verl.weight_sync.types.WeightChunk`, as JSON has them.

    Attributes:
        transport: of the bytes.
        tensors: (name, shape, dtype) of each.
        location: of the bytes.
        ranges: for each rank, the bounds that it receives of each tensor.
        records_reads: record what the model reads of whole tensors.
    """

    transport: Transport
    tensors: list[tuple[str, list[int], str]] = field(default_factory=list)
    location: dict[str, Any] = field(default_factory=dict)
    ranges: list[dict[str, Any]] = field(default_factory=list)
    records_reads: bool = False


class ChunkTransferEngine(WeightTransferEngine[GroupInfo, ChunkInfo]):
    """Loads chunks of weights by any transport, and keeps a digest of each tensor given to the model."""

    init_info_cls = GroupInfo
    update_info_cls = ChunkInfo
    supports_draft_weight_update = False

    # Class attributes, since the signature of the constructor differs between versions of vLLM.
    _created_receiver: WeightReceiver | None = None
    _errors: list[str] = []

    @property
    def _receiver(self) -> WeightReceiver:
        # Tensors are copied, since a layer keeps them until it has all of its weights.
        if self._created_receiver is None:
            self._created_receiver = WeightReceiver(self.device, copies_tensors=True)
        return self._created_receiver

    @property
    def _rank(self) -> int:
        """Rank among all processes of the server that take weights."""
        parallel = self.parallel_config
        rank: int = parallel.data_parallel_index * parallel.world_size + parallel.rank
        return rank

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Join a process group."""
        self._receiver.join_group(
            init_info.address,
            init_info.port,
            rank=init_info.first_rank + self._rank,
            num_ranks=init_info.num_ranks,
            backend=init_info.backend,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Begin an update of all weights; an unfinished earlier one is undone."""
        discard_loaded(self.model.modules())
        finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)
        self._receiver.reset()
        self._errors = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk; its bytes are in this rank's own memory on return."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            if self.parallel_config.world_size == 1:
                raise
            # Reported at the end of the update: if one rank raised here, the results of the others would stay
            # in their queues, where vLLM takes them for the results of the next calls.
            _LOG.exception("a chunk of weights could not be loaded")
            self._errors.append(f"{type(error).__name__}: {error}")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: ChunkInfo) -> None:
        """Receive one chunk and load it into the model."""
        infos = tuple(TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in update_info.tensors)
        ranges = tuple(parse_ranges(own) for own in update_info.ranges)
        chunk = WeightChunk(infos, update_info.transport, update_info.location, ranges).of_rank(self._rank)
        for batch in self._receiver.batches(chunk, records=update_info.records_reads):
            self.model.load_weights(self._with_tied_head(batch))

    def finish_weight_update(self) -> None:
        """Use the new weights; a layer that got only a part of its weights keeps the old ones."""
        discard_loaded(layer for layer, _ in self._incomplete_layers())
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the process group."""
        self._receiver.leave_group()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Not used: some versions of vLLM require it for their own senders."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """Report on the current update.

        Returns:
            digests: of each tensor given to the model, by `shard_key`.
            read_ranges: bounds that the model read of tensors that were recorded.
            num_bytes: received.
            missing: parameters that lack weights.
            errors: of chunks that could not be loaded.
        """
        receiver = self._receiver
        return {
            "digests": receiver.digests,
            "read_ranges": dict(receiver.read_ranges),
            "num_bytes": receiver.num_bytes,
            "missing": [name for _, names in self._incomplete_layers() for name in names],
            "errors": self._errors,
        }

    def _with_tied_head(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Add a tied head after its embedding.

        A backend that packs the head into memory of its own, as that for CPUs does, would keep the old one.
        """
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        has_head = any(name in (_HEAD, f"language_model.{_HEAD}") for name in names)
        is_tied = has_head and bool(vars(self.model_config.hf_text_config).get("tie_word_embeddings"))
        for name, tensor in tensors:
            yield name, tensor
            if is_tied and name.endswith(_EMBEDDING):
                # A key of the digests is a name, or NAME@BOUNDS for a shard.
                sent = {key.split("@")[0] for key in self._receiver.digests}
                if _HEAD not in sent:
                    yield _HEAD, tensor

    def _incomplete_layers(self) -> list[tuple[nn.Module, list[str]]]:
        """Layers that lack weights of the current update, with the names of their parameters.

        Only a linear layer is known to lack some when it got fewer elements than it has, since embeddings and
        maybe other layers are padded. Others count as incomplete if they got nothing.
        """
        incomplete = []
        for prefix, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            names = [f"{prefix}.{name}" for name, _ in layer.named_parameters(recurse=False)]
            if not names or not info.can_load():
                continue
            is_partial = isinstance(layer, LinearBase) and info.load_numel < (info.load_numel_total or 0)
            if info.load_numel == 0 or is_partial:
                incomplete.append((layer, names))
        return incomplete


def discard_loaded(layers: Iterable[nn.Module]) -> None:
    """Discard what layers were given in the current update, so that its end leaves their old weights."""
    for layer in layers:
        info = get_layerwise_info(layer)
        info.load_numel = 0
        info.loaded_weights.clear()


class WorkerExtension:
    """Methods that vLLM adds to its workers, called on all ranks by `collective_rpc`."""

    # Attributes of vLLM's worker.
    weight_transfer_engine: Any
    device: torch.device

    def verl_describe(self) -> dict[str, Any]:
        """Version of vLLM, and the id of the shared memory that this process sees."""
        return {"version": vllm.__version__, "shared_memory": shared_memory_id()}

    def verl_update_report(self) -> dict[str, Any]:
        """Report of the weight transfer engine on the current update."""
        report: dict[str, Any] = self.weight_transfer_engine.report()
        return report

    def verl_digest_file(self, path: str) -> dict[str, int]:
        """Digest of each tensor of a safetensors file, as this process reads it."""
        with safe_open(path, framework="pt") as file:
            return {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def end_with_leader(leader: int) -> None:
    """Wait for the end of the process that was started first, then kill its process group.

    vLLM's other processes would stay if that process were killed.
    """
    status = Path(f"/proc/{leader}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(1.0)
    os.killpg(leader, signal.SIGKILL)


if os.environ.get(OWNED_VARIABLE) and Path("/proc").exists():
    # A run starts each server as the leader of a process group.
    threading.Thread(target=end_with_leader, args=(os.getpgrp(),), daemon=True).start()
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ChunkTransferEngine)
