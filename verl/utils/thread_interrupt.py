"""Code blocks that another thread can interrupt with an exception, even while they wait for a lock."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# A signal without another use, so that Ctrl-C keeps its meaning; macOS has no real-time signals.
_SIGNAL = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2

_lock = threading.Lock()
# Blocks of the main thread, the innermost last.
_blocks: list[InterruptibleBlock] = []
# The handler of the signal before the first block began.
_previous_handler: Any = None


class ThreadInterrupted(KeyboardInterrupt):
    """The exception that leaves an interrupted block.

    It derives from KeyboardInterrupt because `except Exception`, event loops and Ray let only that through.
    """


class InterruptibleBlock:
    """A context that another thread can leave with `ThreadInterrupted`, by calling `interrupt`.

    In the main thread a signal interrupts any wait: a lock, a system call, or a library that handles signals.
    In another thread the exception is raised only when the thread executes Python code again.

    Attributes:
        is_raised: set once the exception has been raised.
    """

    def __init__(self) -> None:
        self.is_raised = threading.Event()
        self._is_requested = self._is_over = False
        self._thread = threading.main_thread()

    def __enter__(self) -> InterruptibleBlock:
        global _previous_handler
        self._thread = threading.current_thread()
        if self._is_main:
            with _lock:
                if not _blocks:
                    _previous_handler = signal.signal(_SIGNAL, _on_signal)
                _blocks.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        if not self._is_main:
            return
        # `interrupt` sends its signal under this lock, so none is on its way here: its handler has run, and
        # the request is void since this block is over.
        with _lock:
            _blocks.remove(self)
            if not _blocks:
                signal.signal(_SIGNAL, signal.SIG_DFL if _previous_handler is None else _previous_handler)

    @property
    def is_innermost(self) -> bool:
        """False if another block began inside this one; always True outside the main thread."""
        return not self._is_main or bool(_blocks) and _blocks[-1] is self

    def interrupt(self) -> None:
        """Interrupt the block.

        Call it repeatedly until `is_raised` is set: a signal may arrive just before a wait begins, which then
        does not notice it. The exception is raised once at most.
        """
        with _lock:
            if self._is_over or self.is_raised.is_set():
                return
            self._is_requested = True
            assert self._thread.ident is not None
            if self._is_main:
                signal.pthread_kill(self._thread.ident, _SIGNAL)
            else:
                error = ctypes.py_object(_error_class(self.is_raised.set))
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), error)

    def take_request(self) -> bool:
        """True, once, if the exception is to be raised now; called by the signal handler."""
        if not self._is_requested or self._is_over or self.is_raised.is_set():
            return False
        self.is_raised.set()
        return True

    @property
    def _is_main(self) -> bool:
        return self._thread is threading.main_thread()


def _error_class(on_raise: Callable[[], None]) -> type[ThreadInterrupted]:
    """A `ThreadInterrupted` that reports when it is raised.

    CPython takes a class here, and instantiates it in the interrupted thread at the moment of raising.
    """

    class ReportingInterrupt(ThreadInterrupted):
        def __init__(self) -> None:
            super().__init__("the block was interrupted by another thread")
            on_raise()

    return ReportingInterrupt


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Raise in the innermost block that is to be interrupted; else call the previous handler."""
    if any(block.take_request() for block in reversed(_blocks)):
        raise ThreadInterrupted("the block was interrupted by another thread")
    if callable(_previous_handler):
        _previous_handler(number, frame)
