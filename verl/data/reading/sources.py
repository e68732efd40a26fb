"""Sources that a setting names: one or several, with their names and rewards, and their rows."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from verl.config.data import DataSource
from verl.data.reading.data_files import Split, is_hub_name
from verl.data.reading.file_readers import PlacedRow
from verl.data.reading.row_stream import RowStream, open_rows
from verl.data.tasks.gym_tasks import PREFIX
from verl.data.tasks.table import TASKS

# Value of `data.train` and `data.test`, or rows in memory in their place.
SourceSetting = str | DataSource | RowStream | Sequence[str | DataSource | RowStream]


def sources_of(source: SourceSetting | None) -> tuple[DataSource, ...]:
    """Sources of a setting, which is one or several; none: no sources."""
    return tuple(one.source if isinstance(one, RowStream) else one for one in listed(source))


def streams_of(source: SourceSetting | None, split: Split) -> Iterator[RowStream]:
    """Rows of each source of a setting, each opened when it is its turn."""
    return (open_rows(one, split) for one in listed(source))


def split_streams(
    source: SourceSetting | None, split: Split
) -> tuple[list[DataSource | RowStream], list[RowStream]]:
    """Sources whose rows are all read at the start, and streams, which are read while the run goes on."""
    known: list[DataSource | RowStream] = []
    streams: list[RowStream] = []
    for one in listed(source):
        if isinstance(one, DataSource) and not one.streaming:
            known.append(one)  # opened when it is read
            continue
        stream = open_rows(one, split)
        if stream.is_streamed:
            streams.append(stream)
        else:
            known.append(stream)
    return known, streams


def listed(source: SourceSetting | None) -> list[DataSource | RowStream]:
    """Sources of a setting, each with its settings or as rows in memory."""
    if source is None:
        return []
    several = [source] if isinstance(source, str | DataSource | RowStream) else source
    return [DataSource(path=one) if isinstance(one, str) else one for one in several]


def name_of(source: DataSource) -> str:
    """Name of a source for metrics: its own, of the task, the file without its suffixes, or the folder.

    Of a data set of the hub it is OWNER/NAME, as `data_source` of verl's files has it.
    """
    if source.name is not None:
        return source.name
    if source.path.startswith("task:"):
        return source.path.removeprefix("task:")
    if is_hub_name(source.path):
        return source.path.partition(":")[0]
    path = Path(source.path)
    if glob.has_magic(path.name) and not path.exists():
        return next((p.name for p in path.parents if p.name and not glob.has_magic(p.name)), "files")
    return Path(path.stem).stem if path.suffix == ".gz" else path.stem


def metric_names(sources: Sequence[DataSource], *, taken: Collection[str] = ()) -> list[str]:
    """Names of sources in metrics, all different: a name that is taken gets a number behind it.

    Args:
        sources: any number of them.
        taken: names that are not given to a source.
    """
    names: list[str] = []
    for source in sources:
        # A slash would begin another part of the metric's name.
        plain = name = "_".join(name_of(source).replace("/", "_").split()) or "set"
        number = 1
        while name in names or name in taken:
            number += 1
            name = f"{plain}_{number}"
        names.append(name)
    return names


def reward_of_tasks(sources: Sequence[DataSource]) -> str | None:
    """Reward that suits tasks; None for none, if they differ in it, or if a source is no task."""
    rewards = {reward_of_task(one.path) for one in sources}
    return rewards.pop() if len(rewards) == 1 else None


def reward_of_task(path: str) -> str | None:
    """Reward that suits the task at a path; None if it is no task."""
    name = path.removeprefix("task:")
    if name == path:
        return None
    if name.startswith(PREFIX):
        return "reasoning_gym"
    return TASKS[name].reward if name in TASKS else None


def read_rows(source: DataSource | RowStream, split: Split) -> Iterator[PlacedRow]:
    """Rows of a source, in its order, each with its place in words; see `open_rows`."""
    yield from open_rows(source, split)
