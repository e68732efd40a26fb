"""A block of code in one thread that another thread can end with an exception, also while the thread waits
for a lock.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# Nobody else has a use for it, so that a Ctrl-C stays what it is; macOS has no such signals.
_SIGNAL = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2

_lock = threading.Lock()
# Of the main thread, the innermost last.
_blocks: list[InterruptibleBlock] = []
_before: Any = None


class ThreadInterrupted(KeyboardInterrupt):
    """What ends a block; an interrupt, since `except Exception`, event loops and Ray let only those through."""


class InterruptibleBlock:
    """A context that `end`, called in another thread, leaves with `ThreadInterrupted`.

    In the main thread a signal interrupts whatever waits, be it a lock, a system call, or a library that
    looks for signals. In another thread the exception comes when it runs Python again, and not before.
    """

    def __init__(self) -> None:
        self.has_ended = threading.Event()  # the exception has been raised
        self._is_wanted = self._is_over = False
        self._thread = threading.main_thread()

    def __enter__(self) -> InterruptibleBlock:
        self._thread = threading.current_thread()
        if self._is_main:
            _enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        if self._is_main:
            _leave(self)

    @property
    def is_innermost(self) -> bool:
        """Whether no further block began inside this one, in the same thread; known of the main thread alone."""
        return not self._is_main or bool(_blocks) and _blocks[-1] is self

    def end(self) -> None:
        """Ends the block, once; to be called again as long as it has not `has_ended`, for a signal may come
        just before a wait begins.
        """
        with _lock:
            if self._is_over or self.has_ended.is_set():
                return
            self._is_wanted = True
            if self._is_main:
                signal.pthread_kill(self._ident, _SIGNAL)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._ident), ctypes.py_object(_error_of(self.has_ended.set))
                )

    def take(self) -> bool:
        """Whether the exception is to be raised now; once."""
        if not self._is_wanted or self._is_over or self.has_ended.is_set():
            return False
        self.has_ended.set()
        return True

    @property
    def _is_main(self) -> bool:
        return self._thread is threading.main_thread()

    @property
    def _ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident


def _error_of(raised: Callable[[], None]) -> type[ThreadInterrupted]:
    """An `ThreadInterrupted` that tells when it is raised: what another thread throws is made in the thread that it
    hits.
    """

    class Told(ThreadInterrupted):
        def __init__(self) -> None:
            super().__init__("the block was ended by another thread")
            raised()

    return Told


def _enter(block: InterruptibleBlock) -> None:
    global _before
    with _lock:
        if not _blocks:
            _before = signal.signal(_SIGNAL, _on_signal)
        _blocks.append(block)


def _leave(block: InterruptibleBlock) -> None:
    # Under the lock no signal is on its way: one that was sent has been taken note of, and what it asks for
    # is over.
    with _lock:
        _blocks.remove(block)
        if not _blocks:
            signal.signal(_SIGNAL, signal.SIG_DFL if _before is None else _before)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if any(block.take() for block in reversed(_blocks)):
        raise ThreadInterrupted("the block was ended by another thread")
    if callable(_before):
        _before(number, frame)
