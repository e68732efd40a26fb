"""Groups that a policy shares with its engines, without any engine."""

from __future__ import annotations

import threading

import pytest
import torch

from verl.utils.network import free_port
from verl.weight_sync.process_group import broadcast, open_group, receive, send, shared_memory_id


def test_a_group_beside_the_default_one_carries_what_rank_0_has():
    port, groups = free_port(), {}

    def join(rank: int) -> None:
        groups[rank] = open_group("127.0.0.1", port, rank=rank, num_ranks=3, backend="gloo", timeout_s=20)

    in_threads(join, 3)
    contents = [torch.full((5,), rank, dtype=torch.uint8) for rank in (7, 8, 9)]
    in_threads(lambda rank: broadcast(groups[rank], contents[rank]), 3)
    assert all(content.tolist() == [7] * 5 for content in contents)


def test_each_rank_receives_what_it_alone_was_sent():
    port, groups = free_port(), {}

    def join(rank: int) -> None:
        groups[rank] = open_group("127.0.0.1", port, rank=rank, num_ranks=4, backend="gloo", timeout_s=20)

    in_threads(join, 4)
    contents = [torch.zeros(size, dtype=torch.uint8) for size in (0, 3, 0, 5)]
    sent = {
        1: torch.full((3,), 1, dtype=torch.uint8),
        2: torch.empty(0, dtype=torch.uint8),
        3: torch.full((5,), 3, dtype=torch.uint8),
    }
    in_threads(
        lambda rank: receive(groups[rank], contents[rank], sender=0) if rank else send(groups[0], sent), 4
    )
    assert [content.tolist() for content in contents] == [[], [1] * 3, [], [3] * 5]


def in_threads(work, num: int) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_group_that_is_not_complete_in_time_is_an_error():
    with pytest.raises(RuntimeError):
        open_group("127.0.0.1", free_port(), rank=0, num_ranks=2, backend="gloo", timeout_s=0.5)


def test_a_group_needs_a_known_backend():
    with pytest.raises(ValueError, match="need gloo or nccl .* got 'mpi'"):
        open_group("127.0.0.1", 1, rank=0, num_ranks=1, backend="mpi", timeout_s=1)


def test_processes_of_this_machine_see_the_same_shared_memory():
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(shared_memory_id) == shared_memory_id()
