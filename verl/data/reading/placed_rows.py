"""Rows with their places in words, as a stream that can stop in the middle and go on there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from typing_extensions import override

from verl.config.data import DataSource
from verl.data.reading.file_readers import PlacedRow


class RowStream(ABC):
    """Rows of one source, pass after pass.

    An iteration begins behind the last row that was given out, or that the loaded state names, and ends with
    the pass; the next one then begins at the first row.

    Attributes:
        source: its settings.
        label: name of the source in messages.
        is_streamed: rows are meant to be read while the run goes on, and never all of them kept.
        position: rows of the current pass that were given out.
        passes: passes that came to their end.
        notes: sentences on how the source was understood, for the user.
    """

    def __init__(self, source: DataSource, *, is_streamed: bool | None = None) -> None:
        self.source, self.label = source, source.path
        self.is_streamed = source.streaming if is_streamed is None else is_streamed
        self.position = self.passes = 0
        self.notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Rows of a pass, malformed ones included; None: not known before they are read."""

    @abstractmethod
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        """Rows of a pass from row `start` on, counted from 0.

        Raises:
            ValueError: the source cannot be read.
        """

    def identity(self) -> dict[str, Any]:
        """Facts that differ where the rows are not those of an earlier state; JSON values."""
        return {} if self.num_rows is None else {"num_rows": self.num_rows}

    def __iter__(self) -> Iterator[PlacedRow]:
        for row in self.rows_from(self.position):
            self.position += 1
            yield row
        self.position, self.passes = 0, self.passes + 1

    def state_dict(self) -> dict[str, Any]:
        """Position, and facts of the source to check it by; JSON values."""
        return {"position": self.position, "passes": self.passes, "identity": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the position of `state`, behind the last row that was given out there.

        Raises:
            ValueError: the state is of other rows.
        """
        if state["identity"] != self.identity():
            raise ValueError(
                f"need the rows of {self.label} with which the run began: {state['identity']}, got "
                f"{self.identity()}; restore the data, or start afresh with checkpoint.resume=never"
            )
        self.position, self.passes = state["position"], state["passes"]


class ListedRows(RowStream):
    """Rows of a sequence: a list, or a data set that is indexed by row.

    Args:
        source: name of the rows, for messages.
        rows: of any values that `load_rows` understands.
    """

    def __init__(self, source: DataSource, rows: Sequence[Any]) -> None:
        super().__init__(source)
        self.rows = rows

    @property
    @override
    def num_rows(self) -> int:
        return len(self.rows)

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        for number in range(start, len(self.rows)):
            yield f"{self.label}, row {number}", self.rows[number]
