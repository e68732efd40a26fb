"""Several processes that form one world over gloo, for tests."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(function: str, num_ranks: int, *args: Any, limit_s: float = 150.0) -> list[Any]:
    """Results of "module:function" on each rank of a world of `num_ranks` processes, called with `args`.

    Raises:
        AssertionError: a rank raised, or took longer than the limit; with its stack.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        world = (num_ranks, port, folder)
        ranks = [
            context.Process(target=_rank, args=(function, rank, world, args), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            return _results(Path(folder), ranks, time.monotonic() + limit_s)
        finally:
            for process in ranks:
                process.kill()


def _results(folder: Path, ranks: list[Any], deadline: float) -> list[Any]:
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        # A killed rank leaves no file, and the others would wait for it until the deadline. Read before the
        # files, since a rank that fails writes its file first.
        codes = [process.exitcode for process in ranks]
        failed = sorted(folder.glob("failed-*"))
        assert not failed, f"{failed[0].name}:\n{failed[0].read_text()}"
        assert not any(codes), f"exit codes of the ranks: {codes}"
        time.sleep(0.05)
    failed = sorted(folder.glob("failed-*"))
    assert not failed, f"{failed[0].name}:\n{failed[0].read_text()}"
    there = [rank for rank in range(len(ranks)) if (folder / f"result-{rank}").exists()]
    assert len(there) == len(ranks), f"of {len(ranks)} ranks only {there} answered in time"
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(len(ranks))]


def _rank(function: str, rank: int, world: tuple[int, int, str], args: tuple[Any, ...]) -> None:
    num_ranks, port, folder = world
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks
        )
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(*args)
        torch.save(result, f"{folder}/part-result-{rank}")
        os.rename(f"{folder}/part-result-{rank}", f"{folder}/result-{rank}")
        dist.barrier()
    except BaseException:
        Path(folder, f".failed-{rank}").write_text(traceback.format_exc())
        os.rename(f"{folder}/.failed-{rank}", f"{folder}/failed-rank-{rank}")
        raise
    os._exit(0)  # gloo's threads need not be waited for
