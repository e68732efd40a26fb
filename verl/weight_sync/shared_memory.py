"""Tensors as bytes end to end, in a file of shared memory that several processes map."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from verl.weight_sync.layout import Bounds, shape_of
from verl.weight_sync.shard_tracking import ShardRanges
from verl.weight_sync.types import TensorInfo, WeightChunk


def dtype_of(info: TensorInfo) -> torch.dtype:
    """PyTorch dtype of a tensor."""
    dtype = vars(torch)[info.dtype]
    assert isinstance(dtype, torch.dtype)
    return dtype


def num_bytes_of(infos: Sequence[TensorInfo]) -> int:
    """Total bytes of some tensors."""
    return sum(torch.Size(info.shape).numel() * dtype_of(info).itemsize for info in infos)


def make_file(path: Path, num_bytes: int) -> None:
    """Make a sparse file of a given size, readable by this user alone.

    Raises:
        RuntimeError: the file system has not enough space.
    """
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise RuntimeError(
            f"need {num_bytes} bytes in {path.parent} for the weights that engines load, but {free} are "
            "free; enlarge it (containers: --shm-size), or serve in 16 bits"
        )
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.truncate(num_bytes)


def map_file(path: Path, num_bytes: int, *, for_writing: bool = False) -> Tensor:
    """Map a file into memory as [num_bytes] uint8.

    Raises:
        RuntimeError: the file is smaller.
    """
    if path.stat().st_size < num_bytes:
        raise RuntimeError(f"need {num_bytes} bytes of weights in {path}, got {path.stat().st_size}")
    return torch.from_file(str(path), shared=for_writing, size=num_bytes, dtype=torch.uint8)


def read_safetensors(folder: Path, *, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each entry in the safetensors files of a folder.

    Raises:
        RuntimeError: the folder has no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"need weights as *.safetensors in {folder}, found none")
    for path in files:
        with safe_open(path, framework="pt", device=device) as file:
            for name in list(file.keys()):
                yield name, file.get_tensor(name)


def shards_in(infos: Sequence[TensorInfo], ranges: ShardRanges) -> list[tuple[TensorInfo, Bounds]]:
    """Shards that a rank reads of these tensors, in their order: each as a tensor of its own, with bounds."""
    return [
        (TensorInfo(info.name, shape_of(bounds), info.dtype), bounds)
        for info in infos
        for bounds in ranges[info.name]
    ]


def chunk_ranges(ranges: Sequence[ShardRanges], chunk: WeightChunk) -> tuple[ShardRanges, ...]:
    """Ranges of each rank, reduced to the tensors of a chunk."""
    return tuple({info.name: own[info.name] for info in chunk.tensors} for own in ranges)


def unpack(content: Tensor, infos: Sequence[TensorInfo]) -> list[tuple[TensorInfo, Tensor]]:
    """Tensors whose bytes are end to end in `content` (uint8): views of it where aligned, else copies."""
    tensors, start = [], 0
    for info in infos:
        stop = start + num_bytes_of([info])
        own = content[start:stop]
        # A view as another dtype needs an aligned start.
        aligned = own if own.data_ptr() % dtype_of(info).itemsize == 0 else own.clone()
        tensors.append((info, aligned.view(dtype_of(info)).view(info.shape)))
        start = stop
    return tensors
