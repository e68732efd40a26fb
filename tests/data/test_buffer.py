import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.data.buffer import SharedMemoryBuffer
from verl.data.shared_segment import HEADER_BYTES

FORK = multiprocessing.get_context("fork")
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def buffer():
    with SharedMemoryBuffer(capacity=100, timeout_s=20) as buffer:
        yield buffer


def start(target, *args):
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def exit_code(process):
    process.join()  # With a limit it would also wait for the process's own children.
    return process.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DiesInPayload(SharedMemoryBuffer):
    def _write(self, position, raw):
        super()._write(position, raw[: len(raw) // 2])
        if len(raw) > 16:
            die()


class DiesBeforeCommit(SharedMemoryBuffer):
    def _commit(self, state):
        die()


class DiesInCommit(SharedMemoryBuffer):
    def _commit(self, state):
        index = self._segment.view[80]
        super()._commit(state)
        self._segment.view[80] = index
        die()


DEATHS = [DiesInPayload, DiesBeforeCommit, DiesInCommit]


def push_numbers(buffer, count, producer=0):
    for number in range(count):
        buffer.push({"producer": producer, "number": number, "payload": np.full(number % 50, number)})


def numbers(records):
    return [record["number"] for record in records]


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({"a": [{"b": {1}}]}, r"got set at record\['a'\]\[0\]\['b'\]"),
        ({"a": {1: 2}}, r"strings as keys, got \[1\] at record\['a'\]"),
        ({"a": np.array([None])}, "got ndarray at"),
        ([1], "need a mapping"),
    ],
)
def test_a_value_that_a_record_cannot_hold_is_named_with_its_place(buffer, record, place):
    with pytest.raises(ValueError, match=place):
        buffer.push(record)
    assert len(buffer) == 0


def test_the_oldest_records_come_first_and_once(buffer):
    push_numbers(buffer, 5)
    assert numbers(buffer.sample(batch_size=3)) == [0, 1, 2]
    assert len(buffer) == 2
    assert numbers(buffer.sample(2)) == [3, 4]
    assert buffer.stats() == {
        "records": 0,
        "pushed": 5,
        "taken": 5,
        "dropped": 0,
        "recovered": 0,
        "bytes_used": 0,
    }


def test_two_producers_and_two_consumers_hand_on_every_record_exactly_once():
    def consume(buffer, seen):
        for _ in range(40):
            for record in buffer.sample(5):
                assert record["payload"].tolist() == [record["number"]] * (record["number"] % 50)
                seen.push({"key": (record["producer"], record["number"])})

    with SharedMemoryBuffer(capacity=7, timeout_s=20) as buffer, SharedMemoryBuffer(timeout_s=20) as seen:
        workers = [start(push_numbers, buffer, 200, producer) for producer in range(2)]
        workers += [start(consume, buffer, seen) for _ in range(2)]
        assert [exit_code(worker) for worker in workers] == [0] * 4
        keys = sorted(record["key"] for record in seen.sample(400, timeout_s=0))
    assert keys == [(producer, number) for producer in range(2) for number in range(200)]


