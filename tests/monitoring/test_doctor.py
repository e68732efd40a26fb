"""The likely cause of what a run waits for, from one snapshot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from verl.monitoring.doctor import diagnose
from verl.monitoring.wait_tracker import Snapshot, StageWaits, Wait
from verl.monitoring.watchdog import Dependency, RunSnapshot
from verl.utils.process_id import ProcessId

NOW = 10_000.0


def snapshot(
    *stages: StageWaits, still_s: float = 5.0, parts: tuple[Dependency, ...] = (), **changes
) -> RunSnapshot:
    """A run of 1000 s that wrote its snapshot a second ago."""
    found = RunSnapshot(
        "running",
        "",
        ProcessId("node7", 42, 1),
        NOW - 1000,
        NOW - 1,
        1.0,
        1800.0,
        Snapshot(still_s, 0.0, stages),
        parts,
    )
    return replace(found, **changes)


def stage_waiting(stage: str, what: str, for_s: float, *, num: int = 1) -> StageWaits:
    return StageWaits(stage, for_s, num, (Wait(what, for_s),))


TRAINING = stage_waiting("training", "a batch", 300)
BUSY = StageWaits("training", 5.0)
FAILED = (Dependency("engine a", "serving"), Dependency("engine b", "failed", "out of memory"))

CAUSES = {
    "an engine that failed": (
        snapshot(TRAINING, dependencies=FAILED),
        "engine b is failed: out of memory; training has to wait for the others",
    ),
    "one that nobody needs": (
        snapshot(BUSY, dependencies=FAILED),
        "engine b is failed: out of memory; the others do its work",
    ),
    "publishing": (
        snapshot(stage_waiting("publishing", "engine b to take version 7", 20)),
        "new weights wait for engine b to take version 7",
    ),
    "training is slower": (
        snapshot(BUSY, stage_waiting("admission", "room for more groups", 60)),
        "training is slower than generation, which is as far ahead as it may be",
    ),
    "all work": (
        snapshot(BUSY, stage_waiting("generation", "answers of group 7", 60)),
        "nothing is wrong: training works, and generation with it",
    ),
    "training alone": (snapshot(BUSY), "nothing is wrong: training works"),
    "generation is slower": (
        snapshot(TRAINING, stage_waiting("generation", "answers of group 7", 60, num=4)),
        "generation is slower than training: it has waited 60 s for answers of group 7, "
        "and has 4 such waits; more engines would help",
    ),
    "a reward": (
        snapshot(
            TRAINING,
            stage_waiting("generation", "answers of group 7", 60),
            stage_waiting("rewards", "the function judge", 250),
        ),
        "rewards holds training up: it has waited 4 min for the function judge",
    ),
    "generation hangs": (
        snapshot(TRAINING, stage_waiting("generation", "answers of group 7", 1000), still_s=1000),
        "generation holds training up: it has waited 17 min for answers of group 7",
    ),
    "training hangs": (
        snapshot(BUSY, still_s=1000),
        "the trainer has a long computation, or is stuck: `py-spy dump --pid 42` shows where",
    ),
    "nobody works": (
        snapshot(TRAINING, still_s=1000),
        "training waits, and no other stage is known to work for it",
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_the_bottleneck_of_a_running_run_is_named(case):
    found, cause = CAUSES[case]
    diagnosis = diagnose(found, "running", NOW)
    assert diagnosis.cause.startswith(cause) and diagnosis.is_well == (found.waits.still_s < 900)
    assert diagnosis.status.startswith("process 42 on node7 has been running for 17 min")


def test_a_run_without_progress_is_told_when_it_will_end():
    diagnosis = diagnose(snapshot(TRAINING, still_s=1000), "running", NOW)
    assert diagnosis.status.endswith("; nothing has moved for 17 min, and it ends itself in 13 min")


@pytest.mark.parametrize(
    ("process", "status", "cause"),
    [
        (
            "running",
            "process 42 on node7 is running, and has written nothing for 60 s",
            "some code holds the GIL, such as C code or a regular expression",
        ),
        (
            "stopped",
            "process 42 on node7 is stopped, and has written nothing for 60 s",
            "`kill -CONT 42` continues it",
        ),
        (
            "in uninterruptible sleep",
            "process 42 on node7 is in uninterruptible sleep, and has written nothing for 60 s",
            "a device or a file system does not respond",
        ),
        (
            "on another host",
            "process 42 is on another host, node7, and has written nothing for 60 s",
            "look on node7",
        ),
        (
            "gone",
            "process 42 is gone without a final record; it was last seen 60 s ago",
            "it was killed, by a scheduler or because memory ran out",
        ),
    ],
)
def test_a_silent_run_is_diagnosed_by_the_state_of_its_process(process, status, cause):
    diagnosis = diagnose(snapshot(TRAINING, written_at=NOW - 60), process, NOW)
    assert not diagnosis.is_well and diagnosis.status.startswith(status) and cause in diagnosis.cause


@pytest.mark.parametrize(
    ("state", "process", "is_well", "status", "cause"),
    [
        ("finished", "gone", True, "finished 60 s ago, after 16 min", "nothing is wrong"),
        ("finished", "running", True, "finished 60 s ago, after 16 min", "nothing is wrong"),
        ("failed", "gone", False, "failed 60 s ago", "judge is down"),
        ("interrupted", "gone", False, "was interrupted 60 s ago", "judge is down"),
        (
            "stalled",
            "gone",
            False,
            "stalled and was ended 60 s ago",
            "engine b is failed: out of memory; judge is down; all stacks are in",
        ),
    ],
)
def test_the_end_of_a_run_is_told(state, process, is_well, status, cause):
    diagnosis = diagnose(
        snapshot(TRAINING, state=state, cause="judge is down", written_at=NOW - 60, dependencies=FAILED),
        process,
        NOW,
    )
    assert (diagnosis.is_well, diagnosis.status) == (is_well, status) and diagnosis.cause.startswith(cause)


def test_a_stalled_run_that_is_still_cleaning_up_is_recognized():
    assert (
        diagnose(snapshot(state="stalled"), "running", NOW).status
        == "stalled and was ended 1.0 s ago, and is still cleaning up"
    )
