"""The ledger of a run: each dispatched group is in flight, trained on, dropped or failed, and counts once."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from verl.config.pipeline import FailureClass
from verl.utils.jsonl import json_line, truncate_from_step

STATES: tuple[str, ...] = ("answering", "waiting")
FAILURES: tuple[str, ...] = get_args(FailureClass)
# In the folder of a run.
LEDGER_FILE = "ledger.jsonl"
_MAX_CAUSE_CHARS, _MAX_LISTED = 300, 20


@dataclass
class OpenGroup:
    """A group that is in flight.

    Attributes:
        prompt: index of the prompt in its data set.
        version: of the policy at the last dispatch.
        state: answering (being answered and rewarded) or waiting (complete, but not trained on yet).
        attempts: number of times that generation of its answers began.
        versions: oldest and newest policy version that sampled its tokens; None until it is complete.
        retries: failures that were retried, as class -> (number, last cause).
        is_orphaned: dispatched by an earlier process of the run, which has ended.
    """

    prompt: int
    version: int
    state: Literal["answering", "waiting"] = "answering"
    attempts: int = 1
    versions: tuple[int, int] | None = None
    retries: dict[str, tuple[int, str]] = field(default_factory=dict)
    is_orphaned: bool = False

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> OpenGroup:
        """The group of a ledger's state, orphaned since its process has ended."""
        return cls(
            prompt=state["prompt"],
            version=state["version"],
            state=state["state"],
            attempts=state["attempts"],
            versions=state["versions"] and (state["versions"][0], state["versions"][1]),
            retries={failure: (num, cause) for failure, (num, cause) in state["retries"].items()},
            is_orphaned=True,
        )


