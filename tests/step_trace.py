"""The files, lines and calls of `verl/` that one training step runs through, from a trace of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.structure import MAX_HOPS, MAX_STEP_METHODS, MAX_TRACED_FILES, ROOT, Figure
from tests.training import CHARACTERS, toy_trainer
from verl.engines.hf.pretrained import make_tiny_model

STEP = "trainer/rl_trainer.py:step"
# The generator of the policy's ranks, and the contract of generation, `RolloutEngine.sample`.
GENERATE, SAMPLE = "generate", "sample"
# A file of which fewer lines run in a step is a leaf: its functions say by their names what they do.
MIN_LINES = 20


class StepTrace:
    """A recorder of lines and calls, in the threads that start while it is installed.

    Attributes:
        functions: names of the functions that were called, by file below `verl/`.
        lines: file below `verl/` -> numbers of the lines that ran.
        stack: calls on the stack from `Trainer.step` to the first `generate` in `verl/rollout`.
        path: calls from `Trainer.step` to the engine's `sample`, with those that started its task.
    """

    def __init__(self) -> None:
        self.functions: dict[str, set[str]] = {}
        self.lines: dict[str, set[int]] = {}
        self.stack: list[str] = []
        self.path: list[str] = []
        self._records = False
        # Frame of the coroutine of a task -> the calls that led to the task.
        self._creators: dict[FrameType, list[str]] = {}

    def record(self, build: Callable[[], Any], step: Callable[[Any], Any]) -> None:
        """Build a trainer, make one step to warm up, and record the second."""
        threading.settrace(self._call)
        sys.settrace(self._call)
        try:
            trainer = build()
            step(trainer)
            self._records = True
            with self._tasks_traced():
                step(trainer)
        finally:
            self._records = False
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self._creators.clear()

    def calls_to(self, frame: FrameType | None, *, through_tasks: bool) -> list[str]:
        """The calls in files of `verl/` that led to a frame, outermost first.

        Args:
            frame: of the last call.
            through_tasks: continue with the calls that made the task, which are not on the stack.
        """
        calls: list[str] = []
        while frame is not None:
            file = below_root(frame.f_code)
            # A comprehension is a part of its function.
            if file is not None and not frame.f_code.co_name.startswith("<"):
                calls.append(f"{file}:{frame.f_code.co_name}")
            if through_tasks and frame in self._creators:
                return self._creators[frame] + calls[::-1]
            frame = frame.f_back
        return calls[::-1]

    def _from_step(self, frame: FrameType, *, through_tasks: bool) -> list[str]:
        calls = self.calls_to(frame, through_tasks=through_tasks)
        if STEP not in calls:
            # In a thread without the step, the calls of the thread that makes the step come first.
            others = (self.calls_to(f, through_tasks=False) for f in sys._current_frames().values())
            calls = next((other for other in others if STEP in other), []) + calls
        return calls[calls.index(STEP) :] if STEP in calls else calls

    @contextmanager
    def _tasks_traced(self) -> Iterator[None]:
        create_task = asyncio.BaseEventLoop.create_task

        def traced(loop: Any, coroutine: Any, **options: Any) -> Any:
            inner = getattr(coroutine, "cr_frame", None)
            if inner is not None:
                self._creators[inner] = self.calls_to(sys._getframe(1), through_tasks=True)
            return create_task(loop, coroutine, **options)

        asyncio.BaseEventLoop.create_task = traced  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            asyncio.BaseEventLoop.create_task = create_task  # type: ignore[method-assign]

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        file, name = below_root(frame.f_code), frame.f_code.co_name
        if file is None:
            return None
        if self._records:
            names = self.functions.setdefault(file, set())
            if not name.startswith("<"):
                names.add(name)
            if file.startswith("rollout/") and name == GENERATE and not self.stack:
                self.stack = self._from_step(frame, through_tasks=False)
            if file.startswith("rollout/") and name == SAMPLE and not self.path:
                self.path = self._from_step(frame, through_tasks=True)
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
    main = sorted(file for file in trace.lines if len(trace.lines[file]) >= MIN_LINES)
    num_lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in main)
    methods = trace.functions[STEP.split(":")[0]]
    executed = sum(map(len, trace.lines.values()))
    return [
        Figure("hops from Trainer.step to generate", len(trace.stack), MAX_HOPS, tuple(trace.stack)),
        Figure("the same to sample, through tasks", len(trace.path), MAX_HOPS, tuple(trace.path)),
        Figure(
            "functions of rl_trainer.py in a step", len(methods), MAX_STEP_METHODS, tuple(sorted(methods))
        ),
        Figure(
            "files of a traced step", len(trace.functions), MAX_TRACED_FILES, tuple(sorted(trace.functions))
        ),
        Figure(f"files of a traced step, {MIN_LINES} lines or more", len(main), None, tuple(main)),
        Figure("lines of those files", num_lines, None, (f"{executed} run",)),
    ]
