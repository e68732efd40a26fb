"""What verl adds to the processes of vLLM that hold the model: they take weights in parts, and say which ones they have.

The only module that those processes import: vLLM finds it by `--worker-extension-cls`, and importing it makes our way to take weights
known there under the name `BACKEND`.
"""

from __future__ import annotations

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
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from verl.rollout.engine import TensorInfo
from verl.rollout.fingerprint import digest
from verl.rollout.links import broadcast, open_group, shared_memory
from verl.rollout.parts import map_file, num_bytes_of, tensors_in, unpacked
from verl.rollout.vllm_guard import OWNED_VARIABLE

BACKEND = "verl"
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """A process group to join; see `verl.rollout.engine.ServedEngine.join_group`."""

    address: str
    port: int
    first_rank: int
    num_ranks: int
    backend: str
    timeout_s: float


@dataclass
class PartInfo(WeightTransferUpdateInfo):
    """A `verl.rollout.engine.Part`; tensors as (name, shape, dtype)."""

    via: str
    tensors: list[tuple[str, list[int], str]] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)


class PartsEngine(WeightTransferEngine[GroupInfo, PartInfo]):
    """Takes weights in parts, in whatever way they travel, and notes a digest of each tensor that it hands to the model."""

    init_info_cls = GroupInfo
    update_info_cls = PartInfo
    supports_draft_weight_update = False

    # The signature of the constructor differs between versions of vLLM.
    _group: Any = None
    _digests: dict[str, int] = {}

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Joins a process group."""
        parallel = self.parallel_config
        own = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = open_group(
            init_info.address,
            init_info.port,
            rank=init_info.first_rank + own,
            num_ranks=init_info.num_ranks,
            backend=init_info.backend,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Gets ready to take all weights; what an update before left half done is undone."""
        self._put_back(self.model.modules())
        finalize_layerwise_reload(self.model, self.model_config)
        initialize_layerwise_reload(self.model)
        self._digests = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Takes one part, and has it in its own memory when it returns."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: PartInfo) -> None:
        """Takes one part."""
        infos = [TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in update_info.tensors]
        if update_info.via == "disk":
            tensors = tensors_in(Path(update_info.where["folder"]), device=str(self.device))
        else:
            content = self._content(update_info.via, update_info.where, num_bytes_of(infos))
            tensors = ((info.name, tensor) for info, tensor in unpacked(content, infos))
        # The model keeps the tensors of a layer until it has all of them.
        self.model.load_weights(self._noted(tensors))

    def finish_weight_update(self) -> None:
        """Lets the model run with what it took; a layer that got a part of its weights keeps the old ones."""
        self._put_back(layer for layer, _ in self._open_layers())
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leaves the group."""
        self._group = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Some versions of vLLM want every engine to have it, for senders that are vLLM's own; ours is not."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """Of the update that is going on: digest of each tensor that the model was handed, and parameters of layers that lack some."""
        return {"digests": self._digests, "missing": [name for _, names in self._open_layers() for name in names]}

    def _content(self, via: str, where: dict[str, Any], num_bytes: int) -> Tensor:
        """[num_bytes] uint8 in memory of our own: what was sent may be overwritten as soon as we have answered."""
        if via == "shm":
            return map_file(Path(where["path"]), num_bytes).to(self.device, copy=True)
        assert via == "group", via
        if self._group is None:
            raise RuntimeError("weights were sent over a process group that this engine has not joined")
        content = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        broadcast(self._group, content)
        return content

    def _noted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors, each with its digest noted; a tied head beside its embedding.

        Where a backend packs the head into memory of its own (that for CPUs does), it keeps the old one unless it gets it, too.
        """
        tied = self._has_tied_head()
        for name, tensor in tensors:
            self._digests[name] = digest(tensor)
            yield name, tensor
            if tied and name.endswith(_EMBEDDING) and _HEAD not in self._digests:
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
        """Lets layers forget what they were handed in an update that is going on, so that they end with what they had before."""
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
        return {"version": vllm.__version__, "shared_memory": shared_memory()}

    def verl_report(self) -> dict[str, Any]:
        """See `PartsEngine.report`."""
        report: dict[str, Any] = self.weight_transfer_engine.report()
        return report

    def verl_digests_of(self, path: str) -> dict[str, int]:
        """Digest of each tensor of a file, as this process reads it."""
        with safe_open(path, framework="pt") as file:
            return {name: digest(file.get_tensor(name)) for name in _names(file)}


def _names(file: Any) -> list[str]:
    return list(file.keys())


def _end_with(leader: int) -> None:
    """Ends this server when the process is gone that was started first: vLLM's others would stay behind if it is killed."""
    status = Path(f"/proc/{leader}/stat")
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX":
        time.sleep(1.0)
    os.killpg(leader, signal.SIGKILL)


if os.environ.get(OWNED_VARIABLE) and Path("/proc").exists():
    # A run starts each server as the leader of a process group.
    threading.Thread(target=_end_with, args=(os.getpgrp(),), daemon=True).start()
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, PartsEngine)