@dataclass(frozen=True)
class LedgerCounts:
    """Number of groups by fate, since the run began.

    Attributes:
        dispatched: all groups; the sum of the other counts except `retries` and `again`.
        answering: being answered and rewarded.
        waiting: complete, but not trained on yet.
        trained: used in a training step.
        dropped: given up, by reason.
        failed: could not be answered or rewarded, by class.
        retries: failures that were retried, by class.
        again: groups dispatched again under their number after a restart.
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
        """Number of groups with a fate or in flight; equal to `dispatched` if none is lost."""
        ended = self.trained + sum(self.dropped.values()) + sum(self.failed.values())
        return ended + self.answering + self.waiting


class Ledger:
    """The account of all groups of a run; thread-safe.

    A group gets its number from `dispatch`, may be retried (`retry`), is answered and rewarded (`complete`),
    and ends by `train`, `drop` or `fail`. Memory holds only groups in flight. After each step `commit` checks
    that no group is missing or counted twice, and appends the groups that ended to the file.

    Args:
        path: of the file; None: nothing is written. The first `commit` replaces the file of another run. In
            the file of the run that `load_state_dict` continues, it removes the steps after the checkpoint.

    Attributes:
        last_cause: of the newest group that failed.
    """

    def __init__(self, path: Path | None = None) -> None:
        # Reentrant: `counts` takes it also inside other methods.
        self._lock = threading.RLock()
        self.last_cause = ""
        self._open: dict[int, OpenGroup] = {}
        self._dispatched, self._trained, self._again = 0, 0, 0
        self._dropped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        # Lines of groups that ended since the last commit, and lines of commits that are not in the file yet.
        self._ended: list[dict[str, Any]] = []
        self._unwritten: list[dict[str, Any]] = []
        # Summaries of the last commit, and of the last one that is in the file.
        self._committed = self._written = self._summary(0)
        self._file = LedgerFile(path) if path else None
        self._commit_lock = threading.Lock()

    def dispatch(self, prompt: int, *, version: int) -> int:
        """Open the group of a prompt, given its `Prompt.index` and the policy's version.

        Returns:
            The number of the group: 0, 1, 2, ... over the whole run.
        """
        with self._lock:
            number = self._dispatched
            self._dispatched += 1
            self._open[number] = OpenGroup(prompt, version)
            return number

    def redispatch(self, number: int, *, version: int) -> None:
        """Dispatch an orphaned group again, under its number."""
        with self._lock:
            group = self._find(number, "redispatch", STATES)
            if not group.is_orphaned:
                raise RuntimeError(
                    f"cannot redispatch group {number}, which this process has dispatched already "
                    f"and which is {group.state}"
                )
            self._again += 1
            group.version, group.state, group.versions, group.is_orphaned = version, "answering", None, False
            group.attempts += 1

    def retry(self, number: int, failure: FailureClass, cause: str) -> None:
        """Record that an attempt failed and another one begins."""
        _check_failure(failure)
        with self._lock:
            group = self._find(number, "retry", ["answering"], refuse_orphan=True)
            self._retries[failure] += 1
            group.attempts += 1
            group.retries[failure] = group.retries.get(failure, (0, ""))[0] + 1, _one_line(cause)

    def complete(self, number: int, *, versions: tuple[int, int]) -> None:
        """Record that a group is answered and rewarded.

        Args:
            number: of the group.
            versions: the oldest and the newest policy version that sampled its tokens.
        """
        oldest, newest = versions
        if oldest > newest:
            raise ValueError(f"need the oldest version, then the newest, got {versions} for group {number}")
        with self._lock:
            group = self._find(number, "complete", ["answering"], refuse_orphan=True)
            group.state, group.versions = "waiting", (oldest, newest)

    def train(self, number: int, *, step: int) -> None:
        """End a group that a step trains on; step n trains version n - 1."""
        with self._lock:
            self._end(number, self._find(number, "train on", ["waiting"]), "trained", step=step)
            self._trained += 1

    def drop(self, number: int, reason: str) -> None:
        """End a group that is given up: a straggler, one without signal, or one with too few answers."""
        if not reason:
            raise ValueError(f"need the reason to drop group {number}")
        with self._lock:
            self._end(number, self._find(number, "drop", STATES), "dropped", reason=reason)
            self._dropped[reason] += 1

    def fail(self, number: int, failure: FailureClass, cause: str) -> None:
        """End a group that could not be answered or rewarded."""
        _check_failure(failure)
        with self._lock:
            group = self._find(number, "fail", ["answering"])
            self.last_cause = _one_line(cause)
            self._end(number, group, "failed", reason=failure, cause=self.last_cause)
            self._failed[failure] += 1

    def counts(self) -> LedgerCounts:
        """Number of groups by fate so far."""
        with self._lock:
            states = Counter(group.state for group in self._open.values())
            return LedgerCounts(
                dispatched=self._dispatched,
                answering=states["answering"],
                waiting=states["waiting"],
                trained=self._trained,
                dropped=dict(self._dropped),
                failed=dict(self._failed),
                retries=dict(self._retries),
                again=self._again,
            )

    @property
    def open_groups(self) -> dict[int, OpenGroup]:
        """A copy of the groups in flight, by number, in the order of their numbers."""
        with self._lock:
            return {
                number: replace(self._open[number], retries=dict(self._open[number].retries))
                for number in sorted(self._open)
            }

    @property
    def orphaned(self) -> dict[int, OpenGroup]:
        """Groups in flight that an earlier process of the run dispatched, until `redispatch` or their end."""
        return {number: group for number, group in self.open_groups.items() if group.is_orphaned}

    def commit(self, step: int) -> None:
        """Close the account of a step: check it, and append the groups that ended to the file, in one piece.

        Raises:
            ValueError: the step is not after the last one.
            RuntimeError: a group is missing or counted twice, or was trained on in another step.
            OSError: the file could not be written. Nothing is lost: the next commit writes the lines, and
                `state_dict` has them.
        """
        with self._commit_lock:
            with self._lock:
                if step <= self._committed["step"]:
                    raise ValueError(
                        f"need a step after {self._committed['step']}, which is the last in the ledger, "
                        f"got {step}"
                    )
                self._check(step)
                self._committed = self._summary(step)
                self._unwritten += [*({**line, "step": step} for line in self._ended), self._committed]
                self._ended = []
                lines, committed = list(self._unwritten), self._committed
            # Without `_lock`, so that groups of the next steps go on while the disk works.
            if self._file is not None:
                self._file.append(lines, after=self._written)
            with self._lock:
                self._unwritten, self._written = [], committed

    def state_dict(self) -> dict[str, Any]:
        """The account with its groups in flight, as plain numbers, texts, lists and dicts."""
        with self._lock:
            return {
                "committed": dict(self._committed),
                "written": dict(self._written),
                "ended": [dict(line) for line in self._ended],
                "unwritten": [dict(line) for line in self._unwritten],
                "counts": _plain(self.counts()),
                "open": {number: _plain(group) for number, group in self._open.items()},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`: its groups in flight become orphaned.

        The file stays as it is until the next commit, which removes later steps: until the run begins, the
        folder may belong to another process.

        Raises:
            ValueError: the state does not add up.
        """
        with self._lock:
            counts = LedgerCounts(**state["counts"])
            self._open = {int(number): OpenGroup.restore(group) for number, group in state["open"].items()}
            self._dispatched, self._trained, self._again = counts.dispatched, counts.trained, counts.again
            self._dropped, self._failed = Counter(counts.dropped), Counter(counts.failed)
            self._retries = Counter(counts.retries)
            self._ended = [dict(line) for line in state["ended"]]
            self._unwritten = [dict(line) for line in state["unwritten"]]
            self._committed, self._written = dict(state["committed"]), dict(state["written"])
            if self._file is not None:
                self._file = LedgerFile(self._file.path)
            if counts.accounted != counts.dispatched or self.counts() != counts:
                raise ValueError(
                    f"need a ledger that accounts for all of its {counts.dispatched} groups, got {counts}"
                )

    def _find(
        self, number: int, action: str, states: Sequence[str], *, refuse_orphan: bool = False
    ) -> OpenGroup:
        """The group of a number, for an action that is possible in some states only."""
        group = self._open.get(number)
        if group is None or group.state not in states:
            state = f"is {group.state}" if group else self._ending(number)
            raise RuntimeError(f"cannot {action} group {number}, which {state}")
        if refuse_orphan and group.is_orphaned:
            raise RuntimeError(
                f"cannot {action} group {number}, which is {group.state} since before the run was restarted; "
                "redispatch it first"
            )
        return group

    def _ending(self, number: int) -> str:
        """The end of a group that is not in flight, for a message."""
        if not 0 <= number < self._dispatched:
            return "was never dispatched"
        for line in self._ended:
            if line["group"] == number:
                return f"was {line['fate']} already"
        return f"ended in an earlier step; `verl ledger RUN --group {number}` shows its end"

    def _end(
        self, number: int, group: OpenGroup, fate: str, *, reason: str | None = None, **facts: Any
    ) -> None:
        """Move a group from the open ones to the lines of the next commit."""
        del self._open[number]
        line = {
            "group": number,
            "prompt": group.prompt,
            "fate": fate,
            "step": facts.pop("step", None),
            "reason": reason,
            "attempts": group.attempts,
            "versions": list(group.versions) if group.versions else None,
        }
        if group.retries:
            line["retries"] = {failure: list(retry) for failure, retry in group.retries.items()}
        self._ended.append({**line, **facts})

    def _summary(self, step: int) -> dict[str, Any]:
        """The line of a step: the counts, and the numbers of the groups in flight."""
        in_flight = {
            f"{state}_groups": [n for n, group in self._open.items() if group.state == state]
            for state in STATES
        }
        return {"step": step, **_plain(self.counts()), **in_flight}

    def _check(self, step: int) -> None:
        """Compare two independent accounts: groups that were there or came, and that are there or went."""
        if other := [line["group"] for line in self._ended if line["step"] not in (None, step)]:
            raise RuntimeError(
                f"need groups that step {step} was trained on, got {_listed(other)} of another step"
            )
        last, counts = self._committed, self.counts()
        came = Counter(
            [*last["answering_groups"], *last["waiting_groups"], *range(last["dispatched"], self._dispatched)]
        )
        went = Counter([*self._open, *(line["group"] for line in self._ended)])
        missing, twice = sorted((came - went).elements()), sorted((went - came).elements())
        if missing or twice or counts.accounted != counts.dispatched:
            raise RuntimeError(
                f"the ledger of step {step} does not add up: groups missing: {_listed(missing)}; "
                f"twice: {_listed(twice)}; {counts.accounted} of {counts.dispatched} accounted for. "
                "This is a defect of the pipeline, not of the run"
            )


