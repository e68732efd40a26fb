"""The loader of a run: of one source or several, with or without weights, of rows and of streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from verl.config.data import DataConfig, DataSource
from verl.data.loading.loader import Loader
from verl.data.loading.mixture import ConcatenatedLoader, MixedLoader, SourceTable
from verl.data.loading.prompt_loader import PromptLoader
from verl.data.loading.prompt_store import PromptView, index_at
from verl.data.loading.stream_loader import StreamLoader
from verl.data.reading.sources import metric_names, sources_of
from verl.utils.sampling_types import Prompt

# Distance between the seeds of the orders of two sources.
_SEED_STEP = 1 << 40


def build_loader(
    rows: Sequence[Prompt],
    ends: Sequence[int],
    sources: Sequence[DataSource],
    config: DataConfig,
    *,
    seed: int,
    streams: Sequence[StreamLoader] = (),
) -> Loader:
    """The loader of the training data.

    Args:
        rows: usable rows of all sources that are no streams, in their order.
        ends: for each of these sources, the first `Prompt.index` behind it; none: all rows are of one source.
        sources: these sources, then those of the streams.
        config: `shuffle` and `curriculum` are read.
        seed: of the order.
        streams: loaders of the streams.

    Raises:
        ValueError: some sources have a weight and some have none, a source has no usable row, or the
            curriculum does not fit.
    """
    if streams and config.curriculum.name != "off":
        raise ValueError(
            f"need rows that can all be drawn for data.curriculum {config.curriculum.name}, got the stream "
            f"{streams[0].source.path}; leave streaming out, or set data.curriculum=off"
        )
    load = partial(PromptLoader, shuffle=config.shuffle, curriculum=config.curriculum)
    check_weights(sources, num_streams=len(streams))
    if len(sources) < 2:
        return streams[0] if streams else load(rows, seed=seed)
    table = SourceTable(tuple(metric_names(sources)), tuple(ends))
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return ConcatenatedLoader(load(rows, seed=seed), table)
    parts: list[list[int]] = [[] for _ in ends]
    for position in range(len(rows)):
        parts[table.number_of(index_at(rows, position))].append(position)
    loaders: list[Loader] = []
    for number, positions in enumerate(parts):
        if not positions:
            raise ValueError(
                f"need a usable row in each source with a weight, {sources[number].path} has none; correct "
                "it, raise data.max_prompt_tokens, or leave it out"
            )
        loaders.append(load(PromptView(rows, positions), seed=seed + number * _SEED_STEP))
    for number, stream in enumerate(streams, start=len(ends)):
        stream.first_index, stream.index_step = table.first_index(number), len(streams)
        loaders.append(stream)
    return MixedLoader(loaders, weights, table, seed=seed)


def check_weights(sources: Sequence[DataSource], *, num_streams: int = 0) -> None:
    """Check that all sources have a weight or none, and that streams beside others have one.

    Raises:
        ValueError: they do not.
    """
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise ValueError(
            f"need a weight for each source of data.train or for none, {without[0]} has none and others "
            "have one; give it a weight, or take the others away"
        )
    weights = [source.weight for source in sources if source.weight is not None]
    total = sum(weights)
    if weights and (total == float("inf") or min(weights) / total == 0):
        raise ValueError(
            f"need weights that a computer can compare, got {min(weights):g} and {max(weights):g}, whose sum "
            "or smallest share is beyond its numbers; take moderate weights, or leave a source out"
        )
    if without and num_streams and len(sources) > 1:
        raise ValueError(
            "need a weight for each of several sources of data.train with a stream among them, since its "
            f"rows are not counted; write {{path: {without[0]}, weight: 1, ...}}"
        )


def check_test_sources(config: DataConfig) -> None:
    """Check that sources of held-out data have no weight, which evaluation does not read.

    Raises:
        ValueError: one has.
    """
    if weighted := [source.path for source in sources_of(config.test) if source.weight is not None]:
        raise ValueError(
            f"the weight of {weighted[0]} would be ignored: evaluation takes every row of data.test; leave "
            "it out"
        )
