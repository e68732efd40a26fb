"""Checkpoints on disk: written aside, renamed when complete, the newest complete one wins, and one run writes them at a time."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from verl.engines.base import TrainEngine

_STATE = "state.pt"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointStore:
    """The checkpoints of one run.

    A checkpoint is a folder `step-00000010` with one folder per engine (`policy`, `critic`: the weights as a Hugging Face
    model, the optimizer beside them) and `state.pt` (everything else: plain tensors, numbers and texts). The rename from
    its temporary name is what completes it.

    Args:
        root: folder of the checkpoints.
        keep: how many of the newest ones stay.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep

    def save(self, step: int, engines: Mapping[str, TrainEngine], state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint and removes the oldest ones beyond `keep`; later steps are of a run that this one replaces, and go too.

        Raises:
            RuntimeError: it cannot be written, as on a full disk; those before it stay.
        """
        final = self._root / f"step-{step:08d}"
        aside = self._root / f".writing-{final.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            _write(aside, engines, state)
        except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors have their own for a full disk
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(self._root).free / 2**20
            raise RuntimeError(
                f"cannot write {final}, {free:.0f} MiB of its disk are free now: {error}; make room and start again, "
                "the checkpoints before it are whole"
            ) from error
        replaced = self._root / f".replaced-{final.name}"
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        _flush(self._root)
        complete = self._complete()
        kept = [folder for folder in complete if folder.name <= final.name][-self._keep :]
        for folder in complete:
            if folder not in kept:
                shutil.rmtree(folder)
        return final

    def newest(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        complete = self._complete()
        return complete[-1] if complete else None

    def _complete(self) -> list[Path]:
        folders = self._root.glob("step-*") if self._root.exists() else []
        return sorted(f for f in folders if _NAME.fullmatch(f.name) and (f / _STATE).exists())


def load_state(folder: Path) -> dict[str, Any]:
    """What `CheckpointStore.save` was given as `state`.

    Raises:
        ValueError: the folder is not a complete checkpoint.
    """
    if not (folder / _STATE).exists():
        raise ValueError(f"{folder} is not a checkpoint: it has no {_STATE}; give a folder named step-... of an output_dir")
    return torch.load(folder / _STATE, map_location="cpu", weights_only=True)


def _write(folder: Path, engines: Mapping[str, TrainEngine], state: Mapping[str, Any]) -> None:
    """All files of a checkpoint, on the disk when this returns."""
    folder.mkdir(parents=True)
    for name, engine in engines.items():
        (folder / name).mkdir()
        engine.save(folder / name)
    torch.save(dict(state), folder / _STATE)
    for path in folder.rglob("*"):
        _flush(path)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Inside the block no other process writes a run into the folder, which is made if absent; the system frees it at a process's death.

    Raises:
        RuntimeError: one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RuntimeError(
                f"need {folder} for one run at a time, but process {lock.read() or 'unknown'} writes its run there; "
                "wait for it, end it, or take another output_dir"
            ) from error
        except OSError:
            pass  # A file system without locks.
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _flush(path: Path) -> None:
    """Makes sure that a file or folder is on the disk before the rename says so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
