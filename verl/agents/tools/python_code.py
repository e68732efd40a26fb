"""Built-in tool `python`: runs code of the policy in a new interpreter with limits. It is no sandbox."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 17


def python(code: str, *, cpu_s: float = 20.0, memory_mb: int = 1024) -> str:
    """Run Python code in a new interpreter and return what it prints.

    Args:
        code: The program. Nothing is kept between two calls, so print what is needed.
        cpu_s: Processor time in seconds.
        memory_mb: Memory in MB.
    """

    def limit() -> None:
        seconds = max(1, round(cpu_s))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    with tempfile.TemporaryDirectory(prefix="verl-python-") as folder:
        program, output = Path(folder, "program.py"), Path(folder, "output")
        program.write_text(code, encoding="utf-8")
        work = Path(folder, "work")
        work.mkdir()
        with output.open("wb") as file:
            # The time limit of the call kills this process and its group, and the interpreter with them.
            done = subprocess.run(
                [sys.executable, "-I", str(program)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=work,
                env={"PATH": "/usr/bin:/bin", "HOME": str(work), "OMP_NUM_THREADS": "1"},
                preexec_fn=limit,
            )
        text = printed(output).replace(f"{folder}/", "")
    return text + ending(done.returncode, text)


def printed(path: Path) -> str:
    """The output, without its middle where it is very long."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_READ_BYTES)
        if size <= 2 * _READ_BYTES:
            return (head + file.read()).decode(errors="replace")
        file.seek(size - _READ_BYTES)
        tail = file.read()
    middle = f"\n... [{size - 2 * _READ_BYTES} bytes left out] ...\n"
    return head.decode(errors="replace") + middle + tail.decode(errors="replace")


def ending(code: int, text: str) -> str:
    """The end of the program in words, if it is not an ordinary one."""
    if code == 0:
        return "" if text else "(the program printed nothing)"
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return "\n(the program was ended: it used up its processor time)"
    if code < 0:
        return f"\n(the program was ended by {signal.Signals(-code).name})"
    return "" if text else f"(the program ended with exit code {code})"


def checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `python` without `unsafe`.

    Raises:
        ValueError: the user has not said that running code is fine.
    """
    options = dict(options)
    if options.pop("unsafe", False) is not True:
        raise ValueError(
            "the tool python runs code that the policy writes, with the rights of your user and without a "
            "sandbox; where that is acceptable, such as in a container of its own, say so: "
            "agent.tools=[{name: python, unsafe: true}]; for arithmetic take calculator"
        )
    return options