def test_threads_of_one_process_share_a_buffer(buffer):
    threads = [threading.Thread(target=push_numbers, args=(buffer, 25, producer)) for producer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = sorted((record["producer"], record["number"]) for record in buffer.sample(100))
    assert keys == [(producer, number) for producer in range(4) for number in range(25)]


@pytest.mark.parametrize("limit", [{"capacity": 2}, {"buffer_bytes": 512}])
def test_a_push_waits_while_the_buffer_is_full(limit):
    with SharedMemoryBuffer(**limit, timeout_s=20) as buffer:
        producer = start(push_numbers, buffer, 30)
        time.sleep(0.2)
        assert producer.is_alive() and len(buffer) < 10
        assert [buffer.sample(1)[0]["number"] for _ in range(30)] == list(range(30))
        assert exit_code(producer) == 0


def test_the_limit_of_a_wait_says_for_what_since_when_and_how_full():
    with SharedMemoryBuffer(capacity=2, timeout_s=0.05) as buffer:
        with pytest.raises(
            TimeoutError,
            match=r"waited 0.05 s, since \d\d:\d\d:\d\d, for 1 records in .* holds 0 of 2 records",
        ):
            buffer.sample(1)
        push_numbers(buffer, 2)
        with pytest.raises(
            TimeoutError,
            match=r"waited 0 s, since .*, for room for \d+ bytes in .* holds 2 of 2 records in \d+ of",
        ):
            buffer.push({}, timeout_s=0)
        assert numbers(buffer.sample(2)) == [0, 1]


def test_dropping_the_oldest_is_counted():
    with SharedMemoryBuffer(capacity=3, overflow="drop_oldest") as buffer:
        push_numbers(buffer, 8)
        assert buffer.stats()["dropped"] == 5
        assert numbers(buffer.sample(3)) == [5, 6, 7]


def test_what_can_never_fit_is_refused_at_once():
    with SharedMemoryBuffer(capacity=3, buffer_bytes=1024) as buffer:
        with pytest.raises(ValueError, match="at most 1024 bytes, got one of .* raise buffer_bytes"):
            buffer.push({"response": "x" * 1024})
        with pytest.raises(ValueError, match="batch_size from 1 to the capacity 3, got 4"):
            buffer.sample(4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 700), st.just("sample")), max_size=60),
    st.sampled_from(["wait", "drop_oldest"]),
)
def test_the_ring_behaves_like_a_queue_for_records_of_all_sizes(actions, overflow):
    expected = deque()
    with SharedMemoryBuffer(capacity=6, buffer_bytes=1001, overflow=overflow, timeout_s=0) as buffer:
        for number, action in enumerate(actions):
            if action == "sample":
                records = buffer.sample(1) if expected else []
                assert records == [expected.popleft() for _ in records]
                continue
            record = {"number": number, "payload": bytes([number]) * action}
            try:
                buffer.push(record)
            except TimeoutError:
                assert overflow == "wait" and expected
            else:
                expected.append(record)
            while len(expected) > len(buffer):
                expected.popleft()
        assert buffer.sample(len(expected)) == list(expected) if expected else len(buffer) == 0


@pytest.mark.parametrize("dying", DEATHS)
def test_a_producer_killed_inside_a_push_leaves_nothing_of_it(buffer, dying):
    push_numbers(buffer, 2)
    assert exit_code(start(lambda: dying.attach(buffer.name).push({"number": 9}))) == -signal.SIGKILL
    buffer.push({"number": 2})
    assert numbers(buffer.sample(3)) == [0, 1, 2]
    assert buffer.stats() == {
        "records": 0,
        "pushed": 3,
        "taken": 3,
        "dropped": 0,
        "recovered": 1,
        "bytes_used": 0,
    }


def test_a_producer_killed_while_it_overwrites_the_oldest_tears_no_record():
    with SharedMemoryBuffer(capacity=9, buffer_bytes=1024, overflow="drop_oldest", timeout_s=20) as buffer:
        for number in range(8):
            buffer.push({"number": number, "payload": bytes(120)})
        before = len(buffer)
        assert (
            exit_code(start(lambda: DiesInPayload.attach(buffer.name).push({"payload": bytes(300)})))
            == -signal.SIGKILL
        )
        assert len(buffer) < before
        assert numbers(buffer.sample(len(buffer)))[-1] == 7


@pytest.mark.parametrize("dying", [DiesBeforeCommit, DiesInCommit])
def test_a_consumer_killed_inside_a_sample_leaves_its_records_to_others(buffer, dying):
    push_numbers(buffer, 3)
    assert exit_code(start(lambda: dying.attach(buffer.name).sample(2))) == -signal.SIGKILL
    assert numbers(buffer.sample(3)) == [0, 1, 2]


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(buffer):
    reader, writer = os.pipe()

    def leave_a_child_and_die():
        dying = DiesBeforeCommit.attach(buffer.name)
        len(dying)  # The lock's descriptor is open before the fork.
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        os.write(writer, str(child).encode())
        dying.push({"number": 9})

    assert exit_code(start(leave_a_child_and_die)) == -signal.SIGKILL
    child = int(os.read(reader, 20))
    try:
        buffer.push({"number": 0}, timeout_s=5)
    finally:
        os.kill(child, signal.SIGKILL)
    assert numbers(buffer.sample(1)) == [0]


