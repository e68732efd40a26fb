"""Takes the policy's weights inside the processes of an SGLang server, which calls `load` as a custom weight
loader.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from verl.weight_sync.receiver import WeightReceiver
from verl.weight_sync.shard_tracking import parse_ranges
from verl.weight_sync.types import TensorInfo, WeightChunk

# Name by which SGLang finds the loader: of `--custom-weight-loader` and of `load_format`.
LOADER = "verl.rollout.sglang.worker.load"

_logger = logging.getLogger(__name__)


@dataclass
class _Joined:
    """What takes weights in this process, and the store in which its group met, for reports to another
    machine.
    """

    # The model copies what it is handed, to where it is wanted.
    arrivals: WeightReceiver = field(default_factory=lambda: WeightReceiver(None, copies_tensors=False))
    store: Any = None


_joined = _Joined()


def load(model: Any, orders: Sequence[tuple[str, Tensor]]) -> None:
    """Carries out what an engine of verl asks of the model.

    An order is a JSON text in place of a tensor's name; its tensor is empty. After each one a report is
    written: the digests of the tensors that the model was given, their bytes, and what it read of those that
    were to be recorded; or the error. An exception here would end the whole server, so none leaves it.

    Args:
        model: SGLang's, with `load_weights`.
        orders: one.
    """
    for text, _ in orders:
        order = json.loads(text)
        report: dict[str, Any]
        try:
            report = _carried_out(model, order)
        except Exception as error:
            _logger.exception("weights were not taken")
            report = {"error": f"{type(error).__name__}: {error}"}
        try:
            _write(order, json.dumps(report))
        except Exception:
            _logger.exception("the report on weights could not be written")


def report_key(number: int, rank: int) -> str:
    """Name of a report in a store."""
    return f"report/{number}/{rank}"


def report_store(address: str, port: int, *, num_ranks: int, timeout_s: float) -> Any:
    """The store in which a group met, which must exist, seen by one more client."""
    return dist.TCPStore(address, port, num_ranks, False, timedelta(seconds=timeout_s), False)


def report_file(folder: Path, number: int, rank: int) -> Path:
    """Place of a report in a folder."""
    return folder / f"report-{number}-{rank}.json"


def _carried_out(model: Any, order: dict[str, Any]) -> dict[str, Any]:
    arrivals = _joined.arrivals
    arrivals.reset()
    if order["via"] == "join":
        _join(order["where"], order["rank"])
    else:
        infos = tuple(TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in order["tensors"])
        part = WeightChunk(
            infos, order["via"], order["where"], tuple(parse_ranges(reads) for reads in order["reads"])
        )
        for batch in arrivals.batches(part, records=order["records"]):
            model.load_weights(list(batch))
    return {"digests": arrivals.digests, "reads": dict(arrivals.read_ranges), "num_bytes": arrivals.num_bytes}


def _join(where: dict[str, Any], rank: int) -> None:
    address, port, num_ranks, timeout_s = (
        where["address"],
        where["port"],
        where["num_ranks"],
        where["timeout_s"],
    )
    place = {"rank": where["first_rank"] + rank, "num_ranks": num_ranks}
    _joined.arrivals.join_group(address, port, backend=where["backend"], timeout_s=timeout_s, **place)
    _joined.store = report_store(address, port, num_ranks=num_ranks, timeout_s=timeout_s)


def _write(order: dict[str, Any], report: str) -> None:
    if order["folder"] is None:
        if _joined.store is not None:
            _joined.store.set(report_key(order["number"], order["rank"]), report)
        return
    path = report_file(Path(order["folder"]), order["number"], order["rank"])
    with os.fdopen(
        os.open(path.with_suffix(".new"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w"
    ) as file:
        file.write(report)
    path.with_suffix(".new").rename(path)
