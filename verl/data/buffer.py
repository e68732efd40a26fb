"""Records on their way between processes: a bounded first-in first-out ring in shared memory."""

from __future__ import annotations

import struct
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Literal

from verl.data.records import decode_record, encode_record
from verl.data.shared_segment import HEADER_BYTES, SharedSegment, TimeLimit

Overflow = Literal["wait", "drop_oldest"]

# The ring lies behind the header page of the segment. All positions in it are multiples of 8. In the header:
#   0  magic, capacity, bytes of the ring, drop_oldest: written once
#  64  the segment's own fields
#  80  the number of the state that holds, 0 or 1 (one byte)
# 128  state 0
# 256  state 1
_MAGIC = 0x3130_474E_4952_4C52
_STATE_INDEX, _STATES = 80, (128, 256)
_FIXED, _STATE = struct.Struct("=4Q"), struct.Struct("=6Q")
_FRAME = struct.Struct("=2Q")  # before each record: its number of bytes and their CRC-32


@dataclass
class _State:
    """Positions and counts of the ring; a push or a sample changes all of them at once.

    Attributes:
        head: position behind the newest record; positions wrap around the ring when they are used.
        tail: position of the oldest record.
        pushed: records so far.
        taken: records that were sampled.
        dropped: records that gave way to newer ones.
        reserved: bytes of the ring, from its start, that have memory.
    """

    head: int
    tail: int
    pushed: int
    taken: int
    dropped: int
    reserved: int

    @property
    def num_records(self) -> int:
        return self.pushed - self.taken - self.dropped


class SharedMemoryBuffer:
    """Bounded first-in first-out buffer of records that any number of processes push to and sample from.

    A record is a mapping from names to str, int, float, bool, None, bytes, numpy arrays, torch tensors, or
    lists, tuples and dicts of these. Tensors come back on the CPU without gradient, numpy scalars as Python
    numbers.

    `sample` hands out the oldest records, each to exactly one caller: the oldest are the most off-policy, and
    a record trained on twice would weigh double. Other processes reach the buffer by fork, by pickle, or by
    `attach(name)`.

    A process may be killed anywhere. A push first writes the record to free bytes. Then it writes the new
    positions and counts beside those that hold, and changes one byte, which says which of the two hold. The
    kernel frees the lock of a dead process, so the next one finds either all of a push or none of it. A
    sample that dies leaves its records to the others.

    When the creator calls `close`, exits or drops the buffer, it is removed, and calls on it in other
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
        header = _FIXED.pack(_MAGIC, capacity, ring_bytes, overflow == "drop_oldest")
        self._open(SharedSegment.create(header, ring_bytes), timeout_s)

    @classmethod
    def attach(cls, name: str, timeout_s: float = 600.0) -> SharedMemoryBuffer:
        """Buffer that another process of this user created under `name`.

        Raises:
            RuntimeError: there is none, or no longer.
        """
        buffer = cls.__new__(cls)
        try:
            buffer._open(SharedSegment(name), timeout_s)
        except OSError as error:
            raise RuntimeError(
                f"need an open buffer, got {name!r}: {error.strerror}; keep its creator alive"
            ) from error
        return buffer

    def _open(self, segment: SharedSegment, timeout_s: float) -> None:
        self.name, self._segment = segment.name, segment
        # Runs at the interpreter's exit at the latest.
        self._finalizer = weakref.finalize(self, segment.close)
        self.timeout_s = TimeLimit(timeout_s).limit_s
        magic, self.capacity, self.buffer_bytes, drop_oldest = _FIXED.unpack_from(segment.view)
        if magic != _MAGIC:
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
        size = _FRAME.size + len(body) + -len(body) % 8
        if size > self.buffer_bytes:
            raise ValueError(
                f"need records of at most {self.buffer_bytes} bytes, got one of {size}; raise buffer_bytes"
            )
        limit = TimeLimit(self.timeout_s if timeout_s is None else timeout_s)
        while True:
            with self._locked(limit) as state:
                if self._make_room(state, size):
                    end = min(state.head % self.buffer_bytes + size, self.buffer_bytes)
                    state.reserved = self._segment.reserve(state.reserved, end, self.buffer_bytes)
                    self._write(state.head, _FRAME.pack(len(body), checksum))
                    self._write(state.head + _FRAME.size, body)
                    state.head += size
                    state.pushed += 1
                    self._commit(state)
                    return
            limit.pause(
                f"room for {size} bytes in {self._fill_level(state)}; sample faster, raise capacity or "
                "buffer_bytes, or drop the oldest"
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
        limit = TimeLimit(self.timeout_s if timeout_s is None else timeout_s)
        while True:
            with self._locked(limit) as state:
                if state.num_records >= batch_size:
                    bodies = [self._take(state) for _ in range(batch_size)]
                    state.taken += batch_size
                    self._commit(state)
                    break
            limit.pause(
                f"{batch_size} records in {self._fill_level(state)}; push more, or raise buffer_bytes if "
                "those are full"
            )
        return [decode_record(body) for body in bodies]

    def __len__(self) -> int:
        return self.stats()["records"]

    def stats(self) -> dict[str, int]:
        """Counts over all processes: `pushed` = `taken` + `dropped` + `records`, all in records.

        `bytes_used` is what those in the buffer occupy; `recovered` counts processes that died inside a call.
        """
        with self._locked(TimeLimit(self.timeout_s)) as state:
            counts = {
                "records": state.num_records,
                "pushed": state.pushed,
                "taken": state.taken,
                "dropped": state.dropped,
            }
            recovered = self._segment.num_recovered
            return counts | {"recovered": recovered, "bytes_used": state.head - state.tail}

    def close(self) -> None:
        """Unmaps the buffer, and removes it if this process created it. May be called twice."""
        self._finalizer()

    def __enter__(self) -> SharedMemoryBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).attach, (self.name, self.timeout_s)

    @contextmanager
    def _locked(self, limit: TimeLimit) -> Iterator[_State]:
        """Alone among all threads and processes; gives a copy of the state, which `_commit` makes hold."""
        view = self._segment.view
        with self._segment.locked(limit):
            yield _State(*_STATE.unpack_from(view, _STATES[view[_STATE_INDEX]]))

    def _commit(self, state: _State) -> None:
        """Makes the state hold: writes it beside the one that holds, then stores one byte."""
        view = self._segment.view
        other = 1 - view[_STATE_INDEX]
        _STATE.pack_into(view, _STATES[other], *astuple(state))
        view[_STATE_INDEX] = other

    def _make_room(self, state: _State, size: int) -> bool:
        """True if the ring has room for `size` bytes; drops the oldest records where that is allowed."""
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

    def _take(self, state: _State) -> bytearray:
        """Moves the tail behind the oldest record; returns its bytes."""
        length, checksum = _FRAME.unpack(self._read(state.tail, _FRAME.size))
        size = _FRAME.size + length + -length % 8
        is_inside = size <= state.head - state.tail
        body = self._read(state.tail + _FRAME.size, length if is_inside else 0)
        if not is_inside or zlib.crc32(body) != checksum:
            raise RuntimeError(
                f"need whole records in {self.name}, got a wrong checksum: something else wrote to that "
                "memory; close it"
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

    def _fill_level(self, state: _State) -> str:
        records = f"{state.num_records} of {self.capacity} records"
        return f"{self.name}, which holds {records} in {state.head - state.tail} of {self.buffer_bytes} bytes"
