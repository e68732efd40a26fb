"""Columns that stay in Ray's object store on the nodes of the ranks that wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor
from typing_extensions import override

from verl.data.batch import Batch, Ragged, RemoteColumn, positions_of


@dataclass(frozen=True)
class ColumnChunk:
    """Columns that one rank keeps in the object store of its node.

    Attributes:
        columns: reference to a dict, name -> (values, lengths) as NumPy arrays.
        owner: the rank's process, with a method `read_rows`.
        node: id of its node.
    """

    columns: ray.ObjectRef
    owner: ActorHandle
    node: str


@dataclass(frozen=True)
class ObjectStoreColumn(RemoteColumn):
    """Rows of a column in the chunks of several ranks.

    Attributes:
        name: of the column.
        chunks: that have the rows.
        chunk_of: [B] int64, index of the chunk of each row.
        row_of: [B] int64, index of the row in that chunk.
        lengths: [B] int64.
    """

    name: str
    chunks: tuple[ColumnChunk, ...]
    chunk_of: Tensor
    row_of: Tensor
    lengths: Tensor

    @override
    def select(self, rows: Tensor) -> ObjectStoreColumn:
        used, numbers = self.chunk_of[rows].unique(return_inverse=True)
        chunks = tuple(self.chunks[chunk] for chunk in used.tolist())
        return ObjectStoreColumn(self.name, chunks, numbers, self.row_of[rows], self.lengths[rows])

    @override
    def join(self, others: Sequence[RemoteColumn]) -> ObjectStoreColumn:
        parts = [self, *(other for other in others if isinstance(other, ObjectStoreColumn))]
        assert len(parts) == 1 + len(others), "columns of one batch are kept by one backend"
        starts = torch.tensor([0, *(len(part.chunks) for part in parts)]).cumsum(0).tolist()
        return ObjectStoreColumn(
            self.name,
            tuple(chunk for part in parts for chunk in part.chunks),
            torch.cat([part.chunk_of + start for part, start in zip(parts, starts, strict=False)]),
            torch.cat([part.row_of for part in parts]),
            torch.cat([part.lengths for part in parts]),
        )

    @override
    def fetch(self) -> Ragged:
        if not self.chunks:
            return Ragged(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        here = ray.get_runtime_context().get_node_id()
        wanted = [self.row_of[self.chunk_of == chunk].tolist() for chunk in range(len(self.chunks))]
        # A chunk of this node is mapped in place. Another node sends these rows alone: `ray.get` of its chunk
        # would copy all columns of all rows to this node.
        values = [
            rows_of(ray.get(chunk.columns), self.name, rows)
            if chunk.node == here
            else chunk.owner.read_rows.remote([chunk.columns], self.name, rows)
            for chunk, rows in zip(self.chunks, wanted, strict=True)
        ]
        values = [ray.get(part) if isinstance(part, ray.ObjectRef) else part for part in values]
        by_chunk = self.chunk_of.argsort(stable=True)
        return Ragged(torch.cat(values), self.lengths[by_chunk]).select(by_chunk.argsort())


def rows_of(columns: dict[str, tuple[Any, Any]], name: str, rows: list[int]) -> Tensor:
    """Values of some rows of a chunk's column, end to end, copied out of the object store."""
    values, lengths = columns[name]
    # Memory of the store is read-only: the lengths are copied for PyTorch, and indexing copies the values.
    positions = positions_of(torch.from_numpy(lengths.copy()), torch.tensor(rows, dtype=torch.int64))
    return torch.from_numpy(values[positions.numpy()])


def keep_columns(result: Any, owner: ActorHandle) -> Any:
    """Result of a call with the ragged columns of its batches moved into this node's object store."""
    if isinstance(result, tuple):
        return tuple(keep_columns(part, owner) for part in result)
    if not isinstance(result, Batch):
        return result
    plain = {name: result[name] for name in result.names if not result.is_ragged(name)}
    ragged = {name: result.ragged(name) for name in result.names if result.is_ragged(name)}
    reference = ray.put(
        {name: (column.values.cpu().numpy(), column.lengths.numpy()) for name, column in ragged.items()}
    )
    chunk = ColumnChunk(reference, owner, ray.get_runtime_context().get_node_id())
    rows = torch.arange(result.num_rows)
    kept = {
        name: ObjectStoreColumn(name, (chunk,), torch.zeros_like(rows), rows, column.lengths)
        for name, column in ragged.items()
    }
    return Batch({**plain, **kept})
