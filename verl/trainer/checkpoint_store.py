"""Checkpoints of a run on disk.

A checkpoint is written under a temporary name, and renamed when it is complete.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
        keep: number of newest checkpoints kept, and the newest one that has proven good, see `confirm`.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self._root = root
        self._keep = keep
        self._good_step = -1
        self._own: set[str] = set()  # names of the checkpoints of this run, not of an earlier one
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
        self._own.add(final.name)
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
        for later in [folder for folder in self.complete_ones() if folder.name > final.name]:
            shutil.rmtree(later)
        # The newest one has not proven good yet.
        good = self.newest_good()
        self.prune([good] if good else [])
        return final

    def resume(self, folder: Path) -> None:
        """Note that the run goes on from this checkpoint."""
        if folder.resolve().parent == self._root.resolve():
            self._own = {path.name for path in self.complete_ones() if path.name <= folder.name}

    def confirm(self, step: int) -> None:
        """Note that the weights after this step have proven good, since the next step learned from them."""
        self._good_step = step
        newest = self.newest()
        if self._writing is None and newest is not None and newest == self.newest_good():
            self.prune()

    def newest_good(self) -> Path | None:
        """The newest complete checkpoint of this run whose weights have proven good, if there is one."""
        limit = f"step-{self._good_step:08d}" if self._good_step >= 0 else ""
        own = [path for path in self.complete_ones() if path.name in self._own and path.name <= limit]
        return own[-1] if own else None

    def prune(self, kept: Collection[Path] = ()) -> None:
        """Remove all checkpoints but the newest ones, and those to keep besides."""
        for folder in self.complete_ones()[: -self._keep]:
            if folder not in kept:
                shutil.rmtree(folder)

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


def check_room(folder: Path, *, checkpoint_bytes: int, model_bytes: int, keep: int) -> str | None:
    """Check the free room of a disk for checkpoints and the model of a run.

    Args:
        folder: of the run.
        checkpoint_bytes: of one checkpoint.
        model_bytes: of the model at the end.
        keep: checkpoints kept; one more is on the disk while it is written.

    Returns:
        A note with both numbers if the room may not do, else None.

    Raises:
        ValueError: there is no room for a single checkpoint.
    """
    root = folder.absolute()
    on_disk = next(parent for parent in (root, *root.parents) if parent.exists())
    free = shutil.disk_usage(on_disk).free
    present = CheckpointStore(folder / "checkpoints", keep=keep).complete_ones()
    needed = max(1, keep + 1 - len(present)) * checkpoint_bytes + model_bytes
    facts = (
        f"{needed / 2**20:,.1f} MiB for {keep} checkpoints, one that is being written, and the model, got "
        f"{free / 2**20:,.1f} MiB free at {root}"
    )
    if free < checkpoint_bytes:
        raise ValueError(
            f"need {facts}, which is less than one checkpoint; make room, or take another output_dir"
        )
    return None if needed <= free else f"the disk may become full: need {facts}"


def is_checkpoint(folder: Path) -> bool:
    """True for the folder of a complete checkpoint."""
    return (folder / _STATE).exists()


def load_state(folder: Path) -> dict[str, Any]:
    """The `state` that `CheckpointStore.begin` wrote.

    Raises:
        ValueError: the folder is not a complete checkpoint, or its file is damaged.
    """
    if not is_checkpoint(folder):
        raise ValueError(
            f"{folder} is not a checkpoint: it has no {_STATE}; give the output_dir of a run, or one of its "
            "folders checkpoints/step-..."
        )
    try:
        return torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch has many for a damaged file, with the advice to trust it
        raise ValueError(
            f"cannot read {folder / _STATE}, which is damaged ({type(error).__name__}); remove {folder} to "
            "go on from the checkpoint before it, or start anew with checkpoint.resume=never"
        ) from error


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock a folder, which is created if absent, against runs of other processes inside the block.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        ValueError: the folder cannot be written.
        RuntimeError: another process has the lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("a+")
    except OSError as error:
        raise ValueError(
            f"need output_dir as a folder that can be written, got {folder}: {error.strerror}; name another"
        ) from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RuntimeError(
                f"need {folder} for one run at a time, but process {lock.read() or 'unknown'} writes its run "
                "there; wait for it, end it, or take another folder"
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
