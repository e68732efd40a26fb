"""What verl adds to the processes of vLLM that hold the model: they take weights in parts, and say which ones
they have.

The only module that those processes import: vLLM finds it by `--worker-extension-cls`, and importing it makes
our way to take weights known there under the name `BACKEND`.
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
_logger = logging.getLogger(__name__)
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """A process group to join; see `verl.rollout.engine.InferenceServer.join_group`."""

    address: str
    port: int
    first_rank: int
    num_ranks: int
    backend: str
    timeout_s: float


@dataclass
class PartInfo(WeightTransferUpdateInfo):
    """A `verl.rollout.engine.WeightChunk`; tensors as (name, shape, dtype). If it `records`, what the model reads of
    whole tensors is noted.
    """

    via: Transport
    tensors: list[tuple[str, list[int], str]] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    reads: list[dict[str, Any]] = field(default_factory=list)
    records: bool = False


class ChunkEngine(WeightTransferEngine[GroupInfo, PartInfo]):
    """Takes weights in parts, in whatever way they travel, and notes a digest of each tensor that it hands to
    the model.
    """

    init_info_cls = GroupInfo
    update_info_cls = PartInfo
    supports_draft_weight_update = False

    # The signature of the constructor differs between versions of vLLM.
    _came: WeightReceiver | None = None
    _errors: list[str] = []

    @property
    def _arrivals(self) -> WeightReceiver:
        # A layer keeps what it is handed until it has all of its weights.
        self._came = self._came or WeightReceiver(self.device, copies_tensors=True)
        return self._came

    @property
    def _rank(self) -> int:
        """Among those that take weights."""
        parallel = self.parallel_config
        rank: int = parallel.data_parallel_index * parallel.world_size + parallel.rank
        return rank

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Joins a process group."""
        self._arrivals.join_group(
            init_info.address,
            init_info.port,
            rank=init_info.first_rank + self._rank,
            num_ranks=init_info.num_ranks,
            backend=init_info.backend,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Gets ready to take all weights; what an update before left half done is undone."""
        self._put_back(self.model.modules())
        finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)
        self._arrivals.reset()
        self._errors = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes one part, and has it in its own memory when it returns."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:
            if self.parallel_config.world_size == 1:
                raise
            # An error of one rank leaves the answers of the others in their queues, where vLLM takes them for
            # those to the next calls.
            _logger.exception("weights were not taken")
            self._errors.append(f"{type(error).__name__}: {error}")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: PartInfo) -> None:
        """Takes one part."""
        infos = tuple(TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in update_info.tensors)
        reads = tuple(parse_ranges(own) for own in update_info.reads)
        part = WeightChunk(infos, update_info.via, update_info.where, reads).of_rank(self._rank)
        for batch in self._arrivals.batches(part, records=update_info.records):
            self.model.load_weights(self._with_head(batch))

    def finish_weight_update(self) -> None:
        """Lets the model run with what it took; a layer that got a part of its weights keeps the old ones."""
        self._put_back(layer for layer, _ in self._open_layers())
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leaves the group."""
        self._arrivals.leave_group()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Some versions of vLLM want every engine to have it, for senders that are vLLM's own; ours is not."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """Of the update that is going on: digest of each tensor that the model was handed, what it read of
        those that were to be recorded, and parameters of layers that lack some."""
        came = self._arrivals
        missing = [name for _, names in self._open_layers() for name in names]
        return {
            "digests": came.digests,
            "reads": dict(came.read_ranges),
            "num_bytes": came.num_bytes,
            "missing": missing,
            "errors": self._errors,
        }

    def _with_head(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors, a tied head beside its embedding.

        Where a backend packs the head into memory of its own (that for CPUs does), it keeps the old one
        unless it gets it, too.
        """
        tied = self._has_tied_head()
        for name, tensor in tensors:
            yield name, tensor
            if (
                tied
                and name.endswith(_EMBEDDING)
                and not any(key.split("@")[0] == _HEAD for key in self._arrivals.digests)
            ):
                yield _HEAD, tensor

    def _has_tied_head(self) -> bool:
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied = bool(vars(self.model_config.hf_text_config).get("tie_word_embeddings"))
        return tied and any(name in (_HEAD, f"language_model.{_HEAD}") for name in names)

    def _open_layers(self) -> list[tuple[nn.Module, list[str]]]:
        """Layers of an update that did not get all of their weights, each with the names of its parameters.

        Embeddings are padded, and some other layers may be: of those only the ones that got nothing.
        """
        found = []
        for prefix, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            own = [f"{prefix}.{name}" for name, _ in layer.named_parameters(recurse=False)]
            if not own or not info.can_load():
                continue
            is_partial = isinstance(layer, LinearBase) and info.load_numel < (info.load_numel_total or 0)
            if info.load_numel == 0 or is_partial:
                found.append((layer, own))
        return found

    def _put_back(self, layers: Iterable[nn.Module]) -> None:
        """Lets layers forget what they were handed in an update that is going on, so that they end with what
        they had before.
        """
        for layer in layers:
            info = get_layerwise_info(layer)
            info.load_numel = 0
            info.loaded_weights.clear()


class WorkerExtension:
    """Methods that vLLM adds to its workers, called on all ranks by `collective_rpc`."""

    # Of the worker that this becomes a part of.
    weight_transfer_engine: Any
    device: torch.device

    def verl_place(self) -> dict[str, Any]:
        """What tells how weights can travel here."""
        return {"version": vllm.__version__, "shared_memory": shared_memory_id()}

    def verl_report(self) -> dict[str, Any]:
        """See `ChunkEngine.report`."""
        report: dict[str, Any] = self.weight_transfer_engine.report()
        return report

    def verl_digests_of(self, path: str) -> dict[str, int]:
        """Digest of each tensor of a file, as this process reads it."""
        with safe_open(path, framework="pt") as file:
            return {name: digest(file.get_tensor(name)) for name in _names(file)}


def _names(file: Any) -> list[str]:
    return list(file.keys())


def _end_with(leader: int) -> None:
    """Ends this server when the process is gone that was started first: vLLM's others would stay behind if it
    is killed.
    """
    status = Path(f"/proc/{leader}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(1.0)
    os.killpg(leader, signal.SIGKILL)


if os.environ.get(OWNED_VARIABLE) and Path("/proc").exists():
    # A run starts each server as the leader of a process group.
    threading.Thread(target=_end_with, args=(os.getpgrp(),), daemon=True).start()
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ChunkEngine)
