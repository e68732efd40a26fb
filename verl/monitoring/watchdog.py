"""Supervision of a run: its waits are recorded, and it is ended with the reason when it stalls."""

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
from verl.monitoring.formatting import format_duration
from verl.monitoring.stacks import all_stacks
from verl.monitoring.wait_tracker import Snapshot, StageWaits, Wait, WaitTracker, stall_reason
from verl.utils.process_id import ProcessId, this_process
from verl.utils.thread_interrupt import InterruptibleBlock

# In the folder of a run.
WAITS_FILE, DIAGNOSIS_FILE = "waits.json", "diagnosis.txt"
# If a check comes this many periods after the last one, the process was stopped or some code held the GIL.
_MAX_MISSED_CHECKS = 10


class StalledError(RuntimeError):
    """A run that no longer progresses; the message says what each stage waits for and for how long."""


@dataclass(frozen=True)
class Dependency:
    """Something that a run depends on, such as an engine.

    Attributes:
        name: with its kind: `engine b`.
        state: one word, such as serving or failed.
        cause: of its last failure.
    """

    name: str
    state: str
    cause: str = ""

    def __str__(self) -> str:
        return f"{self.name} is {self.state}" + (f": {self.cause}" if self.cause else "")


@dataclass(frozen=True)
class RunSnapshot:
    """State of a run at one check, as `waits.json` holds it.

    Attributes:
        state: running, finished, failed, stalled or interrupted.
        cause: why it ended; empty while it runs.
        process: the process of the run.
        began_at: start of the run, in seconds since 1970.
        written_at: time of the check, in seconds since 1970.
        every_s: seconds between two checks.
        limit_s: seconds without progress after which the run counts as stalled.
        waits: of its stages.
        dependencies: what it depends on; under the key `parts` in the file.
    """

    state: str
    cause: str
    process: ProcessId
    began_at: float
    written_at: float
    every_s: float
    limit_s: float
    waits: Snapshot
    dependencies: tuple[Dependency, ...] = ()

    def to_json(self) -> str:
        """The content of `waits.json`."""
        row = asdict(self)
        row["parts"] = row.pop("dependencies")
        return json.dumps(row)

    @classmethod
    def from_json(cls, text: str) -> RunSnapshot:
        """The snapshot that `to_json` wrote."""
        row = json.loads(text)
        stages = tuple(
            StageWaits(**{**stage, "waits": tuple(Wait(**wait) for wait in stage["waits"])})
            for stage in row["waits"].pop("stages")
        )
        row["dependencies"] = tuple(Dependency(**part) for part in row.pop("parts"))
        row["process"] = ProcessId(**row["process"])
        row["waits"] = Snapshot(**row["waits"], stages=stages)
        return cls(**row)