class LedgerFile:
    """The file of a ledger, to which commits are appended.

    Attributes:
        path: of the file, made if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_ready = False  # the file ends with the last commit that was written

    def append(self, lines: Iterable[Mapping[str, Any]], *, after: Mapping[str, Any]) -> None:
        """Append lines so that they follow the summary `after`, and wait until they are on the disk.

        Later steps are removed first. If the file does not end with that summary, as in another folder, it is
        written before the lines, marked as `base`.
        """
        if not self._is_ready:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            last = truncate_from_step(self.path, after["step"] + 1)
            is_known = last is not None and json.loads(last) == after
            lines = [*([] if is_known or after["step"] == 0 else [{**after, "base": True}]), *lines]
        self._is_ready = False  # until all lines are in the file
        with self.path.open("ab") as file:
            file.write(b"".join(map(json_line, lines)))
            file.flush()
            # The checkpoint that follows refers to these lines, so they must survive a crash.
            os.fsync(file.fileno())
        self._is_ready = True


def _plain(record: LedgerCounts | OpenGroup) -> dict[str, Any]:
    """A record as a dict with lists in place of tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()
    }


def _check_failure(failure: str) -> None:
    if failure not in FAILURES:
        raise ValueError(f"need a class of {', '.join(FAILURES)}, got {failure!r}")


def _one_line(cause: str) -> str:
    return " ".join(cause.split())[:_MAX_CAUSE_CHARS]


def _listed(numbers: list[int]) -> str:
    """The first numbers, for a message."""
    shown = ", ".join(map(str, numbers[:_MAX_LISTED])) or "none"
    more = len(numbers) - _MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown
