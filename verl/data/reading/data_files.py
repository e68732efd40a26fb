"""Files of a source: of a folder with its shards and splits, or of a glob."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from verl.data.reading.file_readers import READERS, SPLITS, form_of

Split = Literal["train", "test"]
_FORMS = f"a file that ends with {', '.join(READERS)} (or .gz behind it)"
# Files that describe a data set.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "config.json"}
# Further words for splits in names of files.
_SPLIT_WORDS = {"training": "train", "testing": "test"}
_PACKED = {".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".snappy", ".br"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[^/:]+)?")
_SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


def is_hub_name(path: str) -> bool:
    """True for OWNER/NAME or OWNER/NAME:CONFIG, a data set of the hub, unless there is such a path."""
    return bool(_HUB_NAME.fullmatch(path)) and form_of(Path(path)) not in READERS and not Path(path).exists()


def files_of(source: str, split: Split) -> list[Path]:
    """Files of a file, folder or glob in their order, or the one folder that `datasets` saved.

    Raises:
        ValueError: there are none, or they are not all of the data.
    """
    path = Path(source)
    if path.is_dir():
        return _files_of_folder(path, split)
    if not path.exists() and glob.has_magic(source):
        found = sorted((Path(p) for p in glob.glob(source, recursive=True)), key=_natural)
        files = [p for p in found if p.is_file()]
        # Only ** is meant to find folders on its way.
        left = [p for p in found if not p.exists() or ("**" not in source and p.is_dir() and _data_files(p))]
        if left and files:
            raise ValueError(
                f"need a glob of files for data.{split}, got {source!r}, which also fits {left[0]}, "
                f"{'a folder' if left[0].is_dir() else 'a link to nothing'}; write a glob that fits files "
                "alone, or ** for all folders below"
            )
        if not files:
            raise ValueError(f"need files for data.{split}, got {source!r}, which none in {Path.cwd()} fits")
    elif path.exists():
        files = [path]
    else:
        raise ValueError(_missing(source, split))
    for file in files:
        if form_of(file) not in READERS:
            raise ValueError(
                f"need {_FORMS}, a folder or a glob of such files, a folder saved by `datasets`, or "
                f"task:NAME for data.{split}, got {str(file)!r}"
            )
    return files


def _files_of_folder(folder: Path, split: Split) -> list[Path]:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return [folder]
    files = _data_files(folder)
    if not files:
        parts = [part for part in folder.iterdir() if part.is_dir() and _data_files(part)]
        chosen = [part for part in parts if part.name == split] or parts
        if len(chosen) != 1 or chosen[0].name in set(SPLITS) - {split}:
            found = f"folders {', '.join(sorted(p.name for p in parts))}" if parts else "no data files"
            raise ValueError(
                f"cannot read {folder}: need {_FORMS} in it, or `datasets.save_to_disk`, for data.{split}, "
                f"got {found}; give the path of one of its folders or files"
            )
        return _files_of_folder(chosen[0], split)
    if unread := _unread(folder, files):
        raise ValueError(f"cannot read all of {folder}: {unread}")
    words = {f: [_SPLIT_WORDS.get(w, w) for w in re.split(r"[-_.]", f.name.lower())[:-1]] for f in files}
    by_split = {name: [f for f in files if name in words[f]] for name in SPLITS}
    named = {name: of_split for name, of_split in by_split.items() if of_split}
    taken = named.get(split, []) if named else files
    forms = sorted({form_of(file) for file in taken})
    if len(forms) != 1 or (named and sum(map(len, named.values())) != len(files)):
        found = ", ".join(f.name for f in files[:6])
        raise ValueError(
            f"cannot read {folder}: need files of one form for data.{split}, all or none of them named by "
            f"their split, got {found}; give a glob, such as {str(folder / '*') + ''.join(forms[:1])!r}"
        )
    if lacking := _lacking_shard(taken):
        raise ValueError(
            f"cannot read {folder}: need all shards, but {lacking} is missing; complete them, or give a glob "
            "of those that are there"
        )
    return taken


def _data_files(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted((p for p in files if form_of(p) in READERS and p.name not in _NOT_DATA), key=_natural)


def _unread(folder: Path, files: Sequence[Path]) -> str:
    """Reason why the data files of a folder are not all of its data, or one of them twice; "" if they are."""
    stems = [f.name.removesuffix(".gz") for f in files]
    if twice := [f.name for f, stem in zip(files, stems, strict=True) if stems.count(stem) > 1]:
        return f"{' and '.join(twice[:2])} are one file, plain and with gzip; remove one of them"
    for path in sorted(folder.iterdir(), key=_natural):
        if path.name.startswith("."):
            continue
        if path.is_dir() and _data_files(path):
            below = str(folder / "**" / "*") + form_of(files[0])
            return f"there are files in {path.name}, too; give a glob of those meant, such as {below!r}"
        if path not in files and form_of(path) in READERS and not path.exists():
            return f"{path.name} is a link to nothing; fetch the file that it names"
        if path.suffix in _PACKED and form_of(path.with_suffix("")) in READERS:
            return f"{path.name} has no form that is read; need {_FORMS}; unpack it, or give a glob"
    return ""


def _lacking_shard(files: Sequence[Path]) -> str:
    """Name of a shard that is missing from its set, such as train-00001-of-00003; "" if none is."""
    names = {f.name for f in files}
    for start, number, count, end in (m.groups() for name in names if (m := _SHARD.fullmatch(name))):
        wanted = [f"{start}{i:0{len(number)}}-of-{count}{end}" for i in range(int(count) + 1)]
        # Some writers count from 1.
        wanted = wanted[1:] if wanted[-1] in names else wanted[:-1]
        if lacking := [name for name in wanted if name not in names]:
            return lacking[0]
    return ""


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key of a path: numbers in it by their value."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _missing(source: str, split: Split) -> str:
    """Message on a source that is not there."""
    path, here = Path(source), Path.cwd()
    need = f"need an existing file or folder, or task:NAME, for data.{split}, got {source!r}"
    if "://" in source:
        return (
            f"{need}, which is an address; download it and give the path of the file, or write OWNER/NAME "
            "for a data set of the hub"
        )
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"{need}, which does not exist in {here}; the nearest name is {str(path.parent / near[0])!r}"
    if "," in source:
        return f"{need}, which does not exist in {here}; write several sources as data.{split}='[A, B]'"
    return f"{need}, which does not exist in {here}"
