"""`verl` and `python` commands that share one process with the imports done, for tests that run many of them.

The server imports PyTorch, Transformers and verl once. Each command is a fork of it, with the working folder,
environment, arguments and standard streams of its caller; so it runs as a fresh process does, less its
imports. `commands` writes programs `verl` and `python` into a folder: they send their arguments to the server
over a Unix socket and end with the exit code of the fork. Linux only: elsewhere a fork is not safe.

As a program, this file is the server (`serve`) or a command (`call`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path

# Loaded before the first command: the package, and modules that libraries load on first use.
PRELOADED = (
    "verl.cli.main",
    "verl.cli.commands",
    "verl.trainer.ppo",
    "verl.monitoring.reports",
    "verl.planner.reshard_report",
    "verl.rollout.server.app",
    "torch.utils.tensorboard",
)
STREAMS = (0, 1, 2)
_POLL_S, _START_S = 0.02, 120


@contextlib.contextmanager
def commands(folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """A folder with the programs `verl` and `python`, whose server runs as long as the context."""
    address = folder / "socket"
    for name in ("verl", "python"):
        # Without `site` and the user's environment the interpreter starts in a few milliseconds.
        text = f'#!/bin/sh\nexec "{sys.executable}" -SE "{__file__}" call "{address}" {name} "$@"\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, "serve", str(address)], env=dict(environment))
    try:
        end = time.monotonic() + _START_S
        while not address.exists():
            assert server.poll() is None and time.monotonic() < end, "the server of commands did not start"
            time.sleep(_POLL_S)
        yield folder
    finally:
        server.terminate()
        server.wait()


def call(address: str, name: str, arguments: list[str]) -> int:
    """Let the server run a command, with the standard streams of this process; returns its exit code."""
    request = {"name": name, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"\n"], STREAMS)
        connection.sendall(json.dumps(request).encode() + b"\n")
        return int(connection.makefile().readline())


def serve(address: str) -> int:
    """Fork for every command; return only in the forks, with the exit code of the command."""
    for module in PRELOADED:
        importlib.import_module(module)
    # A fork has only the thread that forks: a lock held by another thread would never be released.
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        os.rename(address + ".new", address)  # it exists as soon as it can be called
        while True:
            connection, _ = server.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            with connection:
                if os.fork() == 0:
                    server.close()
                    return supervise(connection)


def supervise(connection: socket.socket) -> int:
    """Run the command of a connection in another fork, and send its exit code."""
    _, streams, _, _ = socket.recv_fds(connection, 1, len(STREAMS))
    with connection.makefile() as lines:
        request = json.loads(lines.readline())
    command = os.fork()
    if command == 0:
        connection.close()
        for number, stream in zip(STREAMS, streams, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        return run(request)
    while (ended := os.waitpid(command, os.WNOHANG))[0] == 0:
        if select.select([connection], [], [], _POLL_S)[0]:  # the caller was killed
            os.kill(command, signal.SIGTERM)
            os.waitpid(command, 0)
            os._exit(1)
    code = os.waitstatus_to_exitcode(ended[1])
    connection.sendall(b"%d\n" % (code if code >= 0 else 128 - code))
    os._exit(0)


def run(request: Mapping[str, object]) -> int:
    """Run a command as the interpreter does, in this process."""
    name, arguments = str(request["name"]), list(request["arguments"])
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [name, *arguments]
    if name == "verl":
        del sys.path[0]
        return importlib.import_module("verl.cli.main").main()
    if arguments[0] == "-c":
        code, sys.argv = arguments[1], ["-c", *arguments[2:]]
    elif arguments[0] == "-":
        code, sys.argv = sys.stdin.read(), arguments
    else:
        code, sys.argv = Path(arguments[0]).read_text(), arguments
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), program.__dict__)
    return 0


if __name__ == "__main__":
    mode, socket_address, *rest = sys.argv[1:]
    sys.exit(serve(socket_address) if mode == "serve" else call(socket_address, rest[0], rest[1:]))
