"""Process that imports the user's module once, and forks a process for each object.

A fork takes milliseconds where a new interpreter with the user's imports takes seconds. It runs no user code
after the import, so it always answers; and it ends everything that its processes have started when the
trainer has gone, however the trainer ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl.agents.processes.object_host import host_object, loaded
from verl.rewards.execution.call_worker import (
    Definition,
    be_first_out_of_memory,
    die_with_parent,
    unpickled,
)
from verl.utils.user_code import exception_text

# An order of the trainer, and a number: of the process to be forked, or of the system's of one to be killed.
ORDER = struct.Struct("=cq")
FORK, KILL = b"f", b"k"
# Length of the pickle of (definition, further definitions, import now), which comes before the orders.
LENGTH = struct.Struct("=Q")
_PR_SET_CHILD_SUBREAPER = 36  # https://man7.org/linux/man-pages/man2/PR_SET_CHILD_SUBREAPER.2const.html


class ForkServer:
    """Forks processes for objects, and ends them.

    Args:
        trainer: connection to the trainer; it has file descriptors for the new processes.
        definition: of the objects.
        factory: makes an object; None: each process imports the definition itself.
    """

    def __init__(
        self, trainer: socket.socket, definition: Definition, factory: Callable[..., Any] | None
    ) -> None:
        self._trainer, self._definition, self._factory = trainer, definition, factory
        self._children: set[int] = set()
        self._wake_up, self._woken = os.pipe()
        os.set_blocking(self._woken, False)
        self._is_over = False

    def serve(self) -> None:
        """Follow orders until the trainer has gone; then end every process."""
        signal.set_wakeup_fd(self._woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        with suppress(OSError):  # the trainer has gone
            while not self._is_over:
                waiting: list[Any] = [self._trainer, self._wake_up]
                ready, _, _ = select.select(waiting, [], [])
                if self._wake_up in ready:
                    self._is_over = signal.SIGTERM in os.read(self._wake_up, 4096)
                    self._reap()
                if self._trainer in ready:
                    self._follow_order()
        self._end_all()

    def _follow_order(self) -> None:
        order, descriptors, _, _ = socket.recv_fds(self._trainer, ORDER.size, 2)
        if len(order) < ORDER.size:
            self._is_over = True
            return
        kind, number = ORDER.unpack(order)
        if kind == KILL:
            kill_group(number, among=self._children)
            return
        pid = os.fork()
        if pid == 0:
            self._become_host(*descriptors)
        self._children.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        self._report(forked=number, pid=pid)

    def _become_host(self, connection_fd: int, output_fd: int) -> None:
        """Turn this process, which has just been forked, into one that holds an object."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()
            die_with_parent()
            be_first_out_of_memory()
            self._trainer.close()
            os.close(self._wake_up)
            os.close(self._woken)
            for standard in (1, 2):
                os.dup2(output_fd, standard)
            os.close(output_fd)
            host_object(socket.socket(fileno=connection_fd), self._definition, self._factory)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        """Report processes that have ended; what they had started in their groups ends too."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            # Before it is waited for: until then its number is no other process's.
            kill_group(ended.si_pid, among=self._children)
            _, status = os.waitpid(ended.si_pid, 0)
            if ended.si_pid in self._children:
                self._children.discard(ended.si_pid)
                self._report(ended=ended.si_pid, code=os.waitstatus_to_exitcode(status))

    def _end_all(self) -> None:
        """Kill all processes, and those that they have started and left, until there are none."""
        for pid in self._children:
            kill_group(pid, among=self._children)
        with suppress(ChildProcessError, OSError):
            while True:
                for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
                os.waitpid(-1, 0)

    def _report(self, **fields: Any) -> None:
        self._trainer.sendall(json.dumps(fields).encode() + b"\n")


def kill_group(pid: int, *, among: set[int]) -> None:
    """Kill a process with its group, if it is a child that has not been waited for."""
    if pid not in among:
        return
    with suppress(OSError):  # it has no group of its own yet
        os.killpg(pid, signal.SIGKILL)
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def receive_start(trainer: socket.socket) -> tuple[Definition, Sequence[Definition], bool]:
    """The definition of the objects, further ones to import, and whether to import them before forks."""
    (length,) = LENGTH.unpack(trainer.recv(LENGTH.size, socket.MSG_WAITALL))
    start: tuple[Definition, Sequence[Definition], bool] = unpickled(trainer.recv(length, socket.MSG_WAITALL))
    return start


def main(trainer_fd: int) -> None:
    """Body of the process.

    Args:
        trainer_fd: of the socket to the trainer.
    """
    # A module that hangs during its import must not outlive the trainer either.
    die_with_parent(signal.SIGTERM)
    if sys.platform == "linux":
        # Processes that user code starts and leaves become children of this one, which can end them.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    trainer = socket.socket(fileno=trainer_fd)
    definition, further, imports_now = receive_start(trainer)
    factory = None
    if imports_now:
        try:
            factory = loaded(definition)
            for each in further:
                loaded(each)
        except BaseException as error:  # user code, which may raise anything
            trainer.sendall(json.dumps({"failed": exception_text(error)}).encode() + b"\n")
            os._exit(1)
    gc.collect()
    gc.freeze()  # Collections in forked processes would copy the memory that they share.
    server = ForkServer(trainer, definition, factory)
    trainer.sendall(json.dumps({"threads": threading.active_count() - 1}).encode() + b"\n")
    server.serve()
    os._exit(0)