def read_snapshot(folder: Path) -> RunSnapshot:
    """The last snapshot of the run in a folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return RunSnapshot.from_json((folder / WAITS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"need the output_dir of a run, got {folder}: {error}") from error


class Watchdog:
    """Context of a run, supervised by a thread that checks its waits.

    About every second the thread writes `waits.json`. If a wait exceeds its own limit, or nothing has
    progressed for `limit_s`, it writes `diagnosis.txt` with all stacks and interrupts the code inside, and
    the context raises `StalledError`. The process ends with exit code 1 and all stacks on standard error if
    the interrupt is not raised within `grace_s`, if the code does not leave the context within `limit_s`
    after it, or if some code holds the GIL for `limit_s + grace_s`.

    The code inside may run in any thread. In a thread other than the main one the interrupt takes effect only
    when it executes Python code again. While another watchdog is active inside this one, in the main thread,
    the time of this one stands still.

    Args:
        waits: of the run.
        folder: of the run, for the files.
        limit_s: longest time without progress.
        dependencies: returns the current state of what the run depends on; called in the watchdog's thread.
        grace_s: see above.
        every_s: seconds between two checks.
    """

    def __init__(
        self,
        waits: WaitTracker,
        folder: Path,
        limit_s: float,
        *,
        dependencies: Callable[[], Sequence[Dependency]] = tuple,
        grace_s: float = 30.0,
        every_s: float = 1.0,
    ) -> None:
        self._waits, self._folder, self._limit_s = waits, folder, limit_s
        self._dependencies = dependencies
        self._grace_s, self._every_s = grace_s, every_s
        self._process, self._began_at = this_process(), time.time()
        self._block = InterruptibleBlock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="verl-watch", daemon=True)
        self._checked_s = time.monotonic()
        self._reason: str | None = None  # why the run is stalled
        self._stalled_s = self._raised_s = 0.0  # when that was found, and when the interrupt had been raised

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._checked_s = time.monotonic()
        self._write("running", self._waits.snapshot())
        self._block.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__()
        self._is_over.set()
        # With a timeout: the thread may hang in a file system.
        self._thread.join(self._grace_s)
        interpreter_watchdog.disarm(self)
        is_stalled = self._reason is not None and isinstance(error, (Exception, KeyboardInterrupt))
        if is_stalled:
            state, cause = "stalled", self._reason or ""
        elif error is None:
            state, cause = "finished", ""
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            state, cause = "interrupted", type(error).__name__
        else:
            state, cause = "failed", f"{type(error).__name__}: {error}"
        self._write(state, self._waits.snapshot(), cause=cause)
        if is_stalled:
            raise StalledError(f"{self._reason}; all stacks: {self._folder / DIAGNOSIS_FILE}") from error

    def _watch(self) -> None:
        interpreter_watchdog.arm(self, self._limit_s + self._grace_s)
        try:
            while not self._is_over.wait(self._every_s):
                self._check()
        finally:
            interpreter_watchdog.disarm(self)

    def _check(self) -> None:
        now_s = time.monotonic()
        since_s, self._checked_s = now_s - self._checked_s, now_s
        if since_s > _MAX_MISSED_CHECKS * self._every_s or not self._block.is_innermost:
            self._waits.exclude(since_s)
        snapshot = self._waits.snapshot()
        interpreter_watchdog.arm(self, max(self._limit_s, snapshot.allowed_s) + self._grace_s)
        reason = self._reason or stall_reason(snapshot, self._limit_s)
        self._write("stalled" if reason else "running", snapshot, cause=reason or "")
        if reason is None:
            return
        if self._reason is None:
            self._reason, self._stalled_s = reason, now_s
            self._write_diagnosis()
        self._interrupt(now_s)

    def _interrupt(self, now_s: float) -> None:
        """Interrupt the code inside, at every check until it has left; end the process if it does not."""
        self._block.interrupt()
        if not self._block.is_raised.is_set():
            if now_s - self._stalled_s > self._grace_s:
                self._exit_process(f"could not be interrupted within {format_duration(self._grace_s)}")
        elif not self._raised_s:
            self._raised_s = now_s
        elif now_s - self._raised_s > self._limit_s:
            limit = format_duration(self._limit_s)
            self._exit_process(f"was interrupted, and did not come to its end within {limit}")

    def _exit_process(self, how: str) -> None:
        if sys.__stderr__ is not None:
            with suppress(OSError, ValueError):
                sys.__stderr__.write(
                    f"verl: {self._reason}\nThe run {how}, so its process ends.\n\n{all_stacks()}"
                )
                sys.__stderr__.flush()
        os._exit(1)

    def _write_diagnosis(self) -> None:
        stages = "\n".join(map(str, self._waits.snapshot().stages))
        dependencies = "\n".join(map(str, self._current_dependencies()))
        sections = (self._reason or "", stages, dependencies, all_stacks())
        with suppress(OSError):
            path = self._folder / DIAGNOSIS_FILE
            path.write_text("\n\n".join(text for text in sections if text), encoding="utf-8")

    def _current_dependencies(self) -> Sequence[Dependency]:
        try:
            return self._dependencies()
        except Exception as error:  # a failed description must not end the run that it describes
            return [Dependency("the state of the parts", f"unknown ({type(error).__name__}: {error})")]

    def _write(self, state: str, snapshot: Snapshot, *, cause: str = "") -> None:
        run = RunSnapshot(
            state=state,
            cause=cause,
            process=self._process,
            began_at=self._began_at,
            written_at=time.time(),
            every_s=self._every_s,
            limit_s=self._limit_s,
            waits=snapshot,
            dependencies=tuple(self._current_dependencies()),
        )
        # A full disk must not end the run; readers see by `written_at` that the file is old.
        with suppress(OSError):
            fresh = self._folder / f"{WAITS_FILE}.part"
            fresh.write_text(run.to_json(), encoding="utf-8")
            # Replaced in one go: readers never see half a file.
            os.replace(fresh, self._folder / WAITS_FILE)
