"""Data sets of the Hugging Face hub, whole or as a stream, by the library `datasets`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from typing_extensions import override

from verl.config.data import DataSource
from verl.data.reading.data_files import Split
from verl.data.reading.dataset_rows import DatasetRows, StreamedRows, choose_part
from verl.data.reading.file_readers import PlacedRow, without_filler
from verl.data.reading.placed_rows import RowStream
from verl.utils.hub import HubAnswer, ask_hub, cached_commit

_PARQUET = "refs/convert/parquet"


class HubStream(StreamedRows):
    """Rows of a data set of the hub, which are fetched while the run goes on.

    Its state has the commit, so that a run goes on with the rows with which it began.
    """

    def __init__(self, source: DataSource, split: Split, data: Any, *, commit: str, **facts: Any) -> None:
        super().__init__(source, data, **facts)
        self.commit, self.split = commit, split
        self._first = self._inner = self.rows.state_dict()

    @override
    def identity(self) -> dict[str, Any]:
        return {"path": self.source.path, "split": self.source.split, "commit": self.commit}

    @override
    def rows_from(self, start: int) -> Iterator[PlacedRow]:
        self.rows.load_state_dict(self._inner if start else self._first)
        try:
            for number, row in enumerate(self.rows, start):
                self._inner = self.rows.state_dict()
                yield f"{self.label}, row {number}", without_filler(row)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot read {self.label}: {_cause(error)}") from error

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self._inner}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        commit = state["identity"].get("commit")
        if commit not in (None, self.commit):  # the hub has a newer one since
            at_commit = self.source.model_copy(update={"revision": commit})
            earlier = open_hub_rows(at_commit, self.split)
            assert isinstance(earlier, HubStream)
            self.rows, self.commit, self._first = earlier.rows, commit, earlier._first
        super().load_state_dict(state)
        self._inner = state["inner"]


def open_hub_rows(source: DataSource, split: Split) -> RowStream:
    """Rows of a data set of the hub; a whole one is downloaded into the cache of `datasets` first.

    Args:
        source: path, split, revision and streaming are read.
        split: for which setting.

    Raises:
        ValueError: there is no such data set, configuration, split or revision, it may not be read, or there
            is no connection and no copy in the cache.
    """
    repo, _, named = source.path.partition(":")
    config = named or None
    answer = ask_hub(repo, kind="dataset", revision=source.revision)
    if answer.is_known and answer.commit is None:
        raise ValueError(_missing(repo, source, split, answer))
    notes: tuple[str, ...] = ()
    try:
        if answer.commit is None:
            builder = _cached_builder(repo, config, source.revision)
            notes = (f"{source.path} is read from the cache, commit {builder.hash}: {answer.reason}",)
        else:
            builder = _builder(repo, config, source.revision, answer.commit)
        if not source.streaming:
            builder.download_and_prepare()
        splits = builder.as_streaming_dataset() if source.streaming else builder.as_dataset()
    except _ConfigError as error:
        raise ValueError(_config_message(source, split, config, error.names)) from error
    except Exception as error:  # of many classes: of the library, and of the readers of all forms
        if answer.commit is None:
            raise ValueError(_missing(repo, source, split, answer)) from error
        raise ValueError(_unreadable(repo, source, error, is_gated=answer.is_gated)) from error
    known = {name: info.num_examples for name, info in (builder.info.splits or {}).items()}
    data, more = choose_part(splits, source, split, lengths=known)
    notes += more
    if not source.streaming:
        return DatasetRows(source, data, notes=notes)
    num_rows = known.get(source.split or str(data.split)) if source.split in (None, *splits) else None
    return HubStream(source, split, data, commit=builder.hash, num_rows=num_rows, notes=notes)


class _ConfigError(Exception):
    """No configuration of a name, or several and none named."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def _builder(repo: str, config: str | None, revision: str | None, commit: str) -> Any:
    """The library's reader of a data set, at a commit."""
    datasets = importlib.import_module("datasets")
    try:
        builder = datasets.load_dataset_builder(repo, name=config, revision=revision)
    except ValueError:  # of a configuration, or of anything else
        names = datasets.get_dataset_config_names(repo, revision=revision)
        if config in names or (config is None and len(names) == 1):
            raise
        raise _ConfigError(names) from None
    if builder.hash != commit:  # after an error the library takes the newest copy in its cache
        raise ValueError(f"need commit {commit}, got {builder.hash} from the cache; try again")
    return builder


