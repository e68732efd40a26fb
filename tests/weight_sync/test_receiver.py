"""Updates of an engine of two ranks by each transport; the ranks are threads with loaders of real engines."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.pool.pools import changed, group_of
from tests.tiny import tiny_policy
from verl.rollout.inference_server import EngineError, InferenceServer, ServerSpec, TokenChunk
from verl.rollout.pool.replica import Replica
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.weight_sync.fingerprint import fingerprint_of_ranks
from verl.weight_sync.receiver import WeightReceiver
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import TensorInfo, WeightChunk

RANKS = 2


def part_of_rank(name: str, tensor: Tensor, rank: int) -> Tensor:
    """Part that a loader slices out: rows; columns if a sum is split; norms whole; 64 rows of embeddings."""
    if "norm" in name:
        return tensor.clone()
    if "embed_tokens" in name:
        rows = tensor.narrow(0, 64 * rank, min(64, tensor.shape[0] - 64 * rank))
        return torch.cat([rows, torch.zeros(64 - rows.shape[0], tensor.shape[1], dtype=tensor.dtype)])
    return tensor.chunk(RANKS, dim=1 if "o_proj" in name or "down_proj" in name else 0)[rank].clone()


class Threads(InferenceServer):
    """Engine of two ranks; their orders go through JSON, as on the way to real ones."""

    transports = ("shm", "group", "direct")
    num_ranks = RANKS

    def __init__(self, spec: ServerSpec) -> None:
        super().__init__(spec)
        self.receivers = [WeightReceiver(torch.device("cpu"), copies_tensors=True) for _ in range(RANKS)]
        self.weights: list[dict[str, Tensor]] = [{}, {}]
        self.received_bytes: list[int] = []

    async def on_ranks(self, work: Callable[[int], Any]) -> None:
        def run() -> None:
            with ThreadPoolExecutor(RANKS) as threads:
                list(threads.map(work, range(RANKS)))

        await asyncio.to_thread(run)

    async def open(self) -> None:
        return

    async def close(self) -> None:
        return

    async def check(self) -> None:
        return

    async def pause(self) -> None:
        return

    async def resume(self) -> None:
        return

    def sample(self, prompt_ids: Any, params: Any) -> AsyncIterator[TokenChunk]:
        raise NotImplementedError

    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        place = {"num_ranks": num_ranks, "backend": backend, "timeout_s": self.spec.timeout_s}
        await self.on_ranks(
            lambda rank: self.receivers[rank].join_group(address, port, rank=first_rank + rank, **place)
        )

    async def begin_update(self) -> None:
        for receiver in self.receivers:
            receiver.reset()

    async def load(self, chunk: WeightChunk) -> None:
        def take(rank: int) -> None:
            own = chunk.of_rank(rank)
            location, ranges = json.loads(json.dumps([own.location, own.ranges]))
            own = WeightChunk(
                chunk.tensors,
                chunk.transport,
                location,
                tuple(parse_ranges(own_ranges) for own_ranges in ranges),
            )
            for batch in self.receivers[rank].batches(own, records=self.records_reads):
                for name, tensor in batch:
                    self.look_at(tensor)
                    self.weights[rank][name] = part_of_rank(name, tensor, rank)

        try:
            await self.on_ranks(take)
        except RuntimeError as error:
            raise EngineError(f"a rank failed: {error}") from None

    def look_at(self, tensor: Tensor) -> None:
        return

    async def end_update(self, version: int) -> str:
        self.received_bytes = [receiver.num_bytes for receiver in self.receivers]
        if self.records_reads and all(receiver.read_ranges for receiver in self.receivers):
            self.read_ranges = tuple(receiver.read_ranges for receiver in self.receivers)
        return fingerprint_of_ranks([receiver.digests for receiver in self.receivers])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("via", ["shm", "group", "direct"])
def test_ranks_get_all_once_and_then_what_they_read(via, dtype, tmp_path):
    policy = tiny_policy("llama")
    weights = WeightPublisher(group_of(policy), dtype, tmp_path, chunk_bytes=20_000, uses_p2p=via == "direct")
    engine = Threads(ServerSpec("threads", "unused", transport=via, timeout_s=20.0))
    notes: list[str] = []
    replica = Replica(
        engine,
        max_running=1,
        vocabulary=100,
        clock=time.monotonic,
        on_change=lambda _: None,
        note=notes.append,
    )
    tensors = dict(policy.transformer.named_parameters())
    itemsize = vars(torch)[dtype].itemsize
    num_bytes = itemsize * sum(tensor.numel() for tensor in tensors.values())
    norms = itemsize * sum(tensor.numel() for name, tensor in tensors.items() if "norm" in name)

    async def syncs_weights() -> None:
        await replica.open()
        for version in range(1, 5):
            if version == 4:  # as if the engine had come to read otherwise
                engine.read_ranges = (engine.read_ranges[1], engine.read_ranges[0])
            changed(policy, seed=version)
            await replica.load_weights(weights.write(version))
            for rank, own in enumerate(engine.weights):
                assert own.keys() == tensors.keys()
                for name, tensor in tensors.items():
                    assert torch.equal(
                        own[name], part_of_rank(name, tensor.detach().to(vars(torch)[dtype]), rank)
                    ), name
            is_whole = version in (1, 4)
            assert (
                replica.transfer.num_bytes
                == sum(engine.received_bytes)
                == (2 * num_bytes if is_whole else num_bytes + norms)
            )
            assert replica.transfer.num_repaired == (version == 4) and replica.version == version

    try:
        asyncio.run(syncs_weights())
    finally:
        weights.close()
    assert len(notes) == 1 and "the engine reads" in notes[0] and "it is sent again" in notes[0]


class Picky(Threads):
    """Engine whose loaders accept only plain tensors."""

    def look_at(self, tensor: Tensor) -> None:
        if type(tensor) is not Tensor:
            raise RuntimeError("what is that?")


def test_an_engine_that_cannot_say_what_it_reads_gets_everything(tmp_path):
    policy = tiny_policy("llama")
    weights = WeightPublisher(group_of(policy), "float32", tmp_path)
    engine, notes = Picky(ServerSpec("picky", "unused", transport="shm")), []
    replica = Replica(
        engine,
        max_running=1,
        vocabulary=100,
        clock=time.monotonic,
        on_change=lambda _: None,
        note=notes.append,
    )

    async def syncs_weights() -> None:
        await replica.open()
        for version in (1, 2):
            await replica.load_weights(weights.write(version))

    try:
        asyncio.run(syncs_weights())
    finally:
        weights.close()
    assert (
        replica.version == 2
        and replica.transfer.num_repaired == 1
        and engine.read_ranges is None
        and "what is that?" in notes[0]
    )
    assert engine.received_bytes == [sum(tensor.nbytes for tensor in policy.transformer.parameters())] * RANKS


def test_whole_tensors_that_are_not_to_be_recorded_are_plain(tmp_path):
    path, info = tmp_path / "part", TensorInfo("w", (2, 3), "float32")
    path.write_bytes(torch.arange(6.0).view(torch.uint8).numpy().tobytes())
    receiver = WeightReceiver(None, copies_tensors=False)
    for records in (False, True):
        chunk = WeightChunk((info,), "shm", {"path": str(path)})
        ((name, tensor),) = (one for batch in receiver.batches(chunk, records=records) for one in batch)
        assert (
            name == "w" and tensor.tolist() == [[0, 1, 2], [3, 4, 5]] and (type(tensor) is Tensor) != records
        )
    assert receiver.read_ranges == {"w": (((0, 2), (0, 3)),)}
