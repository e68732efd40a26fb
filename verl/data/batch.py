"""Trajectories, and batches of them: ragged columns without padding, and their packed and padded views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.data.columns import COLUMNS, ColumnSpec
from verl.data.trajectory import Trajectory, at_turn_ends


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths end to end: values [sum(lengths), ...], lengths [B] int64."""

    values: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if self.values.shape[0] != int(self.lengths.sum()):
            raise ValueError(
                f"need one value per position, got {self.values.shape[0]} values and lengths that sum to "
                f"{int(self.lengths.sum())}"
            )

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int | float | bool]], dtype: torch.dtype) -> Ragged:
        """Join rows end to end."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return cls(torch.tensor([value for row in rows for value in row], dtype=dtype), lengths)

    def select(self, rows: Tensor) -> Ragged:
        """The given rows, in the given order."""
        lengths = self.lengths[rows]
        return Ragged(self.values[positions_of(self.lengths, rows)], lengths)

    def padded(self, fill: float = 0) -> Tensor:
        """[B, max(lengths), ...], right-padded with `fill`."""
        present = present_mask(self.lengths)
        out = self.values.new_full((*present.shape, *self.values.shape[1:]), fill)
        out[present] = self.values
        return out

    def row(self, i: int) -> Tensor:
        """Values of one row."""
        start = int(self.lengths[:i].sum())
        return self.values[start : start + int(self.lengths[i])]


class RemoteColumn(ABC):
    """A ragged column with its values in other processes: rows are selected and joined without the values.

    The values are fetched when they are read.

    Attributes:
        lengths: [B] int64.
    """

    lengths: Tensor

    @abstractmethod
    def select(self, rows: Tensor) -> RemoteColumn:
        """The given rows, in the given order."""

    @abstractmethod
    def join(self, others: Sequence[RemoteColumn]) -> RemoteColumn:
        """The own rows, then the rows of the others, in order."""

    @abstractmethod
    def fetch(self) -> Ragged:
        """The values of these rows alone."""


@dataclass(frozen=True)
class RemoteRow(Sequence[Any]):
    """One row of a remote column: its length is known, its values are fetched when they are read."""

    column: RemoteColumn
    row: int

    def __len__(self) -> int:
        return int(self.column.lengths[self.row])

    def __getitem__(self, index: Any) -> Any:
        return self.column.select(torch.tensor([self.row])).fetch().values.tolist()[index]


Column = Tensor | Ragged | RemoteColumn


def positions_of(lengths: Tensor, rows: Tensor) -> Tensor:
    """Positions of the values of the given rows [sum(lengths[rows])] int64, among all rows end to end."""
    starts, picked = lengths.cumsum(0) - lengths, lengths[rows]
    shift = starts[rows] - (picked.cumsum(0) - picked)
    return torch.arange(int(picked.sum())) + shift.repeat_interleave(picked)


def present_mask(lengths: Tensor) -> Tensor:
    """[B, max(lengths)] bool, True where a right-padded row has a value."""
    width = int(lengths.max()) if len(lengths) else 0
    return torch.arange(width, device=lengths.device) < lengths[:, None]


class Batch:
    """B rows with named columns: a tensor [B, ...] per row, or a `Ragged` over prompt or response tokens.

    `verl.data.columns.COLUMNS` says which columns there are and who writes each of them.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        sizes = {name: len(c) if isinstance(c, Tensor) else len(c.lengths) for name, c in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"need the same number of rows in every column, got {sizes}")
        self._columns: dict[str, Column] = dict(columns)
        self.num_rows = next(iter(sizes.values()))

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory]) -> Batch:
        """Columns of rewarded trajectories, a row for each of their segments.

        There are rollout logprobs only if every one of them has some.
        """
        if not trajectories:
            raise ValueError("need at least one trajectory")
        columns: dict[str, Column] = {}
        rows = [row for trajectory in trajectories for row in trajectory.rows()]
        for name, value in TRAJECTORY_COLUMNS.items():
            column = _column_of(COLUMNS[name], rows, [value(row) for row in rows])
            if column is not None:
                columns[name] = column
        return cls(columns)

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Rows of all batches, in order; the columns must be the same."""
        names = set(batches[0].names)
        if any(set(b.names) != names for b in batches):
            raise ValueError(
                f"need the same columns in every batch, got {[sorted(b.names) for b in batches]}"
            )
        joined: dict[str, Column] = {}
        for name in batches[0].names:
            columns = [batch._columns[name] for batch in batches]
            away = [column for column in columns if isinstance(column, RemoteColumn)]
            if len(away) == len(columns):
                joined[name] = away[0].join(away[1:])
            elif isinstance(columns[0], Tensor):
                joined[name] = torch.cat([batch[name] for batch in batches])
            else:
                ragged = [batch.ragged(name) for batch in batches]
                joined[name] = Ragged(
                    torch.cat([c.values for c in ragged]), torch.cat([c.lengths for c in ragged])
                )
        return Batch(joined)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64, tokens after the prompt."""
        return self._lengths("response_ids")

    @property
    def num_tokens(self) -> Tensor:
        """[B] int64, tokens of prompt and response."""
        return self._lengths("prompt_ids") + self.response_lengths

    @property
    def row_ids(self) -> Tensor:
        """[B] int64, number of each row in the step; a batch of all rows numbers them from 0."""
        return self["row_ids"] if "row_ids" in self else torch.arange(self.num_rows)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Tensor:
        """The column as a tensor: [B, ...] per row, or padded [B, T] over the response (or the prompt)."""
        column = self._column(name)
        return column.padded() if isinstance(column, Ragged) else column

    def ragged(self, name: str) -> Ragged:
        """A column over tokens, unpadded."""
        column = self._column(name)
        if not isinstance(column, Ragged):
            raise ValueError(f"column {name!r} has one value per row, not per token")
        return column

    def is_ragged(self, name: str) -> bool:
        """True if a column is over tokens."""
        return not isinstance(self._columns[name], Tensor)

    def rows(self, name: str) -> list[Sequence[Any]]:
        """The values of each row of a column over tokens; those of a remote column are fetched when read."""
        column = self._columns[name]
        if isinstance(column, RemoteColumn):
            return [RemoteRow(column, row) for row in range(self.num_rows)]
        ragged = self.ragged(name)
        return [values.tolist() for values in ragged.values.split(ragged.lengths.tolist())]

    def write(self, name: str, values: Tensor) -> None:
        """Add or replace a column: [B] per row, or [B, T, ...] over the response, without its padding."""
        if values.shape[0] != self.num_rows:
            raise ValueError(
                f"need {self.num_rows} rows for column {name!r}, got shape {tuple(values.shape)}"
            )
        if values.ndim == 1:
            self._columns[name] = values
            return
        present = present_mask(self.response_lengths)
        if values.shape[:2] != present.shape:
            raise ValueError(
                f"need shape {tuple(present.shape)} for column {name!r}, got {tuple(values.shape)}"
            )
        self._columns[name] = Ragged(values[present], self.response_lengths)

    def put(self, name: str, column: Tensor | Ragged) -> None:
        """Add or replace a column as it is."""
        self._columns[name] = column

    def update(self, other: Batch) -> None:
        """Take over the columns of a batch of the same rows, in place of those of the same names.

        Raises:
            ValueError: the numbers of rows differ.
        """
        if other.num_rows != self.num_rows:
            raise ValueError(f"need {self.num_rows} rows to take over columns, got {other.num_rows}")
        self._columns.update(other._columns)

    def keep(self, names: Collection[str]) -> Batch:
        """The same rows with the columns of these names, as far as they exist."""
        return Batch({name: column for name, column in self._columns.items() if name in names})

    def select(self, rows: Tensor | Sequence[int]) -> Batch:
        """The given rows, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return Batch(
            {
                name: c[index] if isinstance(c, Tensor) else c.select(index)
                for name, c in self._columns.items()
            }
        )

    def split(self, sizes: Sequence[int]) -> list[Batch]:
        """Consecutive batches of the given numbers of rows."""
        if sum(sizes) != self.num_rows:
            raise ValueError(f"need sizes that sum to {self.num_rows} rows, got {list(sizes)}")
        return [self.select(index) for index in torch.arange(self.num_rows).split(list(sizes))]

    def _column(self, name: str) -> Tensor | Ragged:
        if name not in self._columns:
            raise KeyError(f"no column {name!r}; there are {sorted(self._columns)}")
        column = self._columns[name]
        if isinstance(column, RemoteColumn):
            column = self._columns[name] = column.fetch()
        return column

    def _lengths(self, name: str) -> Tensor:
        """Lengths of the rows of a column over tokens, without a fetch."""
        column = self._columns.get(name)
        return column.lengths if isinstance(column, RemoteColumn) else self.ragged(name).lengths


def _column_of(spec: ColumnSpec, trajectories: Sequence[Trajectory], rows: Sequence[Any]) -> Column | None:
    """The column of these values, None for a trajectory without one; None if the column is not complete."""
    if spec.fill is not None and any(row is not None for row in rows):
        fills = [[spec.fill] * len(t.response_ids) for t in trajectories]
        rows = [fill if row is None else row for row, fill in zip(rows, fills, strict=True)]
    if any(row is None for row in rows):
        return None
    if spec.is_ragged:
        return _joined_rows(rows, spec.values.dtype)
    if len(spec.axes) > 1 and len(set(map(len, rows))) > 1:
        return None
    return torch.tensor(rows, dtype=spec.values.dtype)


def _joined_rows(rows: Sequence[Sequence[int | float]], dtype: torch.dtype) -> Ragged | RemoteColumn:
    """Rows as a column; rows that are all remote stay where they are."""
    away = [row for row in rows if isinstance(row, RemoteRow)]
    if len(away) < len(rows):
        return Ragged.from_rows(rows, dtype)
    columns = list({id(row.column): row.column for row in away}.values())
    starts = dict(
        zip(
            map(id, columns),
            torch.tensor([0, *(len(c.lengths) for c in columns)]).cumsum(0).tolist(),
            strict=False,
        )
    )
    return (
        columns[0].join(columns[1:]).select(torch.tensor([starts[id(row.column)] + row.row for row in away]))
    )


# Column -> its value for a trajectory; None: it has none.
TRAJECTORY_COLUMNS: dict[str, Callable[[Trajectory], Any]] = {
    "prompt_ids": lambda t: t.prompt_ids,
    "response_ids": lambda t: t.response_ids,
    "mask": lambda t: t.response_mask,
    "versions": lambda t: t.versions,
    "group_ids": lambda t: t.group,
    "episode_ends": lambda t: t.is_last_segment,
    "truncated": lambda t: t.truncated,
    "rewards": lambda t: t.reward,
    "rollout_logprobs": lambda t: t.rollout_logprobs,
    "turn_rewards": lambda t: at_turn_ends(t) if t.turn_rewards else None,
    "states": lambda t: t.states or None,
    "reward_weights": lambda t: [weight for weight, _ in t.parts] or None,
    "reward_parts": lambda t: [value for _, value in t.parts] or None,
    "greedy_rewards": lambda t: t.greedy_reward,
}


@dataclass(frozen=True)
class ModelInput:
    """Rows in the form that a model reads, packed (one line, no padding) or padded (one line per row).

    The last token of an answer predicts nothing and is left out. Packed rows with the same prompt share its
    tokens: they are in the line once, and are computed once.

    Attributes:
        input_ids: [1, N] packed or [B, S] padded, int64.
        position_ids: like input_ids, restarting at 0 in each row.
        lengths: tokens of each row, B of them, a shared prompt counted in each.
        packed: True for one line of all rows.
        predictors: [M] int64, flat positions whose hidden state predicts a response token, row after row.
        targets: [M] int64, those response tokens.
        response_lengths: [B] int64, M in sum.
        index: if packed rows share prompts, the place in the line of each padded position ([B * S] int64, 0
            where there is none), and the padded position of each place ([N] int64).
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    packed: bool
    predictors: Tensor
    targets: Tensor
    response_lengths: Tensor
    index: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_batch(cls, batch: Batch, *, packed: bool, device: torch.device) -> ModelInput:
        """Join prompt and response of every row."""
        prompts, responses = batch.ragged("prompt_ids"), batch.ragged("response_ids")
        if int(prompts.lengths.min()) < 1:
            raise ValueError(
                f"row {int(prompts.lengths.argmin())} has an empty prompt; a model needs at least one token "
                "before the answer"
            )
        joined = batch.num_tokens
        present = present_mask(joined)
        positions = torch.arange(present.shape[1]).expand(present.shape)
        in_prompt = positions < prompts.lengths[:, None]
        ids = torch.zeros(present.shape, dtype=torch.int64)
        ids[present & in_prompt] = prompts.values
        ids[present & ~in_prompt] = responses.values
        lengths = joined - (responses.lengths > 0).long()
        width = int(lengths.max())
        ids, positions, in_prompt = ids[:, :width], positions[:, :width], in_prompt[:, :width]
        present = present_mask(lengths)
        ids = torch.where(present, ids, 0)
        # The state at position t - 1 predicts token t.
        predicts = present & (positions >= prompts.lengths[:, None] - 1) & (responses.lengths > 0)[:, None]
        targets = responses.values.to(device)
        if not packed:
            return cls(
                input_ids=ids.to(device),
                position_ids=positions.contiguous().to(device),
                lengths=lengths.tolist(),
                packed=False,
                predictors=predicts.flatten().nonzero().squeeze(1).to(device),
                targets=targets,
                response_lengths=responses.lengths,
            )
        # Of the rows with the same prompt, the first owns its tokens in the line; the others refer to them.
        owners = first_with_same_prompt(prompts)
        own = present & (~in_prompt | (owners == torch.arange(batch.num_rows))[:, None])
        places = torch.zeros(own.shape, dtype=torch.int64)
        places[own] = torch.arange(int(own.sum()))
        places = torch.where(in_prompt & present, places[owners], places)
        index = None
        if int(own.sum()) < int(present.sum()):
            index = (places.flatten().to(device), own.flatten().nonzero().squeeze(1).to(device))
        return cls(
            input_ids=ids[own][None].to(device),
            position_ids=positions[own][None].to(device),
            lengths=lengths.tolist(),
            packed=True,
            predictors=places[predicts].to(device),
            targets=targets,
            response_lengths=responses.lengths,
            index=index,
        )


def shared_prompts(batch: Batch) -> tuple[Tensor, Tensor]:
    """[B] int64 each: a number that rows with the same prompt share, and the tokens of each prompt."""
    prompts = batch.ragged("prompt_ids")
    return first_with_same_prompt(prompts), prompts.lengths


def first_with_same_prompt(prompts: Ragged) -> Tensor:
    """[B] int64, for each row the first one with the same prompt."""
    first: dict[bytes, int] = {}
    rows = prompts.values.split(prompts.lengths.tolist())
    return torch.tensor([first.setdefault(row.numpy().tobytes(), i) for i, row in enumerate(rows)])
