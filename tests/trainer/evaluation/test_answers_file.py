"""An evaluation that is interrupted goes on where it was, to the same files and results, bit for bit."""

from __future__ import annotations

import errno
import json
import os

import pytest

from tests.training import toy_trainer, write_prompts
from verl.trainer.evaluation.answering import (
    answer_in_portions,
    answered_set,
    metrics_of,
    portions_of,
    questions_of,
)
from verl.trainer.evaluation.answers_file import AnswersFile
from verl.trainer.evaluation.identity import identity_of

SETTINGS = ("evaluation.samples=3", "evaluation.greedy=true", "evaluation.prompts=4")


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def trainer(letters, tmp_path):
    """Two sets of four prompts each, three sampled answers and a greedy one."""
    more = write_prompts(tmp_path / "more.jsonl")
    sets = f"data.test=[{tmp_path / 'prompts.jsonl'}, {{path: {more}, name: more}}]"
    return toy_trainer("grpo", letters, tmp_path, *SETTINGS, sets, "rewards.functions=[position_share]")


def opened(trainer, folder, **changes):
    folder.mkdir(exist_ok=True)
    questions = questions_of(trainer.test_sets, trainer.config, trainer.codec)
    identity = identity_of(trainer.config, trainer.test_sets, questions, trainer.codec) | changes
    portions = portions_of(questions, in_turn=True, first=4)
    return AnswersFile(folder, identity, trainer.test_sets, portions, codec=trainer.codec, fresh=False)


def run(trainer, folder, *, portions=None):
    """Answer what is missing; killed after so many portions."""
    file, left = opened(trainer, folder), portions

    def keep(portion):
        nonlocal left
        if left == 0:
            raise KilledError
        file.append(portion)
        left = None if left is None else left - 1

    answer_in_portions(trainer.collector, file.missing(), keep)
    file.sort()
    sets = trainer.test_sets
    answered = [answered_set(file.scored, i, one) for i, one in enumerate(sets)]
    return metrics_of(sets, answered, trainer.config), file.path.read_bytes()


def test_an_interrupted_evaluation_ends_as_one_that_was_not(trainer, tmp_path):
    whole = run(trainer, tmp_path / "whole")
    assert whole[0] == trainer.evaluate()  # in one call
    with pytest.raises(KilledError):
        run(trainer, tmp_path / "parts", portions=2)
    half = (tmp_path / "parts" / "answers.jsonl").read_bytes()
    assert 0 < len(half) < len(whole[1])
    assert run(trainer, tmp_path / "parts") == whole


def test_a_full_disk_is_one_message_and_loses_nothing(trainer, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        message = "cannot write .*answers.jsonl: No space left on device; make room"
        with pytest.raises(RuntimeError, match=message):
            run(trainer, tmp_path / "parts")
    assert run(trainer, tmp_path / "parts") == run(trainer, tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_answers_that_were_cut_off_are_asked_for_again(trainer, tmp_path, cut):
    whole = run(trainer, tmp_path / "whole")
    path = tmp_path / "whole" / "answers.jsonl"
    path.write_bytes(whole[1][:-cut])
    file = opened(trainer, tmp_path / "whole")
    assert file.missing() and all(len(group) in (1, 3) for group in file.scored.values())
    assert run(trainer, tmp_path / "whole") == whole


def test_rows_have_all_that_another_program_needs(trainer, tmp_path):
    _, lines = run(trainer, tmp_path / "whole")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == 2 * 4 * (3 + 1)
    first = rows[0]
    assert (first["set"], first["index"], first["sample"], first["greedy"]) == ("prompts", 0, 0, False)
    assert first["prompt"] == "aac=" and first["reference"] == "aac" and first["messages"] is None
    assert first["finish"] in ("stop", "length") and first["outcome"] == "ok"
    assert first["scores"].keys() == {"position_share", "accuracy"}
    assert [row["greedy"] for row in rows] == [False] * 24 + [True] * 8
    assert rows[-1]["set"] == "more"
    assert [row["set"] for row in opened(trainer, tmp_path / "whole").shown(3)] == [
        "prompts",
        "more",
        "prompts",
    ]


def test_metrics_of_several_sets_and_their_mean(trainer, tmp_path):
    metrics, _ = run(trainer, tmp_path / "whole")
    for name in ("accuracy", "accuracy_low", "pass@2", "pass@3", "maj@3", "greedy/accuracy", "reward"):
        assert {f"eval/{name}", f"eval/prompts/{name}", f"eval/more/{name}"} <= metrics.keys()
    mean = (metrics["eval/prompts/reward"] + metrics["eval/more/reward"]) / 2
    assert metrics["eval/reward"] == mean


def test_the_answers_of_another_evaluation_are_neither_used_nor_replaced(trainer, tmp_path):
    run(trainer, tmp_path / "whole")
    with pytest.raises(ValueError, match="differs in the model; the reward functions, or their code"):
        opened(trainer, tmp_path / "whole", model="other", rewards="other")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "answers.jsonl").write_text("of a user")
    with pytest.raises(ValueError, match="a file answers.jsonl that is of none"):
        opened(trainer, tmp_path / "own")
    assert (tmp_path / "own" / "answers.jsonl").read_text() == "of a user"
    (tmp_path / "whole" / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read .*evaluation.json"):
        opened(trainer, tmp_path / "whole")
