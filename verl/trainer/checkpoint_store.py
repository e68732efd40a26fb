"""Checkpoints of a run on disk.

A checkpoint is written under a temporary name, and renamed when it is complete.
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
# Starts to write into a folder; the function that it returns waits until everything is written.
Save = Callable[[Path], Callable[[], None]]
_NAME = re.compile(r"step-(\d{8})")


class CheckpointStore:
    """The checkpoints of one run.

    A checkpoint is a folder `step-00000010` with one folder per model (`policy`, `critic`: weights and
    optimizer, see `verl.engines.dcp_checkpoint`) and `state.pt` (everything else: plain tensors, numbers and
    texts). The rename from its temporary name completes it.

    Args:
        root: folder of the checkpoints.
        keep: number of newest checkpoints kept.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep
        self._writing: Future[Path] | None = None

    def begin(self, step: int, saves: Mapping[str, Save], state: Mapping[str, Any]) -> None:
        """Start to write a checkpoint, once the one before is complete; training may continue at once.

        When the checkpoint is complete, the oldest ones beyond `keep` are removed. Checkpoints of later steps
        belong to an earlier run that this one replaces; they are removed too.

        Args:
            step: number of the step.
            saves: folder of each model -> function that starts to write the model.
            state: everything else.

        Raises:
            RuntimeError: this checkpoint, or the one before, cannot be written, for example because the disk
                is full; complete ones are kept.
        """
        self.finish()
        final = self._root / f"step-{step:08d}"
        partial = self._root / f".writing-{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        with self._removed_on_error(final, partial):
            partial.mkdir(parents=True)
            waits = []
            for name, save in saves.items():
                (partial / name).mkdir()
                waits.append(save(partial / name))
            torch.save(dict(state), partial / _STATE)
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = thread.submit(self._complete, waits, partial, final)
        thread.shutdown(wait=False)

    def poll(self) -> Path | None:
        """The checkpoint that was completed since the last call, if there is one.

        Raises:
            RuntimeError: the checkpoint could not be written, see `begin`.
        """
        return self.finish() if self._writing and self._writing.done() else None

    def finish(self) -> Path | None:
        """As `poll`, but wait for the checkpoint that is being written."""
        writing, self._writing = self._writing, None
        return writing.result() if writing else None

    def newest(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        return next(reversed(self.complete_ones()), None)

    def complete_ones(self) -> list[Path]:
        """Folders of the complete checkpoints, the oldest first."""
        folders = self._root.glob("step-*") if self._root.exists() else []
        return sorted(f for f in folders if _NAME.fullmatch(f.name) and (f / _STATE).exists())

    def _complete(self, waits: Sequence[Callable[[], None]], partial: Path, final: Path) -> Path:
        """Wait until everything is written, rename the checkpoint, and remove old ones."""
        with self._removed_on_error(final, partial):
            for wait in waits:
                wait()
            for path in partial.rglob("*"):
                flush_to_disk(path)
        replaced = self._root / f".replaced-{final.name}"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        flush_to_disk(self._root)
        complete = self.complete_ones()
        kept = [folder for folder in complete if folder.name <= final.name][-self._keep :]
        for folder in complete:
            if folder not in kept:
                shutil.rmtree(folder)
        return final

    @contextmanager
    def _removed_on_error(self, final: Path, partial: Path) -> Iterator[None]:
        """Remove the half-written checkpoint after an error, and name the disk if it is the cause."""
        try:
            yield
        except WorkerError:  # the ranks that write are gone; the disk is not the cause
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except (OSError, RuntimeError) as error:  # PyTorch raises its own RuntimeError for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            root = self._root.absolute()
            on_disk = next(folder for folder in (root, *root.parents) if folder.exists())
            free = shutil.disk_usage(on_disk).free / 2**20
            raise RuntimeError(
                f"cannot write {final}, {free:.0f} MiB of its disk are free now: {error}; "
                "make room and start again, the checkpoints before it are whole"
            ) from error


def is_checkpoint(folder: Path) -> bool:
    """True for the folder of a complete checkpoint."""
    return (folder / _STATE).exists()


def load_state(folder: Path) -> dict[str, Any]:
    """The `state` that `CheckpointStore.begin` wrote.

    Raises:
        ValueError: the folder is not a complete checkpoint.
    """
    if not is_checkpoint(folder):
        raise ValueError(
            f"{folder} is not a checkpoint: it has no {_STATE}; give the output_dir of a run, or one of its "
            "folders checkpoints/step-..."
        )
    return torch.load(folder / _STATE, map_location="cpu", weights_only=True)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock a folder, which is created if absent, against runs of other processes inside the block.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        RuntimeError: another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RuntimeError(
                f"need {folder} for one run at a time, but process {lock.read() or 'unknown'} writes its run "
                "there; wait for it, end it, or take another output_dir"
            ) from error
        except OSError:
            pass  # a file system without locks
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk; a rename that follows never precedes its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
