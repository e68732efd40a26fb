"""Rows of a batch and the episodes that they belong to: an episode with several segments has several rows."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from verl.data.batch import Batch, Ragged


class EpisodeRows:
    """A batch with one row per episode, beside the one with a row per segment.

    The tokens of the segments of an episode follow each other in its row, with a masked position between two
    segments, so that their turns stay apart. So functions of rows, such as
    advantages and loss weights, count episodes: an agent that shortens its context does not weigh more.
    Without episodes of several segments, both batches are the same.

    Args:
        batch: with the segments of each episode one after the other, as `Batch.from_trajectories` makes them.
        names: columns to take along; None: all.

    Attributes:
        episodes: the batch with a row per episode. Columns of rows, and prompts, are those of the last
            segment.
        episode_of: [B] int64, row in `episodes` of each row of the batch.
    """

    def __init__(self, batch: Batch, names: Collection[str] | None = None) -> None:
        self._batch = batch
        ends = (
            batch["episode_ends"] if "episode_ends" in batch else torch.ones(batch.num_rows, dtype=torch.bool)
        )
        self.episode_of = ends.cumsum(0) - ends.long()
        self._has_segments = not bool(ends.all())
        if not self._has_segments:
            self.episodes = batch
            return
        self._last = ends.nonzero().squeeze(1)
        kept = batch if names is None else batch.keep({*names, "response_ids", "episode_ends"})
        # `select` shares no column with the batch, so that what is written here does not reach it.
        self.episodes = kept.select(self._last)
        gaps = torch.cat([torch.zeros(1, dtype=torch.int64), (~ends[:-1]).long()])
        widened = batch.response_lengths + gaps
        self._is_token = torch.ones(int(widened.sum()), dtype=torch.bool)
        self._is_token[(widened.cumsum(0) - widened)[gaps.bool()]] = False
        lengths = self.joined(widened)
        for name in kept.names:
            if kept.is_ragged(name) and name != "prompt_ids":
                values = kept.ragged(name).values
                spaced = values.new_zeros((len(self._is_token), *values.shape[1:]))
                spaced[self._is_token] = values
                self.episodes.put(name, Ragged(spaced, lengths))
        self._known = set(self.episodes.names)

    def joined(self, values: Tensor) -> Tensor:
        """Sums [E] over the rows of each episode of values [B]."""
        count = int(self.episode_of[-1]) + 1 if len(self.episode_of) else 0
        return torch.zeros(count, dtype=values.dtype).index_add(0, self.episode_of, values)

    def write_back(self) -> None:
        """Write the columns that were added to `episodes` into the batch: tokens to theirs, rows to all."""
        if not self._has_segments:
            return
        for name in self.episodes.names:
            if name in self._known and self.episodes.is_ragged(name) and name in self._batch:
                continue
            if self.episodes.is_ragged(name):
                values = self.episodes.ragged(name).values[self._is_token]
                self._batch.put(name, Ragged(values, self._batch.response_lengths))
            elif name not in self._known:
                self._batch.put(name, self.episodes[name][self.episode_of])