def test_producers_killed_at_any_moment_leave_whole_records_in_order(buffer):
    for round_number in range(12):
        producer = start(push_numbers, buffer, 10**6)
        time.sleep(0.02 + 0.003 * round_number)
        taken = [buffer.sample(1)[0] for _ in range(50)]
        producer.kill()
        exit_code(producer)
        taken += buffer.sample(len(buffer)) if len(buffer) else []
        assert numbers(taken) == list(range(len(taken)))
        assert all(
            record["payload"].tolist() == [record["number"]] * (record["number"] % 50) for record in taken
        )


def test_a_stopped_process_inside_the_lock_is_named_when_others_time_out(buffer):
    class Stops(SharedMemoryBuffer):
        def _commit(self, state):
            os.kill(os.getpid(), signal.SIGSTOP)

    process = start(lambda: Stops.attach(buffer.name).push({}))
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    with pytest.raises(TimeoutError, match=f"for process {process.pid} to leave"):
        buffer.push({}, timeout_s=0.05)
    process.kill()
    exit_code(process)
    buffer.push({})
    assert len(buffer) == 1


def test_a_changed_byte_is_noticed(buffer):
    buffer.push({"response": "x" * 100})
    buffer._segment.view[HEADER_BYTES + 60] ^= 1
    with pytest.raises(RuntimeError, match="wrong checksum"):
        buffer.sample(1)


def test_a_spawned_process_reaches_a_pickled_buffer(buffer):
    process = SPAWN.Process(target=buffer.push, args=({"number": 4},))
    process.start()
    assert numbers(buffer.sample(1, timeout_s=60)) == [4]
    process.join(60)
    assert process.exitcode == 0
    assert os.path.exists(buffer.name)  # Its exit removes nothing.


def test_a_pickled_buffer_keeps_its_settings_and_an_unpickled_one_does_not_own_it(buffer):
    with pickle.loads(pickle.dumps(buffer)) as other:
        assert (other.capacity, other.timeout_s, other.name) == (100, 20, buffer.name)
        other.push({"number": 1})
    assert numbers(buffer.sample(1)) == [1]


def test_closing_leaves_nothing_and_ends_the_waits_of_others():
    def wait_for_ever(buffer):
        with pytest.raises(RuntimeError, match="closed here or by its creator"):
            buffer.sample(1)

    buffer = SharedMemoryBuffer(timeout_s=20)
    waiting = start(wait_for_ever, buffer)
    time.sleep(0.1)
    buffer.close()
    buffer.close()
    assert exit_code(waiting) == 0
    assert not os.path.exists(buffer.name)
    for call in (buffer.__len__, lambda: SharedMemoryBuffer.attach(buffer.name)):
        with pytest.raises(RuntimeError, match="need an open buffer"):
            call()


def test_garbage_collection_leaves_nothing():
    buffer = SharedMemoryBuffer()
    name = buffer.name
    del buffer
    assert not os.path.exists(name)


def test_the_exit_of_the_creator_leaves_nothing_and_says_nothing():
    program = "from verl.data.buffer import SharedMemoryBuffer as B; b = B(); b.push({}); print(b.name)"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert not os.path.exists(result.stdout.strip())


def test_what_a_killed_creator_left_is_removed_at_the_next_creation_and_nothing_else(buffer):
    reader, writer = os.pipe()

    def create_and_die():
        left = SharedMemoryBuffer()
        os.write(writer, left.name.encode())
        die()

    assert exit_code(start(create_and_die)) == -signal.SIGKILL
    with SharedMemoryBuffer():
        assert not os.path.exists(os.read(reader, 200).decode())
        assert os.path.exists(buffer.name)


def test_no_other_user_may_read_it_and_memory_is_taken_only_as_it_fills(buffer):
    for _ in range(5):  # Emptied each time, the ring starts over where it has memory.
        buffer.push({"payload": bytes(600_000)})
        buffer.sample(1)
    ring = os.stat(f"{buffer.name}/ring")
    assert stat.S_IMODE(ring.st_mode) == 0o600
    assert stat.S_IMODE(os.stat(buffer.name).st_mode) == 0o700
    assert ring.st_size > 64 << 20 and ring.st_blocks * 512 < 2 << 20
