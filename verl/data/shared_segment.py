"""A file in shared memory that several processes map: the lock on it, and the mark that somebody uses it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SHARED_MEMORY = "/dev/shm"
HEADER_BYTES = 4096
_PREFIX = "verl-buffer-"
# In the header, the rest of which is the caller's: pid of the process that has the lock, else 0; number of
# processes that died with it; one byte, 1 once the creator has closed the segment.
_HOLDER, _NUM_RECOVERED, _CLOSED = 64, 72, 81
_COUNT = struct.Struct("=Q")
_RESERVE_BYTES = 1 << 20


class TimeLimit:
    """Limit of one call: sleeps 0.1 ms, then longer up to 5 ms, instead of spinning."""

    def __init__(self, limit_s: float) -> None:
        if not limit_s >= 0:
            raise ValueError(f"need timeout_s >= 0, got {limit_s}")
        self.limit_s = limit_s
        self._start_s = time.monotonic()
        self._since = time.strftime("%H:%M:%S")
        self._delay_s = 1e-4

    @property
    def left_s(self) -> float:
        """Seconds until the limit; 0 beyond it."""
        return max(0.0, self._start_s + self.limit_s - time.monotonic())

    def pause(self, wanted: str) -> None:
        """Sleeps a little; raises TimeoutError at the limit."""
        if self.left_s == 0:
            raise TimeoutError(f"waited {self.limit_s:g} s, since {self._since}, for {wanted}")
        time.sleep(min(self._delay_s, self.left_s))
        self._delay_s = min(self._delay_s * 1.5, 5e-3)


class SharedSegment:
    """A mapped file: a header page and any number of bytes behind it.

    The file lies in a directory of its own. Every process that uses it holds a shared lock on that directory
    until it dies, so a directory that nobody holds is left over and may be removed. Unlike a pid in its name,
    this also works between containers that share /dev/shm. The exclusive lock is on the file itself. The
    kernel frees both at the death of a process.

    Args:
        name: the directory.
        used_fd: of the directory, already marked as used, in the process that creates it.

    Attributes:
        view: the mapped bytes.
    """

    def __init__(self, name: str, used_fd: int | None = None) -> None:
        self.name = name
        self._mutex = threading.Lock()
        self._is_closed = False
        self._creator_pid = None if used_fd is None else os.getpid()
        self._lock_fd: int | None = None
        # Not through the lock's descriptor: mmap keeps a copy, and forked children would hold the lock by it.
        with open(f"{name}/ring", "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._used_fd = _mark_used(name) if used_fd is None else used_fd
        self.view = memoryview(self._map)
        _segments.add(self)

    @classmethod
    def create(cls, header: bytes, num_bytes: int) -> SharedSegment:
        """A new segment, readable by this user alone; first removes those that nobody uses any more."""
        parent = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else tempfile.gettempdir()
        _remove_unused(parent)
        while True:
            name = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            with suppress(FileNotFoundError):  # Another creator may have removed it before it was marked.
                used_fd = _mark_used(name)
                break
        try:
            with open(os.open(f"{name}/ring", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(header)
                file.truncate(HEADER_BYTES + num_bytes)
            return cls(name, used_fd)
        except BaseException:
            _remove(name)
            os.close(used_fd)
            raise

    @property
    def num_recovered(self) -> int:
        """Processes that died while they had the lock."""
        return self._count_at(_NUM_RECOVERED)

    @contextmanager
    def locked(self, limit: TimeLimit) -> Iterator[None]:
        """Alone among all threads and processes.

        Raises:
            TimeoutError: another process or thread kept the lock until the limit.
            RuntimeError: the segment is closed.
        """
        mutex, is_held = self._mutex, False
        while not mutex.acquire(timeout=min(limit.left_s, threading.TIMEOUT_MAX)):
            limit.pause(f"other threads of this process to leave {self.name}")
        try:
            while not is_held:
                if self._is_closed or self.view[_CLOSED]:
                    raise RuntimeError(
                        f"need an open buffer, but {self.name} was closed here or by its creator"
                    )
                # Another process has it, or the creator has just closed it, which the next round sees.
                with suppress(BlockingIOError, FileNotFoundError):
                    fcntl.flock(self._open_lock(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_held = True
                if not is_held:
                    holder = self._count_at(_HOLDER)
                    limit.pause(f"process {holder} to leave {self.name}; it may be stopped")
            if self._count_at(_HOLDER):
                _COUNT.pack_into(self.view, _NUM_RECOVERED, self.num_recovered + 1)
            _COUNT.pack_into(self.view, _HOLDER, os.getpid())
            yield
        finally:
            if is_held:
                _COUNT.pack_into(self.view, _HOLDER, 0)
                fcntl.flock(self._open_lock(), fcntl.LOCK_UN)
            mutex.release()

    def reserve(self, start: int, end: int, limit: int) -> int:
        """Takes memory for the bytes from `start`, which have some up to there, to at least `end`.

        It takes whole MiB, as they are needed. A full /dev/shm is an error here; it would be a SIGBUS, which
        ends the process, at the first write.

        Returns:
            Position up to which there is memory, at most `limit`.

        Raises:
            OSError: shared memory is full.
        """
        if end <= start or sys.platform == "darwin":  # There it is a file on disk.
            return start
        size = min(end + -end % _RESERVE_BYTES, limit) - start
        try:
            os.posix_fallocate(self._open_lock(), HEADER_BYTES + start, size)
        except OSError as error:
            cause = f"need {size} more bytes of shared memory, got: {error.strerror}"
            raise OSError(error.errno, f"{cause}; free some, or lower buffer_bytes") from error
        return start + size

    def close(self) -> None:
        """Unmaps it; in its creator also removes it, and tells the processes that are attached."""
        self._is_closed = True
        with self._mutex:
            if self._creator_pid == os.getpid():
                self.view[_CLOSED] = 1
                _remove(self.name)
            self.view.release()
            self._map.close()
            os.close(self._used_fd)
            self._close_lock()

    def forget_locks(self) -> None:
        """In a forked child: lets go of the parent's locks, which would else outlive the parent here."""
        self._mutex = threading.Lock()
        self._close_lock()

    def _open_lock(self) -> int:
        if self._lock_fd is None:
            self._lock_fd = os.open(f"{self.name}/ring", os.O_RDWR)
        return self._lock_fd

    def _close_lock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = None

    def _count_at(self, offset: int) -> int:
        (count,) = _COUNT.unpack_from(self.view, offset)
        return int(count)


_segments: weakref.WeakSet[SharedSegment] = weakref.WeakSet()


def _forget_locks() -> None:
    for segment in list(_segments):
        segment.forget_locks()


os.register_at_fork(after_in_child=_forget_locks)


def _mark_used(name: str) -> int:
    """Marks the directory as used until the returned descriptor is closed."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    fcntl.flock(fd, fcntl.LOCK_SH)
    if not os.path.exists(name):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "it was just removed", name)
    return fd


def _remove(name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(f"{name}/ring")
    with suppress(FileNotFoundError):
        os.rmdir(name)


def _remove_unused(parent: str) -> None:
    """Removes the segments in that directory whose every user is dead."""
    for entry in os.listdir(parent):
        if not entry.startswith(_PREFIX):
            continue
        with suppress(OSError):  # It belongs to another user, is in use, or went away meanwhile.
            fd = os.open(f"{parent}/{entry}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(f"{parent}/{entry}")
            finally:
                os.close(fd)
