"""Checkpoints on disk: what counts as one, which ones stay, and what a stop in the middle of one leaves."""

from __future__ import annotations

import os
import shutil
from threading import Event

import pytest
import torch

from verl.trainer.checkpoint_store import CheckpointStore, check_room, load_state, only_run_in


def writes(text="weights", *, broken="never"):
    """Begins to write a text; `broken` says when the disk is full: at once, or only when the rest is waited
    for.
    """

    def save(folder):
        (folder / "part").write_text(text)
        if broken == "at once":
            raise OSError("no space left on device")
        return lambda: finish(folder)

    def finish(folder):
        (folder / "rest").write_text(text)
        if broken == "later":
            raise RuntimeError("no space left on device")

    return save


def saved(store, step, saves, state):
    """A checkpoint that is complete."""
    store.begin(step, saves, state)
    return store.finish()


def steps(root):
    return sorted(int(folder.name.removeprefix("step-")) for folder in root.glob("step-*"))


def test_what_was_saved_is_read_back(tmp_path):
    state = {"version": 3, "nested": {"texts": ["a"]}, "tensor": torch.arange(3)}
    folder = saved(
        CheckpointStore(tmp_path, keep=2), 3, {"policy": writes("p"), "critic": writes("c")}, state
    )
    assert folder == CheckpointStore(tmp_path, keep=2).newest() == tmp_path / "step-00000003"
    assert (folder / "critic" / "part").read_text() == (folder / "critic" / "rest").read_text() == "c"
    loaded = load_state(folder)
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == state


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path):
    assert CheckpointStore(tmp_path / "absent", keep=1).newest() is None


def test_the_newest_is_the_one_of_the_last_step_and_the_newest_n_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 9, 10, 100):
        saved(store, step, {"policy": writes()}, {})
    assert store.newest() == tmp_path / "step-00000100"
    assert steps(tmp_path) == [10, 100]


def test_half_written_checkpoints_are_not_taken_for_whole_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    whole = saved(store, 1, {"policy": writes()}, {})
    (tmp_path / ".writing-step-00000003").mkdir()
    (tmp_path / ".writing-step-00000003" / "state.pt").touch()
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-4").mkdir()
    assert store.newest() == whole
    with pytest.raises(ValueError, match=r"step-00000002 is not a checkpoint: it has no state.pt"):
        load_state(tmp_path / "step-00000002")


@pytest.mark.parametrize("broken", ["at once", "later"])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_can_be_repeated(broken, tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    whole = saved(store, 1, {"policy": writes()}, {})
    with pytest.raises(
        RuntimeError, match="MiB of its disk are free now: no space left on device; make room"
    ):
        saved(store, 2, {"policy": writes("half", broken=broken)}, {})
    assert store.newest() == whole
    saved(store, 2, {"policy": writes("again")}, {})
    assert (tmp_path / "step-00000002" / "policy" / "part").read_text() == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_training_goes_on_while_a_checkpoint_is_written_and_it_counts_once_it_is_whole(tmp_path):
    store, may_end = CheckpointStore(tmp_path, keep=2), Event()
    saved(store, 1, {"policy": writes()}, {})
    store.begin(2, {"policy": lambda folder: may_end.wait}, {})
    assert store.poll() is None and store.newest() == tmp_path / "step-00000001"
    may_end.set()
    assert store.finish() == store.newest() == tmp_path / "step-00000002"
    assert store.poll() is None


def test_the_next_checkpoint_waits_for_the_one_before_and_tells_if_that_failed(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.begin(1, {"policy": writes(broken="later")}, {})
    with pytest.raises(RuntimeError, match="cannot write .*step-00000001"):
        store.begin(2, {"policy": writes()}, {})
    assert store.newest() is None and store.poll() is None


def test_a_run_that_starts_anew_replaces_the_later_steps_of_the_old_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (4, 6):
        saved(store, step, {"policy": writes()}, {"run": "old"})
    new = saved(store, 1, {"policy": writes()}, {"run": "new"})
    assert store.newest() == new
    assert load_state(new) == {"run": "new"}


def test_a_folder_takes_one_run_at_a_time_and_is_free_after_it(tmp_path):
    with only_run_in(tmp_path / "run"):
        with (
            pytest.raises(RuntimeError, match=f"but process {os.getpid()} writes its run there"),
            only_run_in(tmp_path / "run"),
        ):
            pass
        with only_run_in(tmp_path / "other"):
            pass
    with only_run_in(tmp_path / "run"):
        pass


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    for folder in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(
            ValueError, match=f"need output_dir as a folder that can be written, got {folder}"
        ):
            only_run_in(folder).__enter__()


def test_a_damaged_state_is_named_without_the_advice_to_trust_it(tmp_path):
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "state.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"cannot read .*state\.pt, which is damaged .*remove ") as refusal:
        load_state(folder)
    assert "weights_only" not in str(refusal.value)


def test_with_one_kept_the_last_good_one_stays_until_the_next_has_proven_good(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 2):
        saved(store, step, {"policy": writes()}, {})
        assert store.newest_good() == (tmp_path / "step-00000001" if step == 2 else None)
        store.confirm(1)  # the second step learned from the weights after the first
    assert steps(tmp_path) == [1, 2] and store.newest_good() == tmp_path / "step-00000001"
    store.confirm(2)
    assert steps(tmp_path) == [2] and store.newest_good() == store.newest()


def test_a_checkpoint_of_an_earlier_run_is_not_the_last_good_one(tmp_path):
    saved(CheckpointStore(tmp_path, keep=2), 1, {"policy": writes()}, {})
    anew, resumed = CheckpointStore(tmp_path, keep=2), CheckpointStore(tmp_path, keep=2)
    resumed.resume(tmp_path / "step-00000001")
    for store in (anew, resumed):
        store.confirm(1)
    assert anew.newest_good() is None and resumed.newest_good() == tmp_path / "step-00000001"


def test_a_disk_without_room_is_an_error_and_one_with_little_a_note(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    sizes = {"checkpoint_bytes": 1000, "model_bytes": 500, "keep": 2}
    assert check_room(tmp_path / "absent", **sizes) is None
    with pytest.raises(ValueError, match="need .* MiB for 2 checkpoints, .*less than one checkpoint"):
        check_room(tmp_path, **sizes | {"checkpoint_bytes": 2 * free})
    note = check_room(tmp_path, **sizes | {"checkpoint_bytes": free // 2})
    assert note is not None and "the disk may become full: need" in note and "MiB free at" in note
