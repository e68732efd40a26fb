"""Process side of programs: runs a function or a command of the user, and returns its reward.

It runs in a process of `verl.agents.processes`, and imports no torch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from verl.agents.processes.object_host import loaded
from verl.rewards.execution.call_worker import Definition
from verl.utils.process_id import exit_text

# A command that writes more is ended.
MAX_OUTPUT_BYTES = 16 << 20
# Kept from the end of standard output and standard error.
_MAX_LINES, _MAX_END_BYTES = 20, 1 << 16


class SolveHost:
    """Runs `solve(task, client)`.

    Args:
        definition: of the function.
    """

    def __init__(self, definition: Definition) -> None:
        self._solve = loaded(definition)

    def run(self, task: Mapping[str, Any], variables: Mapping[str, str]) -> Any:
        """Reward of an episode, or a coroutine of it.

        Args:
            task: the row.
            variables: of the environment; the address and key of the policy are among them.
        """
        os.environ.update(variables)
        openai = importlib.import_module("openai")
        # The limit of the episode is the only one.
        options = {"base_url": variables["OPENAI_BASE_URL"], "api_key": variables["OPENAI_API_KEY"]}
        if is_async(self._solve):
            return self._run_async(task, openai.AsyncOpenAI(**options, timeout=None))
        with openai.OpenAI(**options, timeout=None) as client:
            return plain_reward(self._solve(dict(task), client))

    async def _run_async(self, task: Mapping[str, Any], client: Any) -> Any:
        async with client:
            return plain_reward(await self._solve(dict(task), client))


class CommandHost:
    """Runs a command."""

    def run(self, words: Sequence[str], variables: Mapping[str, str], folder: str) -> dict[str, Any]:
        """Last lines of its output, and a fault if it failed.

        Args:
            words: of the command.
            variables: of the environment, over those of the trainer.
            folder: that it runs in.
        """
        try:
            process = subprocess.Popen(
                words,
                cwd=folder,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            return {"lines": [], "fault": f"it cannot be started: {error}"}
        assert process.stdout is not None and process.stderr is not None
        outputs = [OutputTail(process, stream) for stream in (process.stdout, process.stderr)]
        code = process.wait()
        for output in outputs:
            output.thread.join(1.0)  # a process that it has left may hold the pipe open
        lines, fault = outputs[0].lines, ""
        if any(output.is_flooded for output in outputs):
            code = 0  # killed for it
            fault = f"it wrote more than {MAX_OUTPUT_BYTES >> 20} MiB; write less"
        elif code:
            said = "\n".join(outputs[1].lines)
            fault = f"it {exit_text(code)}; its last lines on standard error:\n{said or '(nothing)'}"
        return {"lines": lines, "fault": fault, "code": code}


class OutputTail:
    """The end of a stream of a command, read in a thread.

    Args:
        process: is killed when it writes too much.
        stream: of it.

    Attributes:
        is_flooded: it wrote too much.
        thread: that reads.
    """

    def __init__(self, process: subprocess.Popen[bytes], stream: IO[bytes]) -> None:
        self.is_flooded = False
        self._process, self._stream, self._num_bytes, self._end = process, stream, 0, b""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    @property
    def lines(self) -> list[str]:
        """The last lines that are not empty."""
        lines = [line for line in self._end.decode(errors="replace").splitlines() if line.strip()]
        return lines[-_MAX_LINES:]

    def _read(self) -> None:
        while chunk := os.read(self._stream.fileno(), 1 << 16):
            self._num_bytes += len(chunk)
            self._end = (self._end + chunk)[-_MAX_END_BYTES:]
            if self._num_bytes > MAX_OUTPUT_BYTES:
                self.is_flooded = True
                self._process.kill()
                return


def is_async(function: Any) -> bool:
    """True for a function that returns coroutines, or an object with such a `__call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def plain_reward(value: Any) -> Any:
    """A reward without types of other libraries, such as numbers of NumPy and tensors."""
    if isinstance(value, Mapping):
        return {str(name): plain_reward(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_reward(entry) for entry in value]
    return value.item() if hasattr(value, "item") else value


def reward_in(lines: Sequence[str]) -> Any:
    """Reward that the last line of JSON says: a number, or an object; None: no line does."""
    for line in reversed(lines):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, int | float | dict) and not isinstance(value, bool):
            return value
    return None
