"""What a run waits for and why, from what its watch wrote; loads no PyTorch and asks nothing of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from verl.monitoring.wait_tracker import StageWaits, Wait, span
from verl.monitoring.watchdog import DIAGNOSIS_FILE, RunSnapshot
from verl.utils.process_id import ProcessState

# A file is old after so many looks that did not come, and no less than so many seconds: a busy machine is no
# dead one.
_MANY_LOOKS, _OLD_S = 10, 15.0
# Stages as the pipeline names them.
_TRAINING, _GENERATION, _ADMISSION, _PUBLISHING = "training", "generation", "admission", "publishing"
# States of an engine in which it answers nothing and is not about to.
_BROKEN = ("failed", "gone")


@dataclass(frozen=True)
class Diagnosis:
    """What is told of a run.

    Attributes:
        is_well: it works, or has finished.
        story: whether it lives, in a sentence.
        cause: why it is as it is, most likely.
    """

    is_well: bool
    story: str
    cause: str


@dataclass(frozen=True)
class Case:
    """A run at the moment of the question.

    Attributes:
        look: the last one of its watch.
        life: of its process.
        now: seconds since 1970.
    """

    look: RunSnapshot
    life: ProcessState
    now: float

    @property
    def age_s(self) -> float:
        """Of the look; clocks of two hosts differ a little."""
        return max(0.0, self.now - self.look.written_at)

    @property
    def is_old(self) -> bool:
        """Whether looks have not come that should have."""
        return self.age_s > max(_MANY_LOOKS * self.look.every_s, _OLD_S)

    @property
    def still_s(self) -> float:
        """How long nothing has moved, as far as is known."""
        return self.look.waits.still_s

    @property
    def allowed_s(self) -> float:
        """How long nothing may move."""
        return max(self.look.limit_s, self.look.waits.allowed_s)

    def wait(self, stage: str) -> Wait | None:
        """What a stage waits for."""
        return next(
            (found.waits[0] for found in self.look.waits.stages if found.stage == stage and found.waits), None
        )

    @property
    def broken(self) -> str:
        """Parts that do not work, with their causes."""
        told = [
            f"{part.name} is {part.state}" + (f": {part.cause}" if part.cause else "")
            for part in self.look.parts
            if part.state in _BROKEN
        ]
        return "; ".join(told)


def diagnose(look: RunSnapshot, life: ProcessState, now: float) -> Diagnosis:
    """What is the matter with a run.

    Args:
        look: the last one of its watch.
        life: of its process.
        now: seconds since 1970.
    """
    case = Case(look, life, now)
    if look.state != "running":
        return _ended(case)
    if life == "is gone":
        return _killed(case)
    if case.is_old:
        return _silent(case)
    begin = f"process {look.process.pid} on {look.process.host} works for {span(now - look.began_at)}"
    is_near = case.still_s > case.allowed_s / 2
    left = f"; nothing has moved for {span(case.still_s)}, and it ends itself in {span(max(0.0, case.allowed_s - case.still_s))}"
    return Diagnosis(not is_near, begin + (left if is_near else ""), _likely(case))


def _ended(case: Case) -> Diagnosis:
    look, ago = case.look, f"{span(case.age_s)} ago"
    if look.state == "finished":
        return Diagnosis(
            True,
            f"it has finished {ago}, after {span(look.written_at - look.began_at)}",
            "nothing is the matter",
        )
    if look.state != "stalled":
        return Diagnosis(
            False, f"it {'failed' if look.state == 'failed' else f'was {look.state}'} {ago}", look.cause
        )
    story = f"it stalled and was ended {ago}" + (
        ", and still puts its things away" if case.life == "works" and not case.is_old else ""
    )
    return Diagnosis(
        False,
        story,
        "; ".join(text for text in (case.broken, look.cause, f"all stacks are in {DIAGNOSIS_FILE}") if text),
    )


def _killed(case: Case) -> Diagnosis:
    story = f"process {case.look.process.pid} is gone without a word; it was last seen {span(case.age_s)} ago"
    cause = (
        "it was killed, by a scheduler or for want of memory (`dmesg` tells); or it ended itself since something kept the interpreter "
        f"for {span(case.allowed_s)}: then its standard error has the stacks"
    )
    return Diagnosis(False, story, cause)


def _silent(case: Case) -> Diagnosis:
    pid, host = case.look.process.pid, case.look.process.host
    story = f"process {pid} on {host} {case.life}, and has told nothing for {span(case.age_s)}"
    causes: dict[ProcessState, str] = {
        "is stopped": f"a Ctrl-Z or SIGSTOP has stopped it; `kill -CONT {pid}` lets it go on",
        "waits in the system": "a device or a file system does not answer it",
        "is on another host": f"it is gone or hangs; ask on {host}",
    }
    otherwise = (
        f"something keeps the interpreter and does not give it back, such as a regular expression without end or C code: "
        f"`py-spy dump --pid {pid}` shows what; or the folder cannot be written"
    )
    if case.life == "is on another host":
        story = f"process {pid} {case.life}, {host}, and has told nothing for {span(case.age_s)}"
    return Diagnosis(False, story, causes.get(case.life, otherwise))


def _likely(case: Case) -> str:
    """The most likely cause of what a run that works waits for: the first that is known."""
    return next(told for rule in _RULES if (told := rule(case)))


def _broken_parts(case: Case) -> str:
    if not case.broken:
        return ""
    waiting = [stage for stage in (_TRAINING, _PUBLISHING, _GENERATION) if case.wait(stage)]
    return f"{case.broken}; {f'{waiting[0]} has to wait for the others' if waiting else 'the others do its work'}"


def _publishing(case: Case) -> str:
    wait = case.wait(_PUBLISHING)
    return f"new weights wait for {wait.what}" if wait else ""


def _training_works(case: Case) -> str:
    if case.wait(_TRAINING):
        return ""
    if case.still_s > case.allowed_s / 2:
        return f"the trainer computes for long, or is stuck: `py-spy dump --pid {case.look.process.pid}` shows where"
    if case.wait(_ADMISSION):
        return "training is slower than generation, which is ahead of it as far as it may: that is as it should be"
    return "nothing is the matter: training works" + (
        ", and generation with it" if case.wait(_GENERATION) else ""
    )


def _behind_training(case: Case) -> str:
    """Training waits, so what holds it up is what has waited longest behind it."""
    others = [
        (stage.waits[0], stage)
        for stage in case.look.waits.stages
        if stage.waits and stage.stage != _TRAINING
    ]
    if not others:
        return "training waits, and nothing is known to work for it: a defect of the pipeline, or a part of it that names no waits"
    wait, stage = max(others, key=lambda other: other[0].for_s)
    if stage.stage == _GENERATION and case.still_s < case.allowed_s / 2:
        return f"generation is slower than training: {_waited(wait, stage)}; more engines would help"
    return f"{stage.stage} holds training up: {_waited(wait, stage)}"


def _waited(wait: Wait, stage: StageWaits) -> str:
    return f"it has waited {span(wait.for_s)} for {wait.what}" + (
        f", and has {stage.num_waits} such waits" if stage.num_waits > 1 else ""
    )


_RULES: tuple[Callable[[Case], str], ...] = (_broken_parts, _publishing, _training_works, _behind_training)
