"""Records on their way between processes: a bounded first-in first-out ring in shared memory, without pickle."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from typing import Any, Literal

import numpy as np
import torch

Overflow = Literal["wait", "drop_oldest"]
PREFIX = "verl-buffer-"
SHARED_MEMORY = "/dev/shm"

# The file is one header page, then the ring. All positions in the ring are multiples of 8. In the header:
#   0  magic, capacity, bytes of the ring, drop_oldest: written once
#  64  pid of whoever is inside the lock, else 0; number of those that died inside it
#  80  which of the two states holds (one byte); whether the creator has closed the buffer (one byte)
# 128  state 0; 256  state 1
HEADER_BYTES = 4096
MAGIC = 0x3130_474E_4952_4C52
HOLDER, RECOVERED, STATE_INDEX, CLOSED, STATES = 64, 72, 80, 81, (128, 256)
COUNT, FIXED, STATE = struct.Struct("=Q"), struct.Struct("=4Q"), struct.Struct("=6Q")
FRAME = struct.Struct("=2Q")  # before each record: its number of bytes and their CRC-32
RESERVE_BYTES = 1 << 20  # the ring asks the system for memory in pieces of this size, as it fills

TORCH_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def encode_record(record: Mapping[str, Any]) -> bytes:
    """The record as bytes: the length of a JSON part as u64, that part, and the raw arrays, each padded to 8
    bytes.

    Raises:
        ValueError: a key is not a string, or a value is of a kind that a record cannot hold.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"need a mapping of names to values as record, got {type(record).__name__}")
    arrays = bytearray()
    # surrogatepass: what a byte-level tokenizer decoded badly shall arrive as it is.
    text = json.dumps(_to_json(record, "record", arrays), ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    return b"".join([COUNT.pack(len(text)), text, bytes(-len(text) % 8), arrays])


def decode_record(body: bytearray) -> dict[str, Any]:
    """The record of `encode_record`; its arrays and tensors are writable views of `body`."""
    (length,) = COUNT.unpack_from(body)
    text = body[COUNT.size : COUNT.size + length].decode("utf-8", "surrogatepass")
    record: dict[str, Any] = _from_json(json.loads(text), body, COUNT.size + length + -length % 8)
    return record


def _to_json(value: Any, where: str, arrays: bytearray) -> Any:
    """Scalars and dicts as they are, all else as a list that begins with its kind; raw bytes are appended to
    `arrays`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            raise ValueError(f"need strings as keys, got {list(value)[:8]} at {where}")
        return {key: _to_json(item, f"{where}[{key!r}]", arrays) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [
            "tuple" if isinstance(value, tuple) else "list",
            *(_to_json(item, f"{where}[{i}]", arrays) for i, item in enumerate(value)),
        ]
    if isinstance(value, bytes):
        raw, kind, shape, dtype = value, "bytes", [len(value)], ""
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        raw, kind, shape, dtype = value.tobytes(), "numpy", list(value.shape), value.dtype.str
    elif isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        raw, kind, shape, dtype = (
            flat.view(torch.uint8).numpy().tobytes(),
            "torch",
            list(value.shape),
            str(value.dtype),
        )
    else:
        raise ValueError(
            "need str, int, float, bool, None, bytes, numeric numpy arrays, dense torch tensors, or lists, tuples and dicts of these, "
            f"got {type(value).__name__} at {where}; convert it first"
        )
    start = len(arrays)
    arrays += raw
    arrays += bytes(-len(raw) % 8)
    return [kind, start, shape, dtype]


def _from_json(tree: Any, body: bytearray, start: int) -> Any:
    if isinstance(tree, dict):
        return {key: _from_json(item, body, start) for key, item in tree.items()}
    if not isinstance(tree, list):
        return tree
    if tree[0] in ("list", "tuple"):
        items = [_from_json(item, body, start) for item in tree[1:]]
        return tuple(items) if tree[0] == "tuple" else items
    kind, offset, shape, dtype = tree[0], start + tree[1], tree[2], tree[3]
    size = int(np.prod(shape, dtype=np.int64))
    if kind == "bytes":
        return bytes(body[offset : offset + size])
    if kind == "numpy":
        return np.frombuffer(body, dtype, size, offset).reshape(shape)
    if size == 0:  # torch.frombuffer refuses to read nothing.
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(body, dtype=TORCH_DTYPES[dtype], count=size, offset=offset).reshape(shape)


class _Wait:
    """A limit on one call: sleeps 0.1 ms, then longer up to 5 ms, instead of spinning."""

    def __init__(self, limit_s: float) -> None:
        if not limit_s >= 0:
            raise ValueError(f"need timeout_s >= 0, got {limit_s}")
        self.limit_s = limit_s
        self._start_s = time.monotonic()
        self._since = time.strftime("%H:%M:%S")
        self._delay_s = 1e-4

    def left_s(self) -> float:
        return max(0.0, self._start_s + self.limit_s - time.monotonic())

    def pause(self, wanted: str) -> None:
        """Sleeps a little; raises TimeoutError at the limit."""
        if self.left_s() == 0:
            raise TimeoutError(f"waited {self.limit_s:g} s, since {self._since}, for {wanted}")
        time.sleep(min(self._delay_s, self.left_s()))
        self._delay_s = min(self._delay_s * 1.5, 5e-3)


class _Segment:
    """A file mapped by several processes, the lock on it, and the mark that somebody uses it.

    It lies in a directory of its own. Every process that uses it holds a shared lock on that directory until
    it dies, so one that nobody holds is left over and may be removed: unlike a pid in its name, this also
    holds between containers that share /dev/shm. The exclusive lock is on the file itself; the kernel frees
    both at a process's death.
    """

    def __init__(self, name: str, holds_fd: int | None = None) -> None:
        self.name = name
        self.mutex = threading.Lock()
        self.closed = False
        self._creator_pid = None if holds_fd is None else os.getpid()
        self._lock_fd: int | None = None
        # Not through the lock's descriptor: mmap keeps a copy, and forked children would hold the lock with
        # it.
        with open(f"{name}/ring", "r+b") as ring:
            self._map = mmap.mmap(ring.fileno(), 0)
        self._holds_fd = _hold(name) if holds_fd is None else holds_fd
        self.view = memoryview(self._map)
        _segments.add(self)

    @classmethod
    def create(cls, header: bytes, ring_bytes: int) -> _Segment:
        """A new one, readable by this user alone, after removing those that nobody uses any more."""
        parent = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else tempfile.gettempdir()
        remove_left_over(parent)
        while True:
            name = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
            with suppress(FileNotFoundError):  # Another creator may have removed it before it was held.
                holds_fd = _hold(name)
                break
        try:
            with open(os.open(f"{name}/ring", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as ring:
                ring.write(header)
                ring.truncate(HEADER_BYTES + ring_bytes)
            return cls(name, holds_fd)
        except BaseException:
            _remove(name)
            os.close(holds_fd)
            raise

    def lock_fd(self) -> int:
        if self._lock_fd is None:
            self._lock_fd = os.open(f"{self.name}/ring", os.O_RDWR)
        return self._lock_fd

    def close_lock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
        self._lock_fd = None

    def close(self) -> None:
        """Unmaps it; in its creator also removes it, and tells those who are attached."""
        self.closed = True
        with self.mutex:
            if self._creator_pid == os.getpid():
                self.view[CLOSED] = 1
                _remove(self.name)
            self.view.release()
            self._map.close()
            os.close(self._holds_fd)
            self.close_lock()


_segments: weakref.WeakSet[_Segment] = weakref.WeakSet()


def _forget_locks() -> None:
    """In a forked child: lets go of the parent's locks, which would else outlive the parent in this process."""
    for segment in list(_segments):
        segment.mutex = threading.Lock()
        segment.close_lock()


os.register_at_fork(after_in_child=_forget_locks)


def _hold(name: str) -> int:
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


def remove_left_over(parent: str) -> None:
    """Removes the buffers in that directory whose every user is dead."""
    for entry in os.listdir(parent):
        if not entry.startswith(PREFIX):
            continue
        with suppress(OSError):  # It belongs to another user, is in use, or went away meanwhile.
            fd = os.open(f"{parent}/{entry}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(f"{parent}/{entry}")
            finally:
                os.close(fd)


@dataclass
class _State:
    """Where the ring's records are, and how many there were: everything that a push or a sample changes, in
    one piece.
    """

    head: int  # position behind the newest record; positions wrap around the ring when they are used
    tail: int  # position of the oldest record
    pushed: int  # records so far; of these
    taken: int  # were sampled,
    dropped: int  # gave way to newer ones
    reserved: int  # bytes of the ring, from its start, that the system has given

    @property
    def num_records(self) -> int:
        return self.pushed - self.taken - self.dropped


class SharedMemoryBuffer:
    """Bounded first-in first-out buffer of records that any number of processes push to and sample from.

    A record is a mapping from names to str, int, float, bool, None, bytes, numpy arrays, torch tensors, or
    lists, tuples and dicts of these. Tensors come back on the CPU without gradient, numpy scalars as Python
    numbers.

    `sample` hands out the oldest records, each to exactly one caller, because what lies longest is the most
    off-policy and a record trained on twice would weigh double. Other processes reach the buffer by fork, by
    pickle, or by `attach(name)`.

    A process may be killed anywhere. Records are written to free bytes first; then the new positions and
    counts are written beside those that hold, and one byte says which of the two hold. The kernel frees the
    lock of the dead, so the next process finds either all of a push or none of it; a sample that dies leaves
    its records to the others.

    The creator's `close`, collection as garbage or exit removes the buffer, and calls on it in other
    processes raise. If all of its users were killed, the next buffer that is created removes it.

    Args:
        capacity: most records at a time.
        buffer_bytes: most bytes of records at a time; memory is taken only as records fill it.
        overflow: what a push does when it is full: "wait" until others have sampled, or "drop_oldest", which
            is counted.
        timeout_s: longest wait of a call of this process or of one that the buffer is pickled to; math.inf
            for no limit.

    Raises:
        ValueError: a size is too small or `overflow` is unknown.
        OSError: shared memory is full.
    """

    def __init__(
        self,
        capacity: int = 10_000,
        *,
        buffer_bytes: int = 64 << 20,
        overflow: Overflow = "wait",
        timeout_s: float = 600.0,
    ) -> None:
        if capacity < 1 or buffer_bytes < 256:
            raise ValueError(f"need capacity >= 1 and buffer_bytes >= 256, got {capacity} and {buffer_bytes}")
        if overflow not in ("wait", "drop_oldest"):
            raise ValueError(f"need overflow 'wait' or 'drop_oldest', got {overflow!r}")
        ring_bytes = buffer_bytes - buffer_bytes % 8
        self._open(
            _Segment.create(FIXED.pack(MAGIC, capacity, ring_bytes, overflow == "drop_oldest"), ring_bytes),
            timeout_s,
        )

    @classmethod
    def attach(cls, name: str, timeout_s: float = 600.0) -> SharedMemoryBuffer:
        """The buffer that another process of this user created under `name`.

        Raises:
            RuntimeError: there is none, or no longer.
        """
        buffer = cls.__new__(cls)
        try:
            buffer._open(_Segment(name), timeout_s)
        except OSError as error:
            raise RuntimeError(
                f"need an open buffer, got {name!r}: {error.strerror}; keep its creator alive"
            ) from error
        return buffer

    def _open(self, segment: _Segment, timeout_s: float) -> None:
        self.name, self._segment = segment.name, segment
        self._finalizer = weakref.finalize(
            self, segment.close
        )  # Runs at the interpreter's exit at the latest.
        self.timeout_s = _Wait(timeout_s).limit_s
        magic, self.capacity, self.buffer_bytes, drop_oldest = FIXED.unpack_from(segment.view)
        if magic != MAGIC:
            raise RuntimeError(f"need a buffer of this version of verl at {self.name}, got another file")
        self._drop_oldest = bool(drop_oldest)

    def push(self, record: Mapping[str, Any], timeout_s: float | None = None) -> None:
        """Appends a copy of the record.

        Args:
            record: names and values.
            timeout_s: longest wait for room; None for the buffer's.

        Raises:
            ValueError: it holds what a record cannot hold, or is larger than the whole buffer.
            TimeoutError: there was no room in that time; nothing was pushed.
            OSError: shared memory is full; nothing was pushed.
            RuntimeError: the buffer is closed.
        """
        body = encode_record(record)
        checksum = zlib.crc32(body)
        size = FRAME.size + len(body) + -len(body) % 8
        if size > self.buffer_bytes:
            raise ValueError(
                f"need records of at most {self.buffer_bytes} bytes, got one of {size}; raise buffer_bytes"
            )
        wait = _Wait(self.timeout_s if timeout_s is None else timeout_s)
        while True:
            with self._locked(wait) as state:
                if self._make_room(state, size):
                    self._reserve(state, size)
                    self._write(state.head, FRAME.pack(len(body), checksum))
                    self._write(state.head + FRAME.size, body)
                    state.head += size
                    state.pushed += 1
                    self._commit(state)
                    return
            wait.pause(
                f"room for {size} bytes in {self._fill(state)}; sample faster, raise capacity or buffer_bytes, or drop the oldest"
            )

    def sample(self, batch_size: int, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """Takes the oldest `batch_size` records out, all at once, as soon as there are so many.

        Args:
            batch_size: number of records, at most the capacity.
            timeout_s: longest wait for them; None for the buffer's.

        Returns:
            The records, oldest first. No other call gets them.

        Raises:
            ValueError: that many never fit.
            TimeoutError: there were fewer in that time; they stay.
            RuntimeError: the buffer is closed, or a record does not match its checksum.
        """
        if not 1 <= batch_size <= self.capacity:
            raise ValueError(f"need a batch_size from 1 to the capacity {self.capacity}, got {batch_size}")
        wait = _Wait(self.timeout_s if timeout_s is None else timeout_s)
        while True:
            with self._locked(wait) as state:
                if state.num_records >= batch_size:
                    bodies = [self._take(state) for _ in range(batch_size)]
                    state.taken += batch_size
                    self._commit(state)
                    break
            wait.pause(
                f"{batch_size} records in {self._fill(state)}; push more, or raise buffer_bytes if those are full"
            )
        return [decode_record(body) for body in bodies]

    def __len__(self) -> int:
        return self.stats()["records"]

    def stats(self) -> dict[str, int]:
        """Counts over all processes: `pushed` = `taken` + `dropped` + `records`, all in records.

        `bytes_used` is what those in the buffer occupy; `recovered` counts processes that died inside a call.
        """
        with self._locked(_Wait(self.timeout_s)) as state:
            counts = {
                "records": state.num_records,
                "pushed": state.pushed,
                "taken": state.taken,
                "dropped": state.dropped,
            }
            return counts | {"recovered": self._count_at(RECOVERED), "bytes_used": state.head - state.tail}

    def close(self) -> None:
        """Lets go of the buffer, and removes it if this process created it. May be called twice."""
        self._finalizer()

    def __enter__(self) -> SharedMemoryBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).attach, (self.name, self.timeout_s)

    @contextmanager
    def _locked(self, wait: _Wait) -> Iterator[_State]:
        """Alone among all threads and processes; gives a copy of the state, which `_commit` makes hold."""
        segment, mutex, held = self._segment, self._segment.mutex, False
        while not mutex.acquire(timeout=min(wait.left_s(), threading.TIMEOUT_MAX)):
            wait.pause(f"other threads of this process to leave {self.name}")
        try:
            while not held:
                if segment.closed or segment.view[CLOSED]:
                    raise RuntimeError(
                        f"need an open buffer, but {self.name} was closed here or by its creator"
                    )
                with suppress(
                    BlockingIOError, FileNotFoundError
                ):  # Taken; just closed by its creator, which the next round sees.
                    fcntl.flock(segment.lock_fd(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held = True
                if not held:
                    wait.pause(f"process {self._count_at(HOLDER)} to leave {self.name}; it may be stopped")
            if self._count_at(HOLDER):
                COUNT.pack_into(segment.view, RECOVERED, self._count_at(RECOVERED) + 1)
            COUNT.pack_into(segment.view, HOLDER, os.getpid())
            yield _State(*STATE.unpack_from(segment.view, STATES[segment.view[STATE_INDEX]]))
        finally:
            if held:
                COUNT.pack_into(segment.view, HOLDER, 0)
                fcntl.flock(segment.lock_fd(), fcntl.LOCK_UN)
            mutex.release()

    def _commit(self, state: _State) -> None:
        """Makes the state hold: it is written beside the one that holds, then one byte is stored."""
        view = self._segment.view
        other = 1 - view[STATE_INDEX]
        STATE.pack_into(view, STATES[other], *astuple(state))
        view[STATE_INDEX] = other

    def _make_room(self, state: _State, size: int) -> bool:
        """Whether the ring has room for `size` bytes, after dropping the oldest records if that is wanted."""
        dropped = state.dropped
        while state.num_records == self.capacity or state.head - state.tail + size > self.buffer_bytes:
            if not self._drop_oldest:
                return False
            self._take(state)
            state.dropped += 1
        if state.dropped > dropped:  # First, since their bytes are about to be overwritten.
            self._commit(state)
        if state.num_records == 0:  # Starting over at 0 keeps a ring that is never full small.
            state.head = state.tail = 0
        return True

    def _reserve(self, state: _State, size: int) -> None:
        """Takes the memory that is about to be written: a full /dev/shm is an error here, and would be a
        SIGBUS at the write.
        """
        end = min(state.head % self.buffer_bytes + size, self.buffer_bytes)
        if end <= state.reserved or sys.platform == "darwin":  # There it is a file on disk.
            return
        piece = min(end + -end % RESERVE_BYTES, self.buffer_bytes) - state.reserved
        try:
            os.posix_fallocate(self._segment.lock_fd(), HEADER_BYTES + state.reserved, piece)
        except OSError as error:
            message = f"need {piece} more bytes of shared memory, got: {error.strerror}; free some, or lower buffer_bytes"
            raise OSError(error.errno, message) from error
        state.reserved += piece

    def _take(self, state: _State) -> bytearray:
        """Moves the tail behind the oldest record; returns its bytes."""
        length, checksum = FRAME.unpack(self._read(state.tail, FRAME.size))
        size = FRAME.size + length + -length % 8
        is_inside = size <= state.head - state.tail
        body = self._read(state.tail + FRAME.size, length if is_inside else 0)
        if not is_inside or zlib.crc32(body) != checksum:
            raise RuntimeError(
                f"need whole records in {self.name}, got a wrong checksum: something else wrote to that memory; close it"
            )
        state.tail += size
        return body

    def _write(self, position: int, raw: bytes) -> None:
        start = HEADER_BYTES + position % self.buffer_bytes
        first = min(len(raw), HEADER_BYTES + self.buffer_bytes - start)
        view = self._segment.view
        view[start : start + first] = raw[:first]
        view[HEADER_BYTES : HEADER_BYTES + len(raw) - first] = raw[first:]

    def _read(self, position: int, size: int) -> bytearray:
        start = HEADER_BYTES + position % self.buffer_bytes
        first = min(size, HEADER_BYTES + self.buffer_bytes - start)
        view, raw = self._segment.view, bytearray(size)
        raw[:first] = view[start : start + first]
        raw[first:] = view[HEADER_BYTES : HEADER_BYTES + size - first]
        return raw

    def _count_at(self, offset: int) -> int:
        (count,) = COUNT.unpack_from(self._segment.view, offset)
        return int(count)

    def _fill(self, state: _State) -> str:
        records = f"{state.num_records} of {self.capacity} records"
        return f"{self.name}, which holds {records} in {state.head - state.tail} of {self.buffer_bytes} bytes"
