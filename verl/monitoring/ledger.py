"""What became of each prompt that was sent out: every group is under way, trained on, dropped or failed, and
none twice.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from verl.config.pipeline import FailureClass
from verl.utils.jsonl import json_line, truncate_from_step

STATES: tuple[str, ...] = ("answering", "waiting")
FAILURES: tuple[str, ...] = get_args(FailureClass)
# In the folder of a run.
LEDGER_FILE = "ledger.jsonl"
_MAX_CAUSE_CHARS = 300


@dataclass
class OpenGroup:
    """A group that has not ended.

    Attributes:
        prompt: index of the prompt in its data set.
        version: of the policy when it was sent out, the last time.
        state: whether it is being answered and rewarded, or waits to be trained on.
        attempts: how often its answers were begun.
        versions: oldest and newest that sampled its tokens; none before it arrives.
        retries: failures that did not end it, by class, with the last cause of each.
        is_left: it was under way when an earlier process of the run ended; what answered it is gone.
    """

    prompt: int
    version: int
    state: Literal["answering", "waiting"] = "answering"
    attempts: int = 1
    versions: tuple[int, int] | None = None
    retries: dict[str, tuple[int, str]] = field(default_factory=dict)
    is_left: bool = False


@dataclass(frozen=True)
class LedgerCounts:
    """Groups by what became of them, since the run began.

    Attributes:
        dispatched: all that were sent out; the sum of all others but `retries` and `again`.
        answering: are being answered and rewarded.
        waiting: wait to be trained on.
        trained: were learned from.
        dropped: were given up, by reason.
        failed: could not be answered or rewarded, by class.
        retries: failures after which a group was tried again, by class.
        again: groups sent out once more under their number, since the process that had them ended.
    """

    dispatched: int = 0
    answering: int = 0
    waiting: int = 0
    trained: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)
    again: int = 0

    @property
    def accounted(self) -> int:
        """Groups whose fate is known or that are under way; all of them, if nothing is lost."""
        return (
            self.trained
            + sum(self.dropped.values())
            + sum(self.failed.values())
            + self.answering
            + self.waiting
        )


class Ledger:
    """The account of the groups of a run; safe to use from several threads.

    A group is numbered when it is sent out (`dispatch`), may be tried again (`retry`), arrives (`arrive`) and
    ends in one of three ways: `train`, `drop`, `fail`. Only open groups are kept in memory. `commit` checks
    after each step that nothing is missing and nothing twice, and appends what ended to the file.

    Args:
        path: the file; None: nothing is written. A file of an earlier run there is replaced by the first
            `commit`, and one of this run, see `load_state_dict`, loses the steps that will be done again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._open: dict[int, OpenGroup] = {}
        self._dispatched, self._trained, self._again = 0, 0, 0
        self._dropped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        # Lines of the groups that ended since the last commit, and lines of commits that are not in the file
        # yet.
        self._ended: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []
        self._committed = self._written = self._summary(0)
        self._is_ready = False  # the file ends with what was written last
        self._writing = threading.Lock()

    def dispatch(self, prompt: int, *, version: int) -> int:
        """Begins the group of a prompt (its `Prompt.index`) under a version of the policy; its number: 0, 1,
        2, ... over the whole run.
        """
        with self._lock:
            number = self._dispatched
            self._dispatched += 1
            self._open[number] = OpenGroup(prompt, version)
            return number

    def redispatch(self, number: int, *, version: int) -> None:
        """Sends a group once more that an earlier process of the run had under way, under the same number;
        see `left`.
        """
        with self._lock:
            group = self._group(number, "send again", "answering", "waiting")
            if not group.is_left:
                raise RuntimeError(
                    f"cannot send again group {number}, which this process has sent already and which is {group.state}"
                )
            self._again += 1
            group.version, group.state, group.versions, group.is_left = version, "answering", None, False
            group.attempts += 1

    def retry(self, number: int, failure: FailureClass, cause: str) -> None:
        """Notes that an attempt failed and another one begins."""
        _check_failure(failure)
        with self._lock:
            group = self._group(number, "retry", "answering")
            self._refuse_left(number, group, "retry")
            self._retries[failure] += 1
            group.attempts += 1
            group.retries[failure] = group.retries.get(failure, (0, ""))[0] + 1, _short(cause)

    def complete(self, number: int, *, versions: tuple[int, int]) -> None:
        """Notes that a group is answered and rewarded, with the oldest and the newest version that sampled
        its tokens.
        """
        oldest, newest = versions
        if oldest > newest:
            raise ValueError(f"need the oldest version, then the newest, got {versions} for group {number}")
        with self._lock:
            group = self._group(number, "take", "answering")
            self._refuse_left(number, group, "take")
            group.state, group.versions = "waiting", (oldest, newest)

    def train(self, number: int, *, step: int) -> None:
        """Ends a group that a step learns from; the number of a step is one more than the version that it
        trains.
        """
        with self._lock:
            self._end(number, self._group(number, "train on", "waiting"), "trained", step=step)
            self._trained += 1

    def drop(self, number: int, reason: str) -> None:
        """Ends a group that is given up, such as a straggler, a dead one, or one with too few answers."""
        if not reason:
            raise ValueError(f"need the reason to drop group {number}")
        with self._lock:
            self._end(number, self._group(number, "drop", "answering", "waiting"), "dropped", reason=reason)
            self._dropped[reason] += 1

    def fail(self, number: int, failure: FailureClass, cause: str) -> None:
        """Ends a group that could not be answered or rewarded."""
        _check_failure(failure)
        with self._lock:
            self._end(
                number,
                self._group(number, "fail", "answering"),
                "failed",
                reason=failure,
                cause=_short(cause),
            )
            self._failed[failure] += 1

    def counts(self) -> LedgerCounts:
        """What became of all groups so far."""
        with self._lock:
            return self._counts()

    @property
    def open_groups(self) -> dict[int, OpenGroup]:
        """A copy of the groups that have not ended, by number, in the order of their numbers."""
        with self._lock:
            return {
                number: replace(self._open[number], retries=dict(self._open[number].retries))
                for number in sorted(self._open)
            }

    @property
    def orphaned(self) -> dict[int, OpenGroup]:
        """Those of `open` that an earlier process of the run had under way and that have neither been sent
        `again` nor ended.
        """
        return {number: group for number, group in self.open_groups.items() if group.is_left}

    def commit(self, step: int) -> None:
        """Closes the account of a step: every group that was sent out is in it once; what ended goes into the
        file, in one piece.

        Raises:
            ValueError: the step is not after the last one.
            RuntimeError: a group is missing or twice, or was trained on in another step.
            OSError: the file could not be written. Nothing is lost by that: the next commit, or the state,
                has it.
        """
        with self._writing:
            with self._lock:
                if step <= self._committed["step"]:
                    raise ValueError(
                        f"need a step after {self._committed['step']}, which is the last in the ledger, got {step}"
                    )
                self._check(step)
                self._committed = self._summary(step)
                self._unwritten += [*({**line, "step": step} for line in self._ended), self._committed]
                self._ended = []
            # The groups of the next steps go on meanwhile.
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """The account as plain numbers, texts, lists and dicts, with the groups under way."""
        with self._lock:
            return {
                "committed": dict(self._committed),
                "written": dict(self._written),
                "ended": [dict(line) for line in self._ended],
                "unwritten": [dict(line) for line in self._unwritten],
                "counts": _plain(self._counts()),
                "open": {number: _plain(group) for number, group in self._open.items()},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`: groups under way are `left`, and the next commit cuts later steps out of the
        file.

        Nothing is written before that, since the folder may belong to another process until the run begins.

        Raises:
            ValueError: the state does not add up.
        """
        with self._lock:
            counts = LedgerCounts(**state["counts"])
            self._open = {int(number): _opened(group) for number, group in state["open"].items()}
            self._dispatched, self._trained, self._again = counts.dispatched, counts.trained, counts.again
            self._dropped, self._failed, self._retries = (
                Counter(counts.dropped),
                Counter(counts.failed),
                Counter(counts.retries),
            )
            self._ended, self._unwritten = (
                [dict(line) for line in state["ended"]],
                [dict(line) for line in state["unwritten"]],
            )
            self._committed, self._written = dict(state["committed"]), dict(state["written"])
            self._is_ready = False
            if counts.accounted != counts.dispatched or self._counts() != counts:
                raise ValueError(
                    f"need a ledger that accounts for all of its {counts.dispatched} groups, got {counts}"
                )

    def _group(self, number: int, act: str, *states: str) -> OpenGroup:
        """The open group of a number, if it is in one of the states."""
        group = self._open.get(number)
        if group is None or group.state not in states:
            raise RuntimeError(
                f"cannot {act} group {number}, which {f'is {group.state}' if group else self._end_of(number)}"
            )
        return group

    def _refuse_left(self, number: int, group: OpenGroup, act: str) -> None:
        if group.is_left:
            raise RuntimeError(
                f"cannot {act} group {number}, which is {group.state} since before the run was restarted; send it again first"
            )

    def _end_of(self, number: int) -> str:
        """How a group that is not open ended, for a message."""
        if not 0 <= number < self._dispatched:
            return "was never sent out"
        for line in self._ended:
            if line["group"] == number:
                return f"was {line['fate']} already"
        return f"ended in an earlier step; `verl ledger RUN --group {number}` shows how"

    def _end(
        self, number: int, group: OpenGroup, fate: str, *, reason: str | None = None, **facts: Any
    ) -> None:
        del self._open[number]
        self._ended.append(
            {
                "group": number,
                "prompt": group.prompt,
                "fate": fate,
                "step": facts.pop("step", None),
                "reason": reason,
                "attempts": group.attempts,
                "versions": list(group.versions) if group.versions else None,
                **(
                    {"retries": {failure: list(told) for failure, told in group.retries.items()}}
                    if group.retries
                    else {}
                ),
                **facts,
            }
        )

    def _counts(self) -> LedgerCounts:
        states = Counter(group.state for group in self._open.values())
        fates = dict(self._dropped), dict(self._failed), dict(self._retries)
        return LedgerCounts(
            self._dispatched, states["answering"], states["waiting"], self._trained, *fates, self._again
        )

    def _summary(self, step: int) -> dict[str, Any]:
        """The line of a step: the counts, with the numbers of the groups under way."""
        under_way = {
            f"{state}_groups": [n for n, group in self._open.items() if group.state == state]
            for state in STATES
        }
        return {"step": step, **_plain(self._counts()), **under_way}

    def _check(self, step: int) -> None:
        """Two accounts that know nothing of each other: what was there and came, and what is there and went."""
        if other := [line["group"] for line in self._ended if line["step"] not in (None, step)]:
            raise RuntimeError(
                f"need groups that step {step} was trained on, got {_listed(other)} of another step"
            )
        last, counts = self._committed, self._counts()
        came = Counter(
            [*last["answering_groups"], *last["waiting_groups"], *range(last["dispatched"], self._dispatched)]
        )
        went = Counter([*self._open, *(line["group"] for line in self._ended)])
        missing, twice = sorted((came - went).elements()), sorted((went - came).elements())
        if missing or twice or counts.accounted != counts.dispatched:
            raise RuntimeError(
                f"the ledger of step {step} does not add up: groups missing: {_listed(missing)}; twice: {_listed(twice)}; "
                f"{counts.accounted} of {counts.dispatched} accounted for. That is a defect of the pipeline, not of the run"
            )

    def _write(self) -> None:
        with self._lock:
            lines, committed = list(self._unwritten), self._committed
        if self._path is not None:
            if not self._is_ready:
                lines = [*self._make_ready(self._path), *lines]
            self._is_ready = False  # until all of it is in the file
            with self._path.open("ab") as file:
                file.write(b"".join(map(json_line, lines)))
                file.flush()
                # Before the checkpoint that counts on it.
                os.fsync(file.fileno())
            self._is_ready = True
        with self._lock:
            self._unwritten, self._written = [], committed

    def _make_ready(self, path: Path) -> list[dict[str, Any]]:
        """Lets the file end with what was written last; a line that says what that was, where it does not, as
        in another folder.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        last = truncate_from_step(path, self._written["step"] + 1)
        is_known = last is not None and json.loads(last) == self._written
        return [] if is_known or self._written["step"] == 0 else [{**self._written, "base": True}]


def _plain(record: LedgerCounts | OpenGroup) -> dict[str, Any]:
    """As lists and dicts."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()
    }


def _opened(state: Mapping[str, Any]) -> OpenGroup:
    """The group of a state, left behind by its process."""
    versions = state["versions"] and (state["versions"][0], state["versions"][1])
    retries = {failure: (num, cause) for failure, (num, cause) in state["retries"].items()}
    return OpenGroup(**{**state, "versions": versions, "retries": retries, "is_left": True})


def _check_failure(failure: str) -> None:
    if failure not in FAILURES:
        raise ValueError(f"need a class of {', '.join(FAILURES)}, got {failure!r}")


def _short(cause: str) -> str:
    """The cause on one line."""
    return " ".join(cause.split())[:_MAX_CAUSE_CHARS]


def _listed(numbers: list[int]) -> str:
    """Some numbers, for a message."""
    shown = ", ".join(map(str, numbers[:20])) or "none"
    return f"{shown} and {len(numbers) - 20} more" if len(numbers) > 20 else shown
