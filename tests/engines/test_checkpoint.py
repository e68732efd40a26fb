"""Checkpoints on disk: what counts as one, which ones stay, and what a stop in the middle of one leaves."""

from __future__ import annotations

import os

import pytest
import torch

from verl.engines.base import TrainEngine
from verl.engines.checkpoint import CheckpointStore, load_state, only_run_in


class FileEngine(TrainEngine):
    """Its weights are a text in a file; `broken` makes it stop half-way through."""

    def __init__(self, text="weights", *, broken=False):
        self.text, self.broken = text, broken

    def infer(self, batch, micro_batches, outputs):
        raise NotImplementedError

    def update(self, batch, micro_batches, objective):
        raise NotImplementedError

    def save(self, folder):
        (folder / "part").write_text(self.text)
        if self.broken:
            raise OSError("no space left on device")

    def load(self, folder):
        self.text = (folder / "part").read_text()


def steps(root):
    return sorted(int(folder.name.removeprefix("step-")) for folder in root.glob("step-*"))


def test_what_was_saved_is_read_back(tmp_path):
    state = {"version": 3, "nested": {"texts": ["a"]}, "tensor": torch.arange(3)}
    folder = CheckpointStore(tmp_path, keep=2).save(3, {"policy": FileEngine("p"), "critic": FileEngine("c")}, state)
    assert folder == CheckpointStore(tmp_path, keep=2).newest() == tmp_path / "step-00000003"
    engine = FileEngine()
    engine.load(folder / "critic")
    assert engine.text == "c"
    loaded = load_state(folder)
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))
    assert loaded == state


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path):
    assert CheckpointStore(tmp_path / "absent", keep=1).newest() is None


def test_the_newest_is_the_one_of_the_last_step_and_the_newest_n_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 9, 10, 100):
        store.save(step, {"policy": FileEngine()}, {})
    assert store.newest() == tmp_path / "step-00000100"
    assert steps(tmp_path) == [10, 100]


def test_half_written_checkpoints_are_not_taken_for_whole_ones(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    whole = store.save(1, {"policy": FileEngine()}, {})
    (tmp_path / ".writing-step-00000003").mkdir()
    (tmp_path / ".writing-step-00000003" / "state.pt").touch()
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-4").mkdir()
    assert store.newest() == whole
    with pytest.raises(ValueError, match=r"step-00000002 is not a checkpoint: it has no state.pt"):
        load_state(tmp_path / "step-00000002")


def test_a_save_that_fails_leaves_the_old_checkpoint_and_can_be_repeated(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    whole = store.save(1, {"policy": FileEngine()}, {})
    with pytest.raises(RuntimeError, match="MiB of its disk are free now: no space left on device; make room"):
        store.save(2, {"policy": FileEngine("half", broken=True)}, {})
    assert store.newest() == whole
    store.save(2, {"policy": FileEngine("again")}, {})
    assert (tmp_path / "step-00000002" / "policy" / "part").read_text() == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_run_that_starts_anew_replaces_the_later_steps_of_the_old_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (4, 6):
        store.save(step, {"policy": FileEngine()}, {"run": "old"})
    new = store.save(1, {"policy": FileEngine()}, {"run": "new"})
    assert store.newest() == new
    assert load_state(new) == {"run": "new"}


def test_a_folder_takes_one_run_at_a_time_and_is_free_after_it(tmp_path):
    with only_run_in(tmp_path / "run"):
        with pytest.raises(RuntimeError, match=f"but process {os.getpid()} writes its run there"), only_run_in(tmp_path / "run"):
            pass
        with only_run_in(tmp_path / "other"):
            pass
    with only_run_in(tmp_path / "run"):
        pass
