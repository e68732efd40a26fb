"""Custom weight loader inside the processes of an SGLang server, which calls `load`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from verl.weight_sync.receiver import WeightReceiver
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import TensorInfo, WeightChunk

# Name of the loader for `--custom-weight-loader` and `load_format`.
LOADER = "verl.rollout.sglang.worker.load"

_LOG = logging.getLogger(__name__)


class RankLoader:
    """Loads weights into the model of this process, by orders of `WeightUpdater`."""

    def __init__(self) -> None:
        # Tensors need not be kept: the model copies them into its own weights.
        self._receiver = WeightReceiver(None, copies_tensors=False)
        self._store: Any = None

    def run(self, model: Any, order: dict[str, Any]) -> dict[str, Any]:
        """Join a process group, or load a chunk into the model; return the report."""
        receiver, location = self._receiver, order["location"]
        receiver.reset()
        if order["kind"] == "join":
            address, port = location["address"], location["port"]
            num_ranks, timeout_s = location["num_ranks"], location["timeout_s"]
            receiver.join_group(
                address,
                port,
                rank=location["first_rank"] + order["rank"],
                num_ranks=num_ranks,
                backend=location["backend"],
                timeout_s=timeout_s,
            )
            self._store = connect_store(address, port, num_ranks=num_ranks, timeout_s=timeout_s)
        else:
            infos = tuple(TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in order["tensors"])
            ranges = tuple(parse_ranges(own) for own in order["ranges"])
            for batch in receiver.batches(
                WeightChunk(infos, order["kind"], location, ranges), records=order["records"]
            ):
                model.load_weights(list(batch))
        return {
            "digests": receiver.digests,
            "read_ranges": dict(receiver.read_ranges),
            "num_bytes": receiver.num_bytes,
        }

    def write_report(self, order: dict[str, Any], report: str) -> None:
        """Write a report to where the order says: a folder, or the store of the process group."""
        if order["folder"] is None:
            if self._store is not None:
                self._store.set(report_key(order["number"], order["rank"]), report)
            return
        path = report_file(Path(order["folder"]), order["number"], order["rank"])
        # Renamed when complete, so that no reader sees a part of it.
        new = path.with_suffix(".new")
        with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(report)
        new.rename(path)


_rank_loader = RankLoader()


def load(model: Any, orders: Sequence[tuple[str, Tensor]]) -> None:
    """Run orders of `WeightUpdater`, and write a report or the error after each.

    Args:
        model: SGLang's, with `load_weights`.
        orders: JSON in place of a tensor's name, with an empty tensor; one.
    """
    for text, _ in orders:
        order = json.loads(text)
        # No exception leaves this function: it would end the whole server.
        report: dict[str, Any]
        try:
            report = _rank_loader.run(model, order)
        except Exception as error:
            _LOG.exception("weights could not be loaded")
            report = {"error": f"{type(error).__name__}: {error}"}
        try:
            _rank_loader.write_report(order, json.dumps(report))
        except Exception:
            _LOG.exception("the report on weights could not be written")


def report_key(number: int, rank: int) -> str:
    """Name of a report in a store."""
    return f"report/{number}/{rank}"


def report_file(folder: Path, number: int, rank: int) -> Path:
    """Path of a report in a folder."""
    return folder / f"report-{number}-{rank}.json"


def connect_store(address: str, port: int, *, num_ranks: int, timeout_s: float) -> Any:
    """Connect to the store of a process group, which must exist, as one more client."""
    return dist.TCPStore(address, port, num_ranks, False, timedelta(seconds=timeout_s), False)
