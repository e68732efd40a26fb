"""Takes the policy's weights inside the processes of an SGLang server, which calls `load` as a custom weight loader."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.rollout.engine import TensorInfo
from verl.rollout.fingerprint import digest
from verl.rollout.links import broadcast, open_group
from verl.rollout.parts import map_file, num_bytes_of, tensors_in, unpacked

# Name by which SGLang finds the loader: of `--custom-weight-loader` and of `load_format`.
LOADER = "verl.rollout.sglang_worker.load"

_logger = logging.getLogger(__name__)


@dataclass
class _Joined:
    """The group of this process, and the store in which it met, for reports to another machine."""

    group: Any = None
    store: Any = None


_joined = _Joined()


def load(model: Any, orders: Sequence[tuple[str, Tensor]]) -> None:
    """Carries out what an engine of verl asks of the model.

    An order is a JSON text in place of a tensor's name; its tensor is empty. After each one a report is written: the digests of the
    tensors that the model was given, or the error; an exception here would end the whole server, so none leaves it.

    Args:
        model: SGLang's, with `load_weights`.
        orders: one.
    """
    for text, _ in orders:
        order = json.loads(text)
        report: dict[str, Any]
        try:
            report = {"digests": _carried_out(model, order)}
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


def _carried_out(model: Any, order: dict[str, Any]) -> dict[str, int]:
    if order["via"] == "join":
        _join(order["where"], order["rank"])
        return {}
    infos = [TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in order["tensors"]]
    tensors = dict(tensors_in(Path(order["where"]["folder"])) if order["via"] == "disk" else _from_bytes(order, infos))
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    model.load_weights(list(tensors.items()))
    return digests


def _from_bytes(order: dict[str, Any], infos: Sequence[TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    content = map_file(Path(order["where"]["path"]), num_bytes_of(infos)) if order["via"] == "shm" else _received(num_bytes_of(infos))
    return ((info.name, tensor) for info, tensor in unpacked(content, infos))


def _received(num_bytes: int) -> Tensor:
    if _joined.group is None:
        raise RuntimeError("no group has been joined")
    content = torch.empty(num_bytes, dtype=torch.uint8)
    broadcast(_joined.group, content)
    return content


def _join(where: dict[str, Any], rank: int) -> None:
    address, port, num_ranks, timeout_s = where["address"], where["port"], where["num_ranks"], where["timeout_s"]
    place = {"rank": where["first_rank"] + rank, "num_ranks": num_ranks}
    _joined.group = open_group(address, port, backend="gloo", timeout_s=timeout_s, **place)
    _joined.store = report_store(address, port, num_ranks=num_ranks, timeout_s=timeout_s)


def _write(order: dict[str, Any], report: str) -> None:
    if order["folder"] is None:
        if _joined.store is not None:
            _joined.store.set(report_key(order["number"], order["rank"]), report)
        return
    path = report_file(Path(order["folder"]), order["number"], order["rank"])
    with os.fdopen(os.open(path.with_suffix(".new"), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(report)
    path.with_suffix(".new").rename(path)
