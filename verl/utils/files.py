"""Files that a run leaves behind, with the permissions that the user's umask gives to new files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read as far as the umask allows it."""
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    apply_umask(path)


def apply_umask(*paths: Path) -> None:
    """Give files the permissions of a file that is newly created beside them.

    safetensors creates its files with mode 0600, whatever the umask is.
    """
    for path in paths:
        # The umask of a process cannot be read without setting it, which other threads would notice.
        probe = path.with_name(f".{path.name}.new")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        path.chmod(mode & 0o777)
