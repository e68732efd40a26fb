"""Diagnosis of a run from its last snapshot alone; imports no PyTorch and does not contact the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from verl.monitoring.formatting import format_duration
from verl.monitoring.wait_tracker import Wait
from verl.monitoring.watchdog import DIAGNOSIS_FILE, RunSnapshot
from verl.utils.process_id import ProcessState

# A snapshot is outdated after this many missed checks, and not before this many seconds: a busy machine may
# delay checks.
_MAX_MISSED_CHECKS, _MIN_OUTDATED_S = 10, 15.0
# Stages as the pipeline names them.
_TRAINING, _GENERATION, _ADMISSION, _PUBLISHING = "training", "generation", "admission", "publishing"
# States of an engine in which it neither answers nor is about to.
_BROKEN = ("failed", "gone")


@dataclass(frozen=True)
class Diagnosis:
    """State of a run in words.

    Attributes:
        is_well: True if it runs or has finished.
        status: one sentence on whether it runs.
        cause: the most likely reason for that status, or for what it waits for.
    """

    is_well: bool
    status: str
    cause: str


@dataclass(frozen=True)
class RunEvidence:
    """All that a diagnosis is based on.

    Attributes:
        run: the last snapshot.
        process: state of its process.
        now: seconds since 1970.
    """

    run: RunSnapshot
    process: ProcessState
    now: float

    @property
    def age_s(self) -> float:
        """Age of the snapshot; at least 0, as clocks of two hosts differ a little."""
        return max(0.0, self.now - self.run.written_at)

    @property
    def is_outdated(self) -> bool:
        """True if the run should have written newer snapshots."""
        return self.age_s > max(_MAX_MISSED_CHECKS * self.run.every_s, _MIN_OUTDATED_S)

    @property
    def still_s(self) -> float:
        """Seconds without progress, at the time of the snapshot."""
        return self.run.waits.still_s

    @property
    def allowed_s(self) -> float:
        """Seconds without progress after which the run ends itself."""
        return max(self.run.limit_s, self.run.waits.allowed_s)

    @property
    def broken_dependencies(self) -> str:
        """The dependencies that do not work, with their causes; empty without any."""
        return "; ".join(str(each) for each in self.run.dependencies if each.state in _BROKEN)

    def wait(self, stage: str) -> Wait | None:
        """The first wait of a stage, if it has one."""
        return next(
            (each.waits[0] for each in self.run.waits.stages if each.stage == stage and each.waits), None
        )


def diagnose(run: RunSnapshot, process: ProcessState, now: float) -> Diagnosis:
    """Diagnose a run.

    Args:
        run: its last snapshot.
        process: state of its process.
        now: seconds since 1970.
    """
    evidence = RunEvidence(run, process, now)
    if run.state != "running":
        return _ended(evidence)
    if process == "gone":
        return _killed(evidence)
    if evidence.is_outdated:
        return _silent(evidence)
    ran = format_duration(now - run.began_at)
    status = f"process {run.process.pid} on {run.process.host} has been running for {ran}"
    is_near_limit = evidence.still_s > evidence.allowed_s / 2
    if is_near_limit:
        still = format_duration(evidence.still_s)
        left = format_duration(max(0.0, evidence.allowed_s - evidence.still_s))
        status += f"; nothing has moved for {still}, and it ends itself in {left}"
    return Diagnosis(not is_near_limit, status, next(cause for rule in _RULES if (cause := rule(evidence))))


def _ended(evidence: RunEvidence) -> Diagnosis:
    run, ago = evidence.run, f"{format_duration(evidence.age_s)} ago"
    if run.state == "finished":
        status = f"finished {ago}, after {format_duration(run.written_at - run.began_at)}"
        return Diagnosis(True, status, "nothing is wrong")
    if run.state != "stalled":
        return Diagnosis(
            False, f"{'failed' if run.state == 'failed' else f'was {run.state}'} {ago}", run.cause
        )
    is_cleaning_up = evidence.process == "running" and not evidence.is_outdated
    status = f"stalled and was ended {ago}" + (", and is still cleaning up" if is_cleaning_up else "")
    causes = (evidence.broken_dependencies, run.cause, f"all stacks are in {DIAGNOSIS_FILE}")
    return Diagnosis(False, status, "; ".join(text for text in causes if text))


def _killed(evidence: RunEvidence) -> Diagnosis:
    pid, age = evidence.run.process.pid, format_duration(evidence.age_s)
    cause = (
        "it was killed, by a scheduler or because memory ran out (see `dmesg`); or it ended itself because "
        f"some code held the GIL for {format_duration(evidence.allowed_s)}: then its standard error has the "
        "stacks"
    )
    return Diagnosis(
        False, f"process {pid} is gone without a final record; it was last seen {age} ago", cause
    )


def _silent(evidence: RunEvidence) -> Diagnosis:
    """A run whose process exists, but writes no snapshots."""
    pid, host = evidence.run.process.pid, evidence.run.process.host
    causes: dict[ProcessState, str] = {
        "stopped": f"Ctrl-Z or SIGSTOP has stopped it; `kill -CONT {pid}` continues it",
        "in uninterruptible sleep": "a device or a file system does not respond",
        "on another host": f"it is gone or hangs; look on {host}",
    }
    otherwise = (
        "some code holds the GIL, such as C code or a regular expression with catastrophic backtracking: "
        f"`py-spy dump --pid {pid}` shows it; or the folder of the run is not writable"
    )
    is_elsewhere = evidence.process == "on another host"
    where = (
        f"{pid} is on another host, {host}," if is_elsewhere else f"{pid} on {host} is {evidence.process},"
    )
    status = f"process {where} and has written nothing for {format_duration(evidence.age_s)}"
    return Diagnosis(False, status, causes.get(evidence.process, otherwise))


def _broken_dependencies(evidence: RunEvidence) -> str:
    if not evidence.broken_dependencies:
        return ""
    waiting = [stage for stage in (_TRAINING, _PUBLISHING, _GENERATION) if evidence.wait(stage)]
    effect = f"{waiting[0]} has to wait for the others" if waiting else "the others do its work"
    return f"{evidence.broken_dependencies}; {effect}"


def _publishing(evidence: RunEvidence) -> str:
    wait = evidence.wait(_PUBLISHING)
    return f"new weights wait for {wait.what}" if wait else ""


def _training_is_busy(evidence: RunEvidence) -> str:
    if evidence.wait(_TRAINING):
        return ""
    if evidence.still_s > evidence.allowed_s / 2:
        pid = evidence.run.process.pid
        return f"the trainer has a long computation, or is stuck: `py-spy dump --pid {pid}` shows where"
    if evidence.wait(_ADMISSION):
        return "training is slower than generation, which is as far ahead as it may be: this is normal"
    return "nothing is wrong: training works" + (
        ", and generation with it" if evidence.wait(_GENERATION) else ""
    )


def _training_waits(evidence: RunEvidence) -> str:
    """Training waits, so the bottleneck is the other stage that has waited longest."""
    others = [
        (stage.waits[0], stage)
        for stage in evidence.run.waits.stages
        if stage.waits and stage.stage != _TRAINING
    ]
    if not others:
        return (
            "training waits, and no other stage is known to work for it: a defect of the pipeline, or a part "
            "of it that records no waits"
        )
    wait, stage = max(others, key=lambda other: other[0].for_s)
    waited = f"it has waited {format_duration(wait.for_s)} for {wait.what}"
    waited += f", and has {stage.num_waits} such waits" if stage.num_waits > 1 else ""
    if stage.stage == _GENERATION and evidence.still_s < evidence.allowed_s / 2:
        return f"generation is slower than training: {waited}; more engines would help"
    return f"{stage.stage} holds training up: {waited}"


# Causes of what a running run waits for, the first that applies; the last one always does.
_RULES: tuple[Callable[[RunEvidence], str], ...] = (
    _broken_dependencies,
    _publishing,
    _training_is_busy,
    _training_waits,
)
