"""Replies of judges on disk, so that no question is paid for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

# Several processes may write to the file.
_LOCK_WAIT_S = 60.0


class ReplyCache:
    """A table of responses by the hash of their question, in a SQLite file that processes may share.

    Args:
        path: of the file; it is made if there is none.

    Raises:
        ValueError: the file is no such table, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = sqlite3.connect(path, timeout=_LOCK_WAIT_S, check_same_thread=False)
            with self._table:
                self._table.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"need a file for the judge's cache, {path} cannot be used: {error}; name another in `cache`"
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The response to a question; None if there is none."""
        with self._lock, closing(self._table.cursor()) as cursor:
            row = cursor.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        found = json.loads(row[0]) if row else None
        return found if isinstance(found, dict) else None

    def put(self, key: str, response: Mapping[str, Any]) -> None:
        """Keep a response; the first one to a question stays."""
        with self._lock, self._table:
            self._table.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(response)))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._table.close()


def key_of(question: Mapping[str, Any]) -> str:
    """Hash of everything that decides the answer to a question."""
    text = json.dumps(question, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
