"""Versions of the policy's weights for inference engines: written once, kept until the next version."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from verl.controller.worker_group import WorkerGroup
from verl.engines.roles.weight_sender import PolicyWeightSender
from verl.rollout.pool.p2p import P2PSender
from verl.utils.files import write_safetensors
from verl.weight_sync.fingerprint import digest, fingerprint, fingerprint_of_ranks
from verl.weight_sync.layout import Bounds
from verl.weight_sync.shard_tracking import ShardRanges, shard_key
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of, shards_in, unpack
from verl.weight_sync.types import TensorInfo, WeightChunk

# Memory that every process of this machine can map; where it is missing, a folder on disk does the same,
# slower.
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX, _LOCK = "verl-weights-", "lock"
# Longest time between the creation of a folder and its lock.
_LOCK_DELAY_S = 60.0
# Parts of tensors, by the name of the tensor.
TrackedShards = dict[str, set[Bounds]]
# Several engines may ask for the files of one snapshot at the same time.
_WRITING_FILES = threading.Lock()


@dataclass(frozen=True)
class WeightSnapshot:
    """One version of the policy's weights, ready to be loaded by engines.

    Attributes:
        version: of the policy.
        chunks: all weights; empty for a LoRA adapter.
        lora_adapter: folder of the adapter in PEFT format, if only LoRA adapters are trained; else None.
        fingerprint: of an engine that loaded everything; "" with P2P, where it is known after the transfer.
        num_bytes: of the tensors.
        write_s: seconds that it took to write.
        disk_folder: for engines that can only read files.
        digests: of each tensor, and of tracked shards, by `shard_key`.
        tracked_shards: shards whose digests the next versions will have.
        p2p_sender: sends the chunks, if they are not in memory.
    """

    version: int
    chunks: tuple[WeightChunk, ...]
    lora_adapter: Path | None
    fingerprint: str
    num_bytes: int
    write_s: float
    disk_folder: Path
    digests: Mapping[str, int] = field(default_factory=dict)
    tracked_shards: TrackedShards = field(default_factory=dict)
    p2p_sender: P2PSender | None = None

    def can_verify(self, ranges: Sequence[ShardRanges]) -> bool:
        """True if the fingerprint of an engine whose ranks load only these ranges is known, or will be."""
        return self.p2p_sender is not None or all(
            key in self.digests for own in ranges for key in self._keys(own)
        )

    def track(self, ranges: Sequence[ShardRanges]) -> None:
        """Let the next versions have the digests of these ranges."""
        for own in ranges:
            for name, bounds in own.items():
                self.tracked_shards.setdefault(name, set()).update(bounds)

    def fingerprint_of(self, ranges: Sequence[ShardRanges]) -> str:
        """Fingerprint of an engine whose ranks loaded only these ranges."""
        return fingerprint_of_ranks([{key: self.digests[key] for key in self._keys(own)} for own in ranges])

    def num_bytes_of(self, ranges: Sequence[ShardRanges]) -> int:
        """Bytes of these ranges over all ranks."""
        return sum(
            num_bytes_of([shard for shard, _ in shards_in(chunk.tensors, own)])
            for chunk in self.chunks
            for own in ranges
        )

    def _keys(self, ranges: ShardRanges) -> list[str]:
        infos = (info for chunk in self.chunks for info in chunk.tensors)
        return [
            shard_key(info.name, bounds, shape=info.shape) for info in infos for bounds in ranges[info.name]
        ]

    def as_files(self, model: Path) -> WeightChunk:
        """The same weights as a Hugging Face folder, written at the first call.

        Args:
            model: folder with the configuration and tokenizer to copy.
        """
        with _WRITING_FILES:
            folder = self.disk_folder / f"version-{self.version}-{self.fingerprint}"
            if not folder.exists():
                shutil.rmtree(self.disk_folder, ignore_errors=True)
                partial = self.disk_folder / "partial"
                shutil.copytree(model, partial, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
                tensors = {info.name: tensor for chunk in self.chunks for info, tensor in tensors_of(chunk)}
                write_safetensors(tensors, partial / "model.safetensors")
                partial.rename(folder)
        infos = tuple(info for chunk in self.chunks for info in chunk.tensors)
        return WeightChunk(infos, "disk", {"folder": str(folder)})


class SharedMemoryFolder:
    """An empty folder in shared memory that only this user can read, locked by this process.

    Creating one removes the folders of processes that have ended.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        base = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        for folder in base.glob(f"{_PREFIX}*"):
            if is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Free the memory, and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def is_abandoned(folder: Path) -> bool:
    """True if a folder is this user's and its process has ended, in any container: nobody locks it."""
    with suppress(OSError):
        status = folder.stat()
        if status.st_uid != os.getuid() or time.time() - status.st_ctime < _LOCK_DELAY_S:
            return False
        with (folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@dataclass
class WeightPublisher:
    """Writes versions of the policy for engines on this machine and on others.

    Args:
        policy: its ranks, each a `PolicyWeightSender`.
        dtype: that the engines serve in, as PyTorch names it.
        disk_folder: for engines that can only read files.
        chunk_bytes: largest size of a chunk; a larger tensor is a chunk of its own.
        uses_p2p: the policy's ranks send to those of the engines, and nothing is written.
        uses_cuda_ipc: write into memory of the policy's GPU, which engines on this machine map.
    """

    policy: WorkerGroup
    dtype: str
    disk_folder: Path
    chunk_bytes: int = 2**30
    uses_p2p: bool = False
    uses_cuda_ipc: bool = False
    _tracked_shards: TrackedShards = field(default_factory=dict, init=False)
    _sender: P2PSender | None = field(default=None, init=False)
    _folder: SharedMemoryFolder | None = field(default=None, init=False)

    def write(self, version: int) -> WeightSnapshot:
        """Write the policy as it is now; the memory of the version before is freed."""
        start_s = time.perf_counter()
        if self._folder is not None:
            self._folder.remove()
        self._folder = SharedMemoryFolder()
        if self.policy.call(PolicyWeightSender.trains_lora_only).result():
            return self._write_lora_adapter(version, start_s)
        shapes = self.policy.call(PolicyWeightSender.weight_shapes).result()
        infos = [TensorInfo(name, shape, self.dtype) for name, shape in shapes]
        if self.uses_cuda_ipc:
            self.policy.call(PolicyWeightSender.free_shared_weights).result()
        if self.uses_p2p and self._sender is None:
            self._sender = P2PSender(self.policy)
        digests: dict[str, int] = {}
        chunks = tuple(self._write_chunk(own, digests) for own in chunked(infos, self.chunk_bytes))
        return WeightSnapshot(
            version,
            chunks,
            lora_adapter=None,
            fingerprint="" if self.uses_p2p else fingerprint({name: digests[name] for name, _ in shapes}),
            num_bytes=num_bytes_of(infos),
            write_s=time.perf_counter() - start_s,
            disk_folder=self._disk_folder,
            digests=digests,
            tracked_shards=self._tracked_shards,
            p2p_sender=self._sender,
        )

    def close(self) -> None:
        """Free the memory and remove the files."""
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
        shutil.rmtree(self._disk_folder, ignore_errors=True)

    def _write_chunk(self, infos: list[TensorInfo], digests: dict[str, int]) -> WeightChunk:
        """Write tensors into a file or GPU memory, unless they are sent later; their digests are added."""
        if self.uses_p2p:
            return WeightChunk(tuple(infos), "direct")
        shards = {info.name: tuple(self._tracked_shards.get(info.name, ())) for info in infos}
        if self.uses_cuda_ipc:
            written, handle = self.policy.call(PolicyWeightSender.share_weights, infos, shards).result()
            digests |= written
            return WeightChunk(tuple(infos), "ipc", handle)
        assert self._folder is not None
        path = self._folder.path / f"part-{len(list(self._folder.path.glob('part-*')))}"
        make_file(path, num_bytes_of(infos))
        written, content = self.policy.call(
            PolicyWeightSender.write_weights, infos, str(path), shards
        ).result()
        if content is not None:  # the policy's ranks are on another machine
            map_file(path, len(content), for_writing=True).copy_(content)
        digests |= written
        return WeightChunk(tuple(infos), "shm", {"path": str(path)})

    def _write_lora_adapter(self, version: int, start_s: float) -> WeightSnapshot:
        assert self._folder is not None
        folder = self._folder.path / f"lora-adapter-{version}"
        for name, content in self.policy.call(PolicyWeightSender.lora_adapter).result().items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        weights = folder / "adapter_model.safetensors"
        with safe_open(weights, framework="pt") as file:
            digests = {name: digest(file.get_tensor(name)) for name in list(file.keys())}
        return WeightSnapshot(
            version,
            (),
            lora_adapter=folder,
            fingerprint=fingerprint(digests),
            num_bytes=weights.stat().st_size,
            write_s=time.perf_counter() - start_s,
            disk_folder=self._disk_folder,
        )

    @property
    def _disk_folder(self) -> Path:
        # Of this process: two runs started in one folder must not share it, even before one of them is
        # refused.
        return self.disk_folder / str(os.getpid())


def tensors_of(chunk: WeightChunk) -> list[tuple[TensorInfo, Tensor]]:
    """Tensors of a chunk in shared memory, in place."""
    return unpack(map_file(Path(chunk.location["path"]), num_bytes_of(chunk.tensors)), chunk.tensors)


def chunked(infos: Sequence[TensorInfo], chunk_bytes: int) -> list[list[TensorInfo]]:
    """Consecutive tensors in chunks of at most `chunk_bytes`; a larger tensor is a chunk of its own."""
    chunks: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        size = num_bytes_of([info])
        if not chunks or size > room:
            chunks.append([])
            room = chunk_bytes
        chunks[-1].append(info)
        room -= size
    return chunks
