"""The likely cause of what a run waits for, from one look at it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from verl.monitoring.doctor import diagnose
from verl.monitoring.wait_tracker import Snapshot, StageWaits, Wait
from verl.monitoring.watchdog import Dependency, RunSnapshot
from verl.utils.process_id import ProcessId

NOW = 10_000.0


def look(
    *stages: StageWaits, still_s: float = 5.0, parts: tuple[Dependency, ...] = (), **changes
) -> RunSnapshot:
    """A run of 1000 s that was looked at a second ago."""
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


def waits(stage: str, what: str, for_s: float, *, num: int = 1) -> StageWaits:
    return StageWaits(stage, for_s, num, (Wait(what, for_s),))


TRAINING = waits("training", "a batch", 300)
WORKS = StageWaits("training", 5.0)
FAILED = (Dependency("engine a", "serving"), Dependency("engine b", "failed", "out of memory"))

CAUSES = {
    "an engine that failed": (
        look(TRAINING, parts=FAILED),
        "engine b is failed: out of memory; training has to wait for the others",
    ),
    "one that nobody needs": (
        look(WORKS, parts=FAILED),
        "engine b is failed: out of memory; the others do its work",
    ),
    "publishing": (
        look(waits("publishing", "engine b to take version 7", 20)),
        "new weights wait for engine b to take version 7",
    ),
    "training is slower": (
        look(WORKS, waits("admission", "room for more groups", 60)),
        "training is slower than generation, which is ahead",
    ),
    "all work": (
        look(WORKS, waits("generation", "answers of group 7", 60)),
        "nothing is the matter: training works, and generation with it",
    ),
    "training alone": (look(WORKS), "nothing is the matter: training works"),
    "generation is slower": (
        look(TRAINING, waits("generation", "answers of group 7", 60, num=4)),
        "generation is slower than training: it has waited 60 s for answers of group 7, and has 4 such waits; more engines would help",
    ),
    "a reward": (
        look(
            TRAINING,
            waits("generation", "answers of group 7", 60),
            waits("rewards", "the function judge", 250),
        ),
        "rewards holds training up: it has waited 4 min for the function judge",
    ),
    "generation hangs": (
        look(TRAINING, waits("generation", "answers of group 7", 1000), still_s=1000),
        "generation holds training up: it has waited 17 min for answers of group 7",
    ),
    "training hangs": (
        look(WORKS, still_s=1000),
        "the trainer computes for long, or is stuck: `py-spy dump --pid 42` shows where",
    ),
    "nobody works": (look(TRAINING, still_s=1000), "training waits, and nothing is known to work for it"),
}


@pytest.mark.parametrize("case", CAUSES)
def test_a_run_that_works_is_told_what_holds_it_up(case):
    found, cause = CAUSES[case]
    diagnosis = diagnose(found, "works", NOW)
    assert diagnosis.cause.startswith(cause) and diagnosis.is_well == (found.waits.still_s < 900)
    assert diagnosis.story.startswith("process 42 on node7 works for 17 min")


def test_a_run_that_stands_still_is_told_when_it_will_end():
    diagnosis = diagnose(look(TRAINING, still_s=1000), "works", NOW)
    assert diagnosis.story.endswith("; nothing has moved for 17 min, and it ends itself in 13 min")


@pytest.mark.parametrize(
    ("life", "story", "cause"),
    [
        (
            "works",
            "process 42 on node7 works, and has told nothing for 60 s",
            "something keeps the interpreter and does not give it back",
        ),
        (
            "is stopped",
            "process 42 on node7 is stopped, and has told nothing for 60 s",
            "`kill -CONT 42` lets it go on",
        ),
        (
            "waits in the system",
            "process 42 on node7 waits in the system",
            "a device or a file system does not answer it",
        ),
        (
            "is on another host",
            "process 42 is on another host, node7, and has told nothing for 60 s",
            "ask on node7",
        ),
        (
            "is gone",
            "process 42 is gone without a word; it was last seen 60 s ago",
            "it was killed, by a scheduler or for want of memory",
        ),
    ],
)
def test_a_run_that_tells_nothing_any_more_is_asked_for_its_process(life, story, cause):
    diagnosis = diagnose(look(TRAINING, written_at=NOW - 60), life, NOW)
    assert not diagnosis.is_well and diagnosis.story.startswith(story) and cause in diagnosis.cause


@pytest.mark.parametrize(
    ("state", "life", "is_well", "story", "cause"),
    [
        ("finished", "is gone", True, "it has finished 60 s ago, after 16 min", "nothing is the matter"),
        ("finished", "works", True, "it has finished 60 s ago, after 16 min", "nothing is the matter"),
        ("failed", "is gone", False, "it failed 60 s ago", "judge is down"),
        ("interrupted", "is gone", False, "it was interrupted 60 s ago", "judge is down"),
        (
            "stalled",
            "is gone",
            False,
            "it stalled and was ended 60 s ago",
            "engine b is failed: out of memory; judge is down; all stacks are in",
        ),
    ],
)
def test_a_run_that_has_ended_is_told_how(state, life, is_well, story, cause):
    diagnosis = diagnose(
        look(TRAINING, state=state, cause="judge is down", written_at=NOW - 60, parts=FAILED), life, NOW
    )
    assert (diagnosis.is_well, diagnosis.story) == (is_well, story) and diagnosis.cause.startswith(cause)


def test_a_run_that_stalled_and_still_puts_its_things_away_is_told_so():
    assert (
        diagnose(look(state="stalled"), "works", NOW).story
        == "it stalled and was ended 1.0 s ago, and still puts its things away"
    )
