"""Checkpoints on disk: written aside, renamed when complete, the newest complete one wins, and one run writes
them at a time.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from verl.controller.worker_group import WorkerError

_STATE = "state.pt"
# Begins to write into a folder, and returns what waits until it is written.
Save = Callable[[Path], Callable[[], None]]
_NAME = re.compile(r"step-(\d{8})")


class CheckpointStore:
    """The checkpoints of one run.

    A checkpoint is a folder `step-00000010` with one folder per model (`policy`, `critic`: weights and
    optimizer, see `verl.engines.dcp_checkpoint`) and `state.pt` (everything else: plain tensors, numbers and
    texts). The rename from its temporary name is what completes it.

    Args:
        root: folder of the checkpoints.
        keep: how many of the newest ones stay.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep
        self._writing: Future[Path] | None = None

    def begin(self, step: int, saves: Mapping[str, Save], state: Mapping[str, Any]) -> None:
        """Begins to write a checkpoint, after the one before is complete; training may go on at once.

        When it is complete, the oldest ones beyond `keep` are removed; later steps are of a run that this one
        replaces, and go too.

        Args:
            step: its number.
            saves: for the folder of each model, what begins to write it.
            state: everything else.

        Raises:
            RuntimeError: it, or the one before, cannot be written, as on a full disk; those before stay.
        """
        self.finish()
        final = self._root / f"step-{step:08d}"
        aside = self._root / f".writing-{final.name}"
        shutil.rmtree(aside, ignore_errors=True)
        with self._told(final, aside):
            aside.mkdir(parents=True)
            waits = []
            for name, save in saves.items():
                (aside / name).mkdir()
                waits.append(save(aside / name))
            torch.save(dict(state), aside / _STATE)
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = thread.submit(self._complete_one, waits, aside, final)
        thread.shutdown(wait=False)

    def poll(self) -> Path | None:
        """The checkpoint that has become complete since the last call, if one has.

        Raises:
            RuntimeError: it could not be written, see `begin`.
        """
        return self.finish() if self._writing and self._writing.done() else None

    def finish(self) -> Path | None:
        """As `poll`, but waits for the one that is being written."""
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def _complete_one(self, waits: Sequence[Callable[[], None]], aside: Path, final: Path) -> Path:
        with self._told(final, aside):
            for wait in waits:
                wait()
            for path in aside.rglob("*"):
                _flush(path)
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

    @contextmanager
    def _told(self, final: Path, aside: Path) -> Iterator[None]:
        """Says what is wrong with the disk, and leaves nothing half-written."""
        try:
            yield
        except WorkerError:  # the ranks that write are gone, which has nothing to do with the disk
            shutil.rmtree(aside, ignore_errors=True)
            raise
        except (OSError, RuntimeError) as error:  # PyTorch has its own for a full disk
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(_existing(self._root)).free / 2**20
            raise RuntimeError(
                f"cannot write {final}, {free:.0f} MiB of its disk are free now: {error}; make room and start again, "
                "the checkpoints before it are whole"
            ) from error

    def newest(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        complete = self._complete()
        return complete[-1] if complete else None

    def _complete(self) -> list[Path]:
        folders = self._root.glob("step-*") if self._root.exists() else []
        return sorted(f for f in folders if _NAME.fullmatch(f.name) and (f / _STATE).exists())


def load_state(folder: Path) -> dict[str, Any]:
    """What `CheckpointStore.begin` was given as `state`.

    Raises:
        ValueError: the folder is not a complete checkpoint.
    """
    if not (folder / _STATE).exists():
        raise ValueError(
            f"{folder} is not a checkpoint: it has no {_STATE}; give a folder named step-... of an output_dir"
        )
    return torch.load(folder / _STATE, map_location="cpu", weights_only=True)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Inside the block no other process writes a run into the folder, which is made if absent; the system
    frees it at a process's death.

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


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() else _existing(folder.absolute().parent)
