"""Every group is in flight, trained on, dropped or failed exactly once, whatever happens to the run."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.monitoring.ledger import FAILURES, LEDGER_FILE, Ledger, LedgerCounts
from verl.monitoring.ledger_report import lines_of_group, read_ledger


def saved(ledger: Ledger) -> dict:
    """The state after it was saved to a checkpoint and loaded."""
    file = io.BytesIO()
    torch.save(ledger.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(state: dict, path: Path | None) -> Ledger:
    ledger = Ledger(path)
    ledger.load_state_dict(state)
    return ledger


def written(path: Path, *, steps: int = 3) -> Ledger:
    """A run of steps of two groups each, the last of which leaves one group answering and one waiting."""
    ledger = Ledger(path / LEDGER_FILE)
    for step in range(1, steps + 1):
        for prompt in (10 * step, 10 * step + 1):
            number = ledger.dispatch(prompt, version=step - 1)
            ledger.complete(number, versions=(step - 1, step - 1))
            ledger.train(number, step=step)
        if step == steps:
            ledger.dispatch(90, version=step)
            ledger.complete(ledger.dispatch(91, version=step), versions=(step, step))
        ledger.commit(step)
    return ledger


def test_groups_are_numbered_and_each_fate_is_counted():
    ledger = Ledger()
    numbers = [ledger.dispatch(prompt, version=0) for prompt in (7, 3, 9, 7, 5, 1)]
    for number in numbers[:3]:
        ledger.complete(number, versions=(0, 1))
    ledger.train(0, step=2)
    ledger.drop(1, "dead")
    ledger.drop(3, "straggler")
    ledger.retry(4, "infrastructure", "engine b died")
    ledger.fail(4, "reward", "judge is down")
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert ledger.counts() == LedgerCounts(
        6, 1, 1, 1, {"dead": 1, "straggler": 1}, {"reward": 1}, {"infrastructure": 1}
    )
    assert ledger.counts().accounted == 6 and ledger.open_groups.keys() == {2, 5}


def ledger_after(*actions: str) -> Ledger:
    """A ledger whose group 0 went through some actions."""
    ledger = Ledger()
    ledger.dispatch(5, version=0)
    for action in actions:
        ACTIONS[action](ledger)
    return ledger


ACTIONS = {
    "retry": lambda ledger: ledger.retry(0, "data", "x"),
    "complete": lambda ledger: ledger.complete(0, versions=(0, 0)),
    "train": lambda ledger: ledger.train(0, step=1),
    "drop": lambda ledger: ledger.drop(0, "dead"),
    "fail": lambda ledger: ledger.fail(0, "data", "x"),
    "redispatch": lambda ledger: ledger.redispatch(0, version=1),
    "commit": lambda ledger: ledger.commit(1),
}
IMPOSSIBLE = [
    (["train"], "cannot train on group 0, which is answering"),
    (["redispatch"], "cannot redispatch group 0, which this process has dispatched already"),
    (["complete", "complete"], "cannot complete group 0, which is waiting"),
    (["complete", "retry"], "cannot retry group 0, which is waiting"),
    (["complete", "fail"], "cannot fail group 0, which is waiting"),
    (["complete", "train", "train"], "cannot train on group 0, which was trained already"),
    (["drop", "train"], "cannot train on group 0, which was dropped already"),
    (["fail", "drop"], "cannot drop group 0, which was failed already"),
    (["complete", "train", "commit", "drop"], "cannot drop group 0, which ended in an earlier step"),
]


@pytest.mark.parametrize(
    ("actions", "message"), IMPOSSIBLE, ids=lambda value: "-".join(value) if isinstance(value, list) else ""
)
def test_what_cannot_happen_to_a_group_is_refused_with_its_number_and_state(actions, message):
    ledger = ledger_after(*actions[:-1])
    before = ledger.counts()
    with pytest.raises(RuntimeError, match=message):
        ACTIONS[actions[-1]](ledger)
    assert ledger.counts() == before


def test_a_group_that_was_never_sent_out_is_refused():
    with pytest.raises(RuntimeError, match="cannot train on group 1, which was never dispatched"):
        ledger_after().train(1, step=1)


def test_what_was_given_wrongly_is_refused():
    ledger = ledger_after()
    with pytest.raises(
        ValueError, match="need a class of infrastructure, data, reward, environment, got 'bad luck'"
    ):
        ledger.fail(0, "bad luck", "x")
    with pytest.raises(ValueError, match="the oldest version, then the newest"):
        ledger.complete(0, versions=(2, 1))
    with pytest.raises(ValueError, match="need the reason"):
        ledger.drop(0, "")
    ledger.commit(4)
    with pytest.raises(ValueError, match="need a step after 4, which is the last in the ledger, got 4"):
        ledger.commit(4)


def test_a_group_that_gets_lost_is_named_when_the_step_is_closed(tmp_path):
    ledger = written(tmp_path)
    ledger.dispatch(1, version=3)
    del ledger._open[8]  # a defect that the methods do not allow
    with pytest.raises(
        RuntimeError, match="step 4 does not add up: groups missing: 8; twice: none; 8 of 9 accounted for"
    ):
        ledger.commit(4)


def test_a_group_that_is_counted_twice_is_named_when_the_step_is_closed():
    ledger = ledger_after()
    group = ledger._open[0]
    ledger.drop(0, "dead")
    ledger._open[0] = group
    with pytest.raises(RuntimeError, match="groups missing: none; twice: 0; 2 of 1"):
        ledger.commit(1)


def test_a_group_of_another_step_is_refused_when_the_step_is_closed():
    ledger = ledger_after("complete", "train")
    with pytest.raises(RuntimeError, match="need groups that step 2 was trained on, got 0 of another step"):
        ledger.commit(2)


def test_the_file_has_a_line_for_each_group_that_ended_and_one_for_the_step(tmp_path):
    ledger = Ledger(tmp_path / LEDGER_FILE)
    for prompt in (4, 5, 6):
        ledger.dispatch(prompt, version=0)
    ledger.retry(1, "infrastructure", "engine b\n  died")
    ledger.complete(1, versions=(0, 1))
    ledger.train(1, step=1)
    ledger.fail(2, "reward", "judge is down")
    ledger.commit(1)
    trained, failed, summary = map(json.loads, (tmp_path / LEDGER_FILE).read_text().splitlines())
    common = {
        "group": 1,
        "prompt": 5,
        "fate": "trained",
        "step": 1,
        "reason": None,
        "attempts": 2,
        "versions": [0, 1],
    }
    assert trained == {**common, "retries": {"infrastructure": [1, "engine b died"]}}
    assert (failed["fate"], failed["reason"], failed["cause"], failed["step"]) == (
        "failed",
        "reward",
        "judge is down",
        1,
    )
    assert (summary["dispatched"], summary["trained"], summary["failed"]) == (3, 1, {"reward": 1})
    assert (summary["answering_groups"], summary["waiting_groups"]) == ([0], [])


def test_what_is_read_is_what_was_kept(tmp_path):
    ledger = written(tmp_path)
    report = read_ledger(tmp_path)
    assert report.adds_up and report.step == 3 and report.counts == ledger.counts()
    assert report.open_groups == {6: "answering", 7: "waiting"} and report.staleness == {0: 6}
    assert [step["trained"] for step in report.steps] == [2, 4, 6]
    assert [line["prompt"] for line in lines_of_group(tmp_path, 3)] == [21] and lines_of_group(
        tmp_path, 7
    ) == []


def test_groups_under_way_keep_their_numbers_over_a_restart_and_are_sent_again(tmp_path):
    ledger = loaded(saved(written(tmp_path)), tmp_path / LEDGER_FILE)
    assert {number: (group.prompt, group.state) for number, group in ledger.orphaned.items()} == {
        6: (90, "answering"),
        7: (91, "waiting"),
    }
    with pytest.raises(
        RuntimeError, match="cannot complete group 6, which is answering since before the run was restarted"
    ):
        ledger.complete(6, versions=(3, 3))
    ledger.redispatch(6, version=3)
    ledger.train(7, step=4)  # its answers were in the checkpoint
    ledger.complete(6, versions=(3, 3))
    assert ledger.orphaned == {} and ledger.counts().again == 1 and ledger.dispatch(92, version=3) == 8
    with pytest.raises(RuntimeError, match="this process has dispatched already and which is waiting"):
        ledger.redispatch(6, version=3)
    ledger.commit(4)
    assert read_ledger(tmp_path).counts == ledger.counts() and lines_of_group(tmp_path, 7)[0]["attempts"] == 1


def test_steps_after_the_checkpoint_are_cut_away_when_they_are_written_again(tmp_path):
    ledger = written(tmp_path)
    state = saved(ledger)
    ledger.drop(6, "straggler")
    ledger.commit(4)
    ledger = loaded(state, tmp_path / LEDGER_FILE)
    assert read_ledger(tmp_path).step == 4  # the folder may belong to another process until the run begins
    ledger.fail(6, "data", "x")
    ledger.commit(4)
    report = read_ledger(tmp_path)
    assert report.adds_up and report.counts.dropped == {} and report.counts.failed == {"data": 1}


def test_what_ended_after_the_last_step_of_a_checkpoint_is_not_forgotten(tmp_path):
    ledger = written(tmp_path)
    ledger.drop(6, "straggler")
    ledger = loaded(saved(ledger), tmp_path / LEDGER_FILE)
    ledger.commit(4)
    assert read_ledger(tmp_path).counts.dropped == {"straggler": 1} and read_ledger(tmp_path).adds_up


def test_a_new_run_in_a_used_folder_begins_a_new_ledger(tmp_path):
    written(tmp_path)
    written(tmp_path, steps=1)
    report = read_ledger(tmp_path)
    assert report.adds_up and report.counts.dispatched == 4 and report.step == 1


@pytest.mark.parametrize("there", [0, 5], ids=["an empty folder", "the folder of another run"])
def test_a_run_that_goes_on_in_another_folder_says_what_was_before(there, tmp_path):
    state = saved(written(tmp_path / "one"))
    if there:
        written(tmp_path / "two", steps=there)
    ledger = loaded(state, tmp_path / "two" / LEDGER_FILE)
    ledger.drop(6, "straggler")
    ledger.commit(4)
    report = read_ledger(tmp_path / "two")
    assert report.adds_up and report.num_ended_before == 6 and report.counts == ledger.counts()


def test_a_commit_that_was_cut_off_counts_for_nothing_at_every_byte(tmp_path):
    written(tmp_path, steps=2)
    whole = (tmp_path / LEDGER_FILE).read_bytes()
    begin = whole.index(b"\n", whole.index(b'"dispatched"')) + 1
    for size in range(begin, len(whole)):
        (tmp_path / LEDGER_FILE).write_bytes(whole[:size])
        report = read_ledger(tmp_path)
        complete = json.loads(whole.splitlines()[-1]) == _last(whole[:size])
        assert report.adds_up and report.step == 1 + complete
        assert (report.num_incomplete_lines > 0) == (size > begin and not complete)


def _last(text: bytes):
    try:
        return json.loads(text.splitlines()[-1])
    except ValueError:
        return None


def test_a_run_goes_on_from_a_file_that_was_cut_off(tmp_path):
    ledger = written(tmp_path)
    state = saved(ledger)
    ledger.drop(6, "straggler")
    ledger.commit(4)
    (tmp_path / LEDGER_FILE).write_bytes((tmp_path / LEDGER_FILE).read_bytes()[:-40])
    ledger = loaded(state, tmp_path / LEDGER_FILE)
    ledger.commit(4)
    assert read_ledger(tmp_path).adds_up and read_ledger(tmp_path).num_incomplete_lines == 0


def test_a_file_that_cannot_be_written_costs_no_line(tmp_path):
    folder = tmp_path / "run"
    ledger = written(folder)
    (folder / LEDGER_FILE).rename(tmp_path / "kept")
    (folder / LEDGER_FILE).mkdir()
    ledger.drop(6, "straggler")
    with pytest.raises(OSError):
        ledger.commit(4)
    state = saved(ledger)
    (folder / LEDGER_FILE).rmdir()
    (tmp_path / "kept").rename(folder / LEDGER_FILE)
    for goes_on in (loaded(state, folder / LEDGER_FILE), ledger):
        goes_on.commit(5)
        assert [step["step"] for step in read_ledger(folder).steps] == [1, 2, 3, 4, 5] and read_ledger(
            folder
        ).adds_up


def changed(path: Path, old: str, new: str) -> None:
    text = (path / LEDGER_FILE).read_text()
    assert old in text
    (path / LEDGER_FILE).write_text(text.replace(old, new))


def test_groups_that_are_missing_or_twice_and_sums_that_are_wrong_are_found(tmp_path):
    written(tmp_path)
    changed(tmp_path, '{"group": 2,', '{"group": 3,')
    report = read_ledger(tmp_path)
    assert (report.missing, report.twice, report.mismatches) == ([2], [3], [])
    changed(tmp_path, '"dropped": {}', '"dropped": {"dead": 1}')
    assert (
        "line 3, the sum of step 1, says {'trained': 2, 'dropped': {'dead': 1}"
        in read_ledger(tmp_path).mismatches[0]
    )
    changed(tmp_path, '{"group": 4,', '{"group": 40,')
    assert "line 7 is of group 40, which was never dispatched" in read_ledger(tmp_path).mismatches[2]
    changed(tmp_path, '{"group": 40,', '{"group" 4,')
    assert "line 7 cannot be parsed" in read_ledger(tmp_path).mismatches[2]
    assert not read_ledger(tmp_path).adds_up


def test_a_group_that_ended_and_is_under_way_is_twice(tmp_path):
    written(tmp_path)
    changed(tmp_path, '"waiting_groups": [7]', '"waiting_groups": [7, 5]')
    assert read_ledger(tmp_path).twice == [5]


def test_a_folder_without_a_ledger_is_told():
    with pytest.raises(ValueError, match="need the output_dir of a run that keeps a ledger, got nowhere"):
        read_ledger(Path("nowhere"))


def test_a_state_that_does_not_add_up_is_refused():
    state = ledger_after().state_dict()
    del state["open"][0]
    with pytest.raises(ValueError, match="need a ledger that accounts for all of its 1 groups"):
        Ledger().load_state_dict(state)


def test_memory_holds_open_groups_alone(tmp_path):
    ledger = written(tmp_path, steps=50)
    assert len(ledger.open_groups) == 2 and len(str(ledger.state_dict())) < 2000


# What may happen next, each with a number that picks a group.
OPERATIONS = (
    "dispatch",
    "dispatch",
    "retry",
    "complete",
    "complete",
    "train",
    "train",
    "drop",
    "fail",
    "commit",
    "commit",
    "save",
    "crash",
)


class RandomRun:
    """A run that picks possible operations, and its own record of each group."""

    def __init__(self, path: Path) -> None:
        self.path, self.step = path, 0
        self.ledger = Ledger(path)
        self.fates: dict[int, str] = {}
        self.remember()

    def remember(self) -> None:
        self.kept = saved(self.ledger), dict(self.fates), self.step

    def crash(self) -> None:
        state, fates, self.step = self.kept
        self.fates = dict(fates)
        self.ledger = loaded(state, self.path)
        for number in self.ledger.orphaned:
            self.ledger.redispatch(number, version=self.step)
            self.fates[number] = "answering"

    def do(self, operation: str, pick: int) -> None:
        if operation in ("save", "crash"):
            return self.remember() if operation == "save" else self.crash()
        if operation == "dispatch":
            self.fates[self.ledger.dispatch(pick, version=self.step)] = "answering"
        elif operation == "commit":
            self.step += 1
            self.fates = {
                number: fate.replace("now trained", "trained") for number, fate in self.fates.items()
            }
            self.ledger.commit(self.step)
        else:
            self.change_group(operation, pick)
        return None

    def change_group(self, operation: str, pick: int) -> None:
        wanted = {"train": ("waiting",), "drop": ("answering", "waiting")}.get(operation, ("answering",))
        possible = [number for number, fate in self.fates.items() if fate in wanted]
        if not possible:
            return
        number, failure = possible[pick % len(possible)], FAILURES[pick % 4]
        if operation == "retry":
            self.ledger.retry(number, failure, "cause")
        elif operation == "complete":
            self.ledger.complete(number, versions=(self.step, self.step))
            self.fates[number] = "waiting"
        elif operation == "train":
            self.ledger.train(number, step=self.step + 1)
            self.fates[number] = "now trained"
        elif operation == "drop":
            self.ledger.drop(number, "dead")
            self.fates[number] = "dropped dead"
        else:
            self.ledger.fail(number, failure, "cause")
            self.fates[number] = f"failed {failure}"


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 50)), max_size=80))
def test_whatever_happens_every_group_is_there_once(operations):
    with tempfile.TemporaryDirectory() as folder:
        run = RandomRun(Path(folder) / LEDGER_FILE)
        for operation, pick in [*operations, ("commit", 0)]:
            run.do(operation, pick)
            counts, fates = run.ledger.counts(), list(run.fates.values())
            assert counts.accounted == counts.dispatched == len(fates)
            assert counts.trained == sum(fate.endswith("trained") for fate in fates)
            assert {f"failed {name}": n for name, n in counts.failed.items()} == {
                f: fates.count(f) for f in fates if f.startswith("failed")
            }
        report = read_ledger(Path(folder))
        assert report.adds_up and report.counts == run.ledger.counts() and report.num_incomplete_lines == 0
        assert report.open_groups == {
            number: fate for number, fate in run.fates.items() if fate in ("answering", "waiting")
        }
        ended = {n: fate.split()[0] for n, fate in run.fates.items() if n not in report.open_groups}
        assert {n: [line["fate"] for line in lines_of_group(Path(folder), n)] for n in ended} == {
            n: [fate] for n, fate in ended.items()
        }
