"""The policy's weights on their way to engines: written once per version into shared memory, kept there until
the next version.
"""

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
from typing import IO

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from verl.controller.worker_group import WorkerGroup
from verl.rollout.actor_worker import ActorWorker
from verl.rollout.pool.p2p import P2PSender
from verl.weight_sync.fingerprint import digest, fingerprint, fingerprint_of_ranks
from verl.weight_sync.layout import Bounds
from verl.weight_sync.shard_tracking import ShardRanges, shard_key
from verl.weight_sync.shared_memory import make_file, map_file, num_bytes_of, shards_in, unpack
from verl.weight_sync.types import TensorInfo, WeightChunk

# Memory that every process of this machine can map; elsewhere a folder on disk does the same, more slowly.
_SHARED = Path("/dev/shm")
_PREFIX, _LOCK = "verl-weights-", "lock"
# Between the making of a folder and its lock.
_YOUNG_S = 60.0
# Parts of tensors, by name.
Slices = dict[str, set[Bounds]]
# Several engines may ask for files at once.
_WRITING = threading.Lock()


@dataclass(frozen=True)
class WeightSnapshot:
    """A version of the policy, ready to be taken by engines.

    Attributes:
        version: of the policy.
        parts: all weights; none: low-rank additions alone.
        additions: folder of the additions in PEFT format, if only they are trained.
        expected: the fingerprint that an engine has which took all of it; of an update that is sent directly
            it is known afterwards.
        num_bytes: of the tensors.
        seconds: that it took to write.
        disk: folder for engines that only read files.
        digests: of each tensor, and of parts of them, by `shard_key`.
        slices: parts whose digests the next updates shall have, too.
        direct: sends the parts, if they are not in shared memory.
    """

    version: int
    parts: tuple[WeightChunk, ...]
    additions: Path | None
    expected: str
    num_bytes: int
    seconds: float
    disk: Path
    digests: Mapping[str, int] = field(default_factory=dict)
    slices: Slices = field(default_factory=dict)
    direct: P2PSender | None = None

    def has(self, reads: Sequence[ShardRanges]) -> bool:
        """Whether it is known, or will be, which digests an engine has whose ranks take this alone."""
        return self.direct is not None or all(key in self.digests for own in reads for key in self._keys(own))

    def note(self, reads: Sequence[ShardRanges]) -> None:
        """From the next update on, the digests of this are known."""
        for own in reads:
            for name, bounds in own.items():
                self.slices.setdefault(name, set()).update(bounds)

    def expected_of(self, reads: Sequence[ShardRanges]) -> str:
        """The fingerprint that an engine has whose ranks took this alone."""
        return fingerprint_of_ranks([{key: self.digests[key] for key in self._keys(own)} for own in reads])

    def bytes_of(self, reads: Sequence[ShardRanges]) -> int:
        """Bytes that ranks get which take this alone."""
        return sum(
            num_bytes_of([piece for piece, _ in shards_in(part.tensors, own)])
            for part in self.parts
            for own in reads
        )

    def _keys(self, reads: ShardRanges) -> list[str]:
        infos = (info for part in self.parts for info in part.tensors)
        return [
            shard_key(info.name, bounds, shape=info.shape) for info in infos for bounds in reads[info.name]
        ]

    def as_files(self, model: Path) -> WeightChunk:
        """The same weights as a Hugging Face folder, with the configuration and tokenizer of the model;
        written when first asked for.
        """
        with _WRITING:
            folder = self.disk / f"version-{self.version}-{self.expected}"
            if not folder.exists():
                shutil.rmtree(self.disk, ignore_errors=True)
                partial = self.disk / "partial"
                shutil.copytree(model, partial, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
                save_file(
                    {info.name: tensor for part in self.parts for info, tensor in tensors_of(part)},
                    partial / "model.safetensors",
                )
                partial.rename(folder)
        return WeightChunk(
            tuple(info for part in self.parts for info in part.tensors), "disk", {"folder": str(folder)}
        )


@dataclass
class WeightPublisher:
    """Writes versions of the policy for engines of this machine, and of others.

    Args:
        policy: its ranks.
        dtype: that the engines serve in, as PyTorch names it.
        disk: folder for engines that only read files.
        part_bytes: most bytes of a part; a larger tensor is a part of its own.
        is_direct: the ranks of the policy send them to those of the engines, and nothing is written.
        on_device: they are written into memory of the policy's GPU, which engines on this machine see, too.
    """

    policy: WorkerGroup
    dtype: str
    disk: Path
    part_bytes: int = 2**30
    is_direct: bool = False
    on_device: bool = False
    _slices: Slices = field(default_factory=dict, init=False)
    _sender: P2PSender | None = field(default=None, init=False)
    _folder: Path | None = field(default=None, init=False)
    _lock: IO[str] | None = field(default=None, init=False)

    def write(self, version: int) -> WeightSnapshot:
        """The policy as it is now; what was written before is gone."""
        start_s = time.perf_counter()
        folder = self._fresh_folder()
        if self.policy.call(ActorWorker.trains_lora_only).result():
            return self._additions(version, folder, start_s)
        tensors = self.policy.call(ActorWorker.weight_shapes).result()
        infos = _in_parts([TensorInfo(name, shape, self.dtype) for name, shape in tensors], self.part_bytes)
        digests: dict[str, int] = {}
        if self.on_device:
            self.policy.call(ActorWorker.drop_shared).result()
        parts = (
            [WeightChunk(tuple(own), "direct") for own in infos]
            if self.is_direct
            else [self._written(own, folder, digests) for own in infos]
        )
        if self.is_direct and self._sender is None:
            self._sender = P2PSender(self.policy)
        num_bytes = sum(num_bytes_of(part.tensors) for part in parts)
        expected = "" if self.is_direct else fingerprint({name: digests[name] for name, _ in tensors})
        seconds = time.perf_counter() - start_s
        return WeightSnapshot(
            version,
            tuple(parts),
            None,
            expected,
            num_bytes,
            seconds,
            self._disk,
            digests,
            self._slices,
            self._sender,
        )

    def _written(self, infos: list[TensorInfo], folder: Path, digests: dict[str, int]) -> WeightChunk:
        """Tensors in a file of the folder, or on the GPU, with their digests added to those that are known."""
        slices = {info.name: tuple(self._slices.get(info.name, ())) for info in infos}
        if self.on_device:
            written, handle = self.policy.call(ActorWorker.share_weights, infos, slices).result()
            digests |= written
            return WeightChunk(tuple(infos), "ipc", handle)
        path = folder / f"part-{len(list(folder.glob('part-*')))}"
        make_file(path, num_bytes_of(infos))
        written, content = self.policy.call(ActorWorker.write_weights, infos, str(path), slices).result()
        if content is not None:  # the ranks are on another machine
            map_file(path, len(content), for_writing=True).copy_(content)
        digests |= written
        return WeightChunk(tuple(infos), "shm", {"path": str(path)})

    def close(self) -> None:
        """Gives the memory and the files back."""
        self._forget()
        shutil.rmtree(self._disk, ignore_errors=True)

    @property
    def _disk(self) -> Path:
        # Two runs that are started in one folder do not meet, even before one of them is refused.
        return self.disk / str(os.getpid())

    def _forget(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _additions(self, version: int, folder: Path, start_s: float) -> WeightSnapshot:
        target = folder / f"additions-{version}"
        for name, content in self.policy.call(ActorWorker.additions).result().items():
            target.mkdir(exist_ok=True)
            (target / name).write_bytes(content)
        weights = target / "adapter_model.safetensors"
        with safe_open(weights, framework="pt") as file:
            digests = {name: digest(file.get_tensor(name)) for name in list(file.keys())}
        return WeightSnapshot(
            version,
            (),
            target,
            fingerprint(digests),
            weights.stat().st_size,
            time.perf_counter() - start_s,
            self._disk,
        )

    def _fresh_folder(self) -> Path:
        """An empty folder that only this user can read; those of processes that are gone are removed."""
        self._forget()
        base = _SHARED if os.access(_SHARED, os.W_OK) else Path(tempfile.gettempdir())
        for left in base.glob(f"{_PREFIX}*"):
            if _is_left_behind(left):
                shutil.rmtree(left, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = (self._folder / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self._folder


def tensors_of(part: WeightChunk) -> list[tuple[TensorInfo, Tensor]]:
    """The tensors of a part in shared memory, in place."""
    return unpack(map_file(Path(part.location["path"]), num_bytes_of(part.tensors)), part.tensors)


def _in_parts(infos: Sequence[TensorInfo], part_bytes: int) -> list[list[TensorInfo]]:
    parts: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        size = num_bytes_of([info])
        if not parts or size > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(info)
        room -= size
    return parts


def _is_left_behind(folder: Path) -> bool:
    """Whether a folder is this user's and of a process that has ended, in whichever container: such a one
    holds no lock.
    """
    with suppress(OSError):
        about = folder.stat()
        if about.st_uid != os.getuid() or time.time() - about.st_ctime < _YOUNG_S:
            return False
        with (folder / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False
