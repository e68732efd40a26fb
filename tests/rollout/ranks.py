"""A policy sharded over processes, called over pipes as a worker group."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny import tiny_codec
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.placement import ParallelConfig
from verl.config.roles import OptimizerConfig, RoleConfig
from verl.controller.dispatch import dispatch_mode, layout_of_ranks
from verl.controller.worker_group import CompletedFuture, WorkerGroup
from verl.engines.fsdp import sharded_engine
from verl.rollout.actor_worker import ActorWorker
from verl.utils.network import free_port


class ProcessGroup(WorkerGroup):
    """Ranks behind pipes; a call waits for all of them."""

    role = "policy"

    def __init__(self, pipes: list[Any]) -> None:
        self._pipes = pipes
        own = layout_of_ranks((rank, True) for rank in range(len(pipes)))
        self.layouts = {"ranks": own, "generate": own}

    def call(self, method: Any, *args: Any) -> Any:
        """Call all ranks; a function that is not a method of the worker gets the worker as an argument."""
        if not hasattr(ActorWorker, method.__name__):
            return CompletedFuture(self._all([(method, args)] * len(self._pipes)))
        mode = dispatch_mode(method)
        split = mode.split(args, len(self._pipes))
        return CompletedFuture(mode.join(self._all([(method.__name__, own) for own in split]), args))

    def _all(self, calls: list[Any]) -> list[Any]:
        for pipe, call in zip(self._pipes, calls, strict=True):
            pipe.send(call)
        with ThreadPoolExecutor(len(self._pipes)) as threads:
            results = list(threads.map(lambda pipe: pipe.recv(), self._pipes))
        failed = [text for is_good, text in results if not is_good]
        assert not failed, failed[0]
        return [result for _, result in results]


@contextmanager
def policy_ranks(model: str, num_ranks: int, **parallel: Any) -> Iterator[ProcessGroup]:
    """The policy of a folder, sharded over processes that run inside the block."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes = [context.Pipe() for _ in range(num_ranks)]
    ranks = [
        context.Process(target=_rank, args=(model, rank, num_ranks, port, pipes[rank][1], parallel))
        for rank in range(num_ranks)
    ]
    for process, (_, other) in zip(ranks, pipes, strict=True):
        process.start()
        other.close()  # so that a rank that dies ends `recv` with an EOFError
    try:
        yield ProcessGroup([own for own, _ in pipes])
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _rank(model: str, rank: int, num_ranks: int, port: int, pipe: Any, parallel: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    config = RoleConfig(optimizer=OptimizerConfig(lr=1e-2))
    engine = sharded_engine(
        model, "policy", config, ParallelConfig(**parallel), device=torch.device("cpu"), total_updates=100
    )
    options: dict[str, Any] = {"max_slots": 8, "temperature": 1.0, "epochs": 1, "chunk": 100}
    worker = ActorWorker(engine, Algorithm.bind(AlgorithmConfig()), tiny_codec(), **options)
    while True:
        method, args = pipe.recv()
        try:
            result = getattr(worker, method)(*args) if isinstance(method, str) else method(worker, *args)
            pipe.send((True, result))
        except Exception:
            pipe.send((False, traceback.format_exc()))


@torch.no_grad()
def moved(worker: ActorWorker, seed: int) -> None:
    """Change every weight of a rank by `change_of`."""
    for name, tensor in worker.engine.local_tensors().items():
        (piece,) = [piece for piece in worker.engine.local_shards() if piece.name == name] or [None]
        if piece is not None:
            shape = worker.engine.shapes()[name]
            tensor.add_(change_of(name, shape, seed)[tuple(slice(*bound) for bound in piece.bounds)])


@torch.no_grad()
def move(transformer: Any, seed: int) -> None:
    """Change every weight of an unsharded model by `change_of`."""
    for name, tensor in transformer.named_parameters():
        tensor.add_(change_of(name, tuple(tensor.shape), seed))


def change_of(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random change of a full tensor, by the seed and the name."""
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * len(name)))