def _cached_builder(repo: str, config: str | None, revision: str | None) -> Any:
    """The library's reader of the copy in its cache, without asking the hub.

    The library itself would take the newest copy, whatever its revision.

    Raises:
        LookupError: there is none of this revision.
    """
    datasets = importlib.import_module("datasets")
    owner, name = repo.split("/")
    folder = (
        Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{datasets.naming.camelcase_to_snakecase(name)}"
    )
    commit = cached_commit(repo, "dataset", revision)
    found = sorted(folder.glob(f"{config or '*'}/*/{commit}")) if commit else []
    if not found:
        raise LookupError("there is no copy in the cache")
    if len(found) > 1:
        raise _ConfigError([copy.parts[-3] for copy in found])
    reader = importlib.import_module("datasets.packaged_modules.cache.cache").Cache
    config, version, commit = found[0].parts[-3:]
    return reader(repo_id=repo, dataset_name=name, config_name=config, version=version, hash=commit)


def _config_message(source: DataSource, split: Split, config: str | None, names: list[str]) -> str:
    repo = source.path.partition(":")[0]
    near = difflib.get_close_matches(config or "", names, n=1)
    example = f"data.{split}={repo}:{(near or names)[0]}"
    listed = ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")
    got = "none" if config is None else repr(config)
    return f"need a configuration of the data set {repo}, got {got}; it has {listed}; write {example}"


def _missing(repo: str, source: DataSource, split: Split, answer: HubAnswer) -> str:
    """Message on a data set that the hub does not give, or that has no copy where there is no hub."""
    need = (
        f"need the data set {repo} of the hub for data.{split} (there is no such file or folder in "
        f"{Path.cwd()})"
    )
    parent = Path(repo).parent
    names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    if near := difflib.get_close_matches(Path(repo).name, names, n=1, cutoff=0.5):
        need += f"; the nearest file is {str(parent / near[0])!r}"
    if answer.is_known:
        return f"{need}, but {answer.reason}; check the name, or log in with `hf auth login` if it is private"
    loaded = ", ".join(repr(name) for name in source.path.split(":"))
    store = f"import datasets; datasets.load_dataset({loaded}).save_to_disk('FOLDER')"
    return (
        f"{need}, but {answer.reason}, and there is no copy of this revision in the cache; store it where "
        f'there is a connection: python -c "{store}", then data.{split}=FOLDER'
    )


def _unreadable(repo: str, source: DataSource, error: Exception, *, is_gated: bool) -> str:
    """Message on a data set that is there, and cannot be read."""
    cause = _cause(error)
    message = f"cannot read the data set {source.path} of the hub {constants.ENDPOINT}: {cause}"
    if is_gated and "gated" in cause:
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        return (
            f"need access to the data set {repo}, which is gated: accept its terms at {page}, then log in "
            "with `hf auth login`, or set HF_TOKEN"
        )
    if "scripts are no longer supported" in cause:
        return f"{message}; many such sets have a copy without a script, at revision: {_PARQUET}"
    return message


def _cause(error: BaseException) -> str:
    """First line of an error, and of what caused it."""
    lines = [str(error).strip().partition("\n")[0] or type(error).__name__]
    while (error.__cause__ or error.__context__) is not None and len(lines) < 3:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
        lines.append(str(error).strip().partition("\n")[0] or type(error).__name__)
    return ": ".join(dict.fromkeys(lines))
