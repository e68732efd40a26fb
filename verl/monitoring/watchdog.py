"""Watches over a run: writes down what it waits for, and ends it with the reason when nothing moves any more."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from verl.monitoring import interpreter_watchdog
from verl.monitoring.stacks import all_stacks
from verl.monitoring.wait_tracker import Snapshot, StageWaits, Wait, WaitTracker, span, stall_reason
from verl.utils.process_id import ProcessId, this_process
from verl.utils.thread_interrupt import InterruptibleBlock

# In the folder of a run.
WAITS_FILE, DIAGNOSIS_FILE = "waits.json", "diagnosis.txt"
# So many times the usual between two looks: the process was stopped, or something had the interpreter.
_GAP = 10


class StalledError(RuntimeError):
    """A run in which nothing moves any more; the text says what each stage waits for and since when."""


@dataclass(frozen=True)
class Dependency:
    """Something that a run depends on, such as an engine.

    Attributes:
        name: of it, with its kind: engine b.
        state: in a word.
        cause: of its last failure.
    """

    name: str
    state: str
    cause: str = ""


@dataclass(frozen=True)
class RunSnapshot:
    """What a look at a run found, as it is in the file.

    Attributes:
        state: running, finished, failed, stalled or interrupted.
        cause: why it ended.
        process: that runs it.
        began_at: when, in seconds since 1970.
        written_at: when it was looked at.
        every_s: how often it is.
        limit_s: how long nothing may move.
        waits: of its stages.
        parts: that it depends on.
    """

    state: str
    cause: str
    process: ProcessId
    began_at: float
    written_at: float
    every_s: float
    limit_s: float
    waits: Snapshot
    parts: tuple[Dependency, ...] = ()


def last_snapshot(folder: Path) -> RunSnapshot:
    """The last look at the run in a folder.

    Raises:
        ValueError: there was none.
    """
    try:
        row = json.loads((folder / WAITS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"need the output_dir of a run, got {folder}: {error}") from error
    stages = tuple(
        StageWaits(**{**stage, "waits": tuple(Wait(**wait) for wait in stage["waits"])})
        for stage in row["waits"].pop("stages")
    )
    waits, parts = Snapshot(**row["waits"], stages=stages), tuple(Dependency(**part) for part in row["parts"])
    return RunSnapshot(**{**row, "process": ProcessId(**row["process"]), "waits": waits, "parts": parts})


class Watchdog:
    """A context around a run, with a thread that looks at its waits.

    About every second it writes `waits.json`. When a wait is over its own limit, or nothing has moved for the
    limit, it writes `diagnosis.txt` with all stacks, and the code inside gets an interrupt that leaves the
    context as `StalledError`. If that is not raised within the grace, or the code is not out of the context
    within the limit after it, the process ends with exit code 1 and the diagnosis on standard error; so it
    does when something keeps the interpreter to itself for limit and grace together.

    The code inside may be in any thread. In one that is not the main thread the interrupt comes only when it
    runs Python again. While a further Watch is open inside, in the main thread, the time of this one stands
    still.

    Args:
        waits: of the run.
        folder: of the run, where the files go.
        limit_s: how long nothing may move.
        parts: says how the parts of the run are; asked from the thread of the watch.
        grace_s: see above.
        every_s: between two looks.
    """

    def __init__(
        self,
        waits: WaitTracker,
        folder: Path,
        limit_s: float,
        *,
        parts: Callable[[], Sequence[Dependency]] = tuple,
        grace_s: float = 30.0,
        every_s: float = 1.0,
    ) -> None:
        self._waits, self._folder, self._limit_s, self._parts = waits, folder, limit_s, parts
        self._grace_s, self._every_s = grace_s, every_s
        self._process, self._began_at = this_process(), time.time()
        self._block = InterruptibleBlock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verl-watch", daemon=True)
        self._looked_s = time.monotonic()
        # Why the run is ended, since when, and since when the code inside knows.
        self._reason: str | None = None
        self._ending_s = self._told_s = 0.0

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._looked_s = time.monotonic()
        self._write("running", self._waits.snapshot())
        self._block.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__()
        self._is_over.set()
        self._thread.join(self._grace_s)  # it may hang in a file system
        interpreter_watchdog.disarm(self)
        is_stalled = self._reason is not None and isinstance(error, (Exception, KeyboardInterrupt))
        state, cause = ("stalled", self._reason or "") if is_stalled else _end_of(error)
        self._write(state, self._waits.snapshot(), cause=cause)
        if is_stalled:
            raise StalledError(f"{self._reason}; all stacks: {self._folder / DIAGNOSIS_FILE}") from error

    def _run(self) -> None:
        interpreter_watchdog.arm(self, self._limit_s + self._grace_s)
        try:
            while not self._is_over.wait(self._every_s):
                self._look()
        finally:
            interpreter_watchdog.disarm(self)

    def _look(self) -> None:
        now_s = time.monotonic()
        since_s, self._looked_s = now_s - self._looked_s, now_s
        if since_s > _GAP * self._every_s or not self._block.is_innermost:
            self._waits.exclude(since_s)
        snapshot = self._waits.snapshot()
        interpreter_watchdog.arm(self, max(self._limit_s, snapshot.allowed_s) + self._grace_s)
        reason = self._reason or stall_reason(snapshot, self._limit_s)
        self._write("stalled" if reason else "running", snapshot, cause=reason or "")
        if reason:
            self._end(reason, now_s)

    def _end(self, reason: str, now_s: float) -> None:
        """Ends the run, a little more firmly each time."""
        if self._reason is None:
            self._reason, self._ending_s = reason, now_s
            with suppress(OSError):
                (self._folder / DIAGNOSIS_FILE).write_text(self._diagnosis(), encoding="utf-8")
        self._block.end()
        if not self._block.has_ended.is_set():
            if now_s - self._ending_s > self._grace_s:
                self._die(f"could not be interrupted within {span(self._grace_s)}")
        elif not self._told_s:
            self._told_s = now_s
        elif now_s - self._told_s > self._limit_s:
            self._die(f"was interrupted, and did not come to its end within {span(self._limit_s)}")

    def _die(self, how: str) -> None:
        if sys.__stderr__ is not None:
            with suppress(OSError, ValueError):
                sys.__stderr__.write(
                    f"verl: {self._reason}\nThe run {how}, so its process ends.\n\n{all_stacks()}"
                )
                sys.__stderr__.flush()
        os._exit(1)

    def _diagnosis(self) -> str:
        parts = "\n".join(
            f"{part.name} is {part.state}{': ' if part.cause else ''}{part.cause}" for part in self._now()
        )
        told = "\n".join(str(stage) for stage in self._waits.snapshot().stages)
        return "\n\n".join(text for text in (self._reason or "", told, parts, all_stacks()) if text)

    def _now(self) -> Sequence[Dependency]:
        try:
            return self._parts()
        except Exception as error:  # the words must not cost the run what they are about
            return [Dependency("the state of the parts", f"not to be told ({type(error).__name__}: {error})")]

    def _write(self, state: str, snapshot: Snapshot, *, cause: str = "") -> None:
        parts = tuple(self._now())
        look = RunSnapshot(
            state,
            cause,
            self._process,
            self._began_at,
            time.time(),
            self._every_s,
            self._limit_s,
            snapshot,
            parts,
        )
        # A full disk must not cost the run; who reads the file sees that it is old.
        with suppress(OSError):
            fresh = self._folder / f"{WAITS_FILE}.part"
            fresh.write_text(json.dumps(asdict(look)), encoding="utf-8")
            os.replace(fresh, self._folder / WAITS_FILE)


def _end_of(error: BaseException | None) -> tuple[str, str]:
    """State and cause of a run that has ended."""
    if error is None:
        return "finished", ""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "interrupted", type(error).__name__
    return "failed", f"{type(error).__name__}: {error}"
