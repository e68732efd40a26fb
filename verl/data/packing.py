"""Distribution of rows over minibatches, ranks and micro-batches, from their lengths; moves no data."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchPlan:
    """Row indices as minibatches[minibatch][rank][micro_batch], every row once.

    In a minibatch every rank has the same number of micro-batches, so that ranks meet in their collectives. A
    rank with fewer rows than that has empty ones at the end. This happens with fewer rows than ranks, or with
    rows so long that hardly two fit into a micro-batch.
    """

    minibatches: list[list[list[list[int]]]]

    def rows_of(self, rank: int) -> list[int]:
        """Rows of a rank, in the order in which it processes them."""
        return [row for minibatch in self.minibatches for micro in minibatch[rank] for row in micro]

    def of_rank(self, rank: int) -> BatchPlan:
        """Plan of one rank for its own rows, numbered from 0 as in `rows_of`."""
        numbers = iter(range(len(self.rows_of(rank))))
        return BatchPlan(
            [
                [[[next(numbers) for _ in micro] for micro in minibatch[rank]]]
                for minibatch in self.minibatches
            ]
        )

    def rows_of_minibatch(self, minibatch: int) -> list[int]:
        """Rows of one minibatch, of all ranks."""
        return [
            row for micro_batches in self.minibatches[minibatch] for micro in micro_batches for row in micro
        ]


def balance(
    num_tokens: Tensor,
    *,
    num_ranks: int,
    micro_batch_tokens: int,
    micro_batch_rows: int | None = None,
    num_minibatches: int = 1,
    cost: Tensor | None = None,
    group_ids: Tensor | None = None,
    prompts: tuple[Tensor, Tensor] | None = None,
) -> BatchPlan:
    """Plan that gives ranks equal work, in as few micro-batches as first-fit decreasing finds.

    A minibatch is a run of consecutive rows; the sizes of minibatches, or their numbers of groups, differ by
    at most one. Within a minibatch, the costliest row that is left goes to the rank with the least cost so
    far. So the costs of two ranks never differ by more than the costliest row (longest processing time first,
    https://doi.org/10.1137/0117039). Where this would leave a rank with fewer rows than micro-batches, a row
    goes to the rank with the fewest rows instead, and among these to the one with the least cost.

    Args:
        num_tokens: [B] int, tokens of each row.
        num_ranks: ranks that share each minibatch.
        micro_batch_tokens: most tokens of a micro-batch; a longer row gets a micro-batch of its own.
        micro_batch_rows: most rows of a micro-batch; None: only the tokens count.
        num_minibatches: optimizer updates that are made of the rows.
        cost: [B], work of each row, in any unit; None: its tokens. `compute_cost` adds the work of attention.
        group_ids: [B], equal for consecutive rows that stay in one minibatch; None: rows are on their own.
        prompts: [B] int each, id and tokens of each row's prompt, if a micro-batch computes a prompt once.

    Raises:
        ValueError: a wrong shape, count or cost, or fewer rows than minibatches.
    """
    _check_counts(
        num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens, micro_batch_rows=micro_batch_rows
    )
    work = num_tokens.double() if cost is None else cost.double()
    _check_rows(num_tokens, work)
    units = _units(len(num_tokens), group_ids)
    if not 1 <= num_minibatches <= len(units):
        kind = "row" if group_ids is None else "group"
        raise ValueError(
            f"need a {kind} for each minibatch, got {len(units)} {kind}s for {num_minibatches}; lower "
            "algorithm.minibatches"
        )
    lengths, costs = num_tokens.tolist(), work.tolist()
    known = None if prompts is None else list(zip(*(p.tolist() for p in prompts), strict=True))
    max_rows, minibatches = micro_batch_rows or len(lengths), []
    for chosen in torch.arange(len(units)).tensor_split(num_minibatches):
        rows = [row for unit in chosen.tolist() for row in units[unit]]
        for equal_counts in (False, True):
            shares = _deal(rows, costs, num_ranks, equal_counts=equal_counts)
            packed = [_pack(share, lengths, micro_batch_tokens, max_rows) for share in shares]
            if known and max(map(len, packed)) > 1:
                limits = micro_batch_tokens, max_rows
                packed = [_pack_by_prompt(share, lengths, known, limits) for share in shares]
            most = max(len(micro_batches) for micro_batches in packed)
            if min(len(share) for share in shares) >= most:
                break
        minibatches.append([_split_up_to(most, micro_batches, lengths) for micro_batches in packed])
    return BatchPlan(minibatches)


def _check_rows(num_tokens: Tensor, cost: Tensor) -> None:
    if num_tokens.ndim != 1 or num_tokens.is_floating_point() or (num_tokens < 0).any():
        raise ValueError(
            f"need the tokens of each row as [B] integers from 0, got {num_tokens.dtype} of shape "
            f"{tuple(num_tokens.shape)}"
        )
    if cost.shape != num_tokens.shape or not cost.isfinite().all() or (cost < 0).any():
        raise ValueError(f"need a finite cost from 0 for each of {len(num_tokens)} rows, got {cost}")


def _check_counts(**counts: int | None) -> None:
    if any(count is not None and count < 1 for count in counts.values()):
        given = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise ValueError(f"need at least 1 of each, got {given}")


def _units(num_rows: int, group_ids: Tensor | None) -> list[list[int]]:
    """Rows that stay in one minibatch, in order."""
    if group_ids is None:
        return [[row] for row in range(num_rows)]
    starts = [0, *((group_ids[1:] != group_ids[:-1]).nonzero().squeeze(1) + 1).tolist()] if num_rows else []
    return [list(range(start, stop)) for start, stop in zip(starts, [*starts[1:], num_rows], strict=True)]


def compute_cost(num_tokens: Tensor, hidden_dim: int) -> Tensor:
    """Work of a row in a decoder, n (1 + n / (12 h)), in units of the matrix products of one token.

    A layer takes 24 h^2 operations per token in matrix products and 4 n h in full attention, half of that
    under a causal mask (https://arxiv.org/abs/2104.04473, appendix).

    Args:
        num_tokens: [B] int, n.
        hidden_dim: width h of the model.

    Returns:
        [B] float64.
    """
    tokens = num_tokens.double()
    return tokens * (1 + tokens / (12 * hidden_dim))


def _deal(rows: list[int], costs: list[float], num_ranks: int, *, equal_counts: bool) -> list[list[int]]:
    """Rows of each rank; each, the costliest first, goes to the rank with the least cost or fewest rows."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    # The rank that is next comes first: (its cost or rows, the other of the two to break a tie, rank).
    turns: list[tuple[float, float, int]] = [(0, 0, rank) for rank in range(num_ranks)]
    for row in sorted(rows, key=lambda row: (-costs[row], row)):
        first, second, rank = turns[0]
        shares[rank].append(row)
        added = (1, costs[row]) if equal_counts else (costs[row], 1)
        heapq.heapreplace(turns, (first + added[0], second + added[1], rank))
    return shares


def _pack(rows: list[int], lengths: list[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """First-fit decreasing: each row, the longest first, into the first micro-batch with room for it."""
    micro_batches: list[list[int]] = []
    room: list[int] = []
    first, last_length = 0, -1
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        # A micro-batch that had no room for a row has none for the next of the same length.
        first, last_length = first if length == last_length else 0, length
        while first < len(room) and (length > room[first] or len(micro_batches[first]) >= max_rows):
            first += 1
        if first == len(room):
            micro_batches.append([])
            room.append(max_tokens)
        micro_batches[first].append(row)
        room[first] -= length
    return micro_batches


def _pack_by_prompt(
    rows: list[int], lengths: list[int], prompts: list[tuple[int, int]], limits: tuple[int, int]
) -> list[list[int]]:
    """Rows prompt after prompt, whose tokens count once in a micro-batch; `limits` are tokens and rows."""
    micro_batches: list[list[int]] = []
    room, present = 0, set[int]()
    for row in sorted(rows, key=lambda row: (prompts[row][0], -lengths[row], row)):
        prompt, num_shared = prompts[row]
        needed = lengths[row] - (num_shared if prompt in present else 0)
        if not micro_batches or needed > room or len(micro_batches[-1]) >= limits[1]:
            micro_batches.append([])
            room, present, needed = limits[0], set(), lengths[row]
        micro_batches[-1].append(row)
        room -= needed
        present.add(prompt)
    return micro_batches


def _split_up_to(count: int, micro_batches: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """The same rows in `count` micro-batches: the fullest is halved again and again, or empty ones follow."""
    split = list(micro_batches)
    while len(split) < count:
        several = [i for i, rows in enumerate(split) if len(rows) > 1]
        if not several:
            return split + [[] for _ in range(count - len(split))]
        i = max(several, key=lambda i: sum(lengths[row] for row in split[i]))
        # Every other row of the sorted ones, so that both halves are about as long.
        split[i : i + 1] = [split[i][::2], split[i][1::2]]
    return split
