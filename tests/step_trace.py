"""The files, lines and calls of `verl/` that one training step runs through, from a trace of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.structure import MAX_HOPS, MAX_STEP_METHODS, MAX_TRACED_FILES, ROOT, Figure
from tests.training import CHARACTERS, toy_trainer
from verl.engines.hf.pretrained import make_tiny_model

STEP, ENGINE_CALL = ("trainer/rl_trainer.py", "step"), "generate"


class StepTrace:
    """A recorder of lines and calls, in the threads that start while it is installed.

    Attributes:
        functions: names of the functions that were called, by file below `verl/`.
        lines: file below `verl/` -> numbers of the lines that ran.
        hops: calls from `Trainer.step` down to the engine's `generate`, both included, as "file:function".
    """

    def __init__(self) -> None:
        self.functions: dict[str, set[str]] = {}
        self.lines: dict[str, set[int]] = {}
        self.hops: list[str] = []
        self._records = False

    def record(self, build: Callable[[], Any], step: Callable[[Any], Any]) -> None:
        """Build a trainer, make one step to warm up, and record the second."""
        threading.settrace(self._call)
        sys.settrace(self._call)
        try:
            trainer = build()
            step(trainer)
            self._records = True
            step(trainer)
        finally:
            self._records = False
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = below_root(frame.f_code)
        if file is None:
            return None
        if self._records:
            names = self.functions.setdefault(file, set())
            if not frame.f_code.co_name.startswith("<"):
                names.add(frame.f_code.co_name)
            if not self.hops and file.startswith("rollout/") and frame.f_code.co_name == ENGINE_CALL:
                self.hops = hops_to(frame)
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = below_root(frame.f_code)
        if self._records and event == "line" and file is not None:
            self.lines.setdefault(file, set()).add(frame.f_lineno)
        return self._line


def below_root(code: CodeType) -> str | None:
    """The file of a function of `verl/`, below that folder; None for any other function."""
    path = Path(code.co_filename)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None


def hops_to(frame: FrameType) -> list[str]:
    """The calls in files of `verl/` from the step to this frame, outermost first.

    In a thread of its own the stack begins with the thread; the stack of the thread that makes the step comes
    before it then.
    """
    stack = _stack(frame)
    if not any(is_step(hop) for hop in stack):
        others = (_stack(other) for other in sys._current_frames().values())
        stack = next((other for other in others if any(is_step(hop) for hop in other)), []) + stack
    start = next((i for i, hop in enumerate(stack) if is_step(hop)), 0)
    return [f"{file}:{name}" for file, name in stack[start:]]


def is_step(hop: tuple[str, str]) -> bool:
    """True for the call of `Trainer.step`."""
    return hop == STEP


def _stack(frame: FrameType | None) -> list[tuple[str, str]]:
    calls = []
    while frame is not None:
        file = below_root(frame.f_code)
        if file is not None:
            calls.append((file, frame.f_code.co_name))
        frame = frame.f_back
    return calls[::-1]


def traced_step(model: Path, folder: Path, recipe: str = "grpo", *overrides: str) -> StepTrace:
    """The second step of a recipe at toy size, in one process.

    Args:
        model: folder of a model that `make_tiny_model` wrote.
        folder: takes the prompts and the run.
        recipe: its name.
        overrides: settings besides.
    """
    trace = StepTrace()
    trace.record(lambda: toy_trainer(recipe, model, folder, *overrides), lambda trainer: trainer.step())
    return trace


def traced_figures(folder: Path) -> list[Figure]:
    """Figures of a step of GRPO."""
    make_tiny_model(folder / "model", hidden=32, layers=1, characters=CHARACTERS)
    trace = traced_step(folder / "model", folder)
    num_lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in trace.functions)
    methods = trace.functions[STEP[0]]
    executed = sum(map(len, trace.lines.values()))
    return [
        Figure(
            "hops from Trainer.step to the engine's generate", len(trace.hops), MAX_HOPS, tuple(trace.hops)
        ),
        Figure(
            "functions of rl_trainer.py in a step", len(methods), MAX_STEP_METHODS, tuple(sorted(methods))
        ),
        Figure(
            "files of a traced step", len(trace.functions), MAX_TRACED_FILES, tuple(sorted(trace.functions))
        ),
        Figure("lines of those files", num_lines, None, (f"{executed} run",)),
    ]
