"""Episodes as rows for fine-tuning: the tokens that are learned are those that were sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.agents.episodes.scripted import CALL, AddTools, Dialogue, chat_codec, play
from verl.config.data import SFTDataConfig
from verl.data.examples import AnswerRow, answer_row, load_examples
from verl.data.trajectory import Trajectory
from verl.trainer.evaluation.sample_rows import recorded_row

CODEC = chat_codec()


def episode(*texts: str, **settings: Any) -> Trajectory:
    """A rewarded episode with these turns."""
    (played,), _ = play(texts, **settings)
    played.reward = 1.0
    return played


def weights(row: dict[str, Any]) -> list[int]:
    return [m.get("weight", 1) for m in row["messages"] if m["role"] == "assistant"]


def learned(tmp_path: Path, row: dict[str, Any]) -> AnswerRow:
    """The tokens that fine-tuning makes of the row of a file."""
    path = tmp_path / "step-000001.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (example,), _ = load_examples(str(path), SFTDataConfig(), split="train")
    return answer_row(CODEC, example, example.answer)


def learned_text(row: AnswerRow) -> str:
    return CODEC.decode_all([t for t, own in zip(row.response_ids, row.mask, strict=True) if own])


def test_fine_tuning_learns_the_sampled_tokens_of_a_recorded_episode(tmp_path):
    played = episode(CALL, CALL, "It is 5.")
    row = learned(tmp_path, recorded_row(played, CODEC, 1))
    assert [*row.prompt_ids, *row.response_ids] == [*played.prompt_ids, *played.response_ids]
    assert row.mask == played.response_mask and sum(row.mask) > 100


def test_turns_between_messages_of_an_environment_are_learned_too(tmp_path):
    played = episode("one", "two", environments=AddTools(Dialogue))
    row = learned(tmp_path, recorded_row(played, CODEC, 1))
    assert [*row.prompt_ids, *row.response_ids] == [*played.prompt_ids, *played.response_ids]
    assert learned_text(row) == "one<|im_end|>two<|im_end|>"


def test_a_turn_that_the_template_would_write_otherwise_is_not_learned(tmp_path):
    row = recorded_row(episode(CALL.replace("{", "{ "), CALL, "Done."), CODEC, 1)
    assert weights(row) == [0, 1, 1]
    assert learned_text(learned(tmp_path, row)) == f"{CALL}<|im_end|>Done.<|im_end|>"


def test_a_turn_that_was_cut_off_is_not_learned():
    assert weights(recorded_row(episode(CALL, "It is..."), CODEC, 1)) == [1, 0]


def test_an_episode_that_failed_or_is_masked_is_left_out_and_counted(tmp_path):
    good, masked, failed = (episode("It is 5.") for _ in range(3))
    masked.mask_all()
    failed.outcome, failed.reward = "environment_error", None
    rows = [recorded_row(played, CODEC, 1) for played in (masked, good, failed)]
    assert [weights(row) for row in rows] == [[0], [1], [0]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, report = load_examples(str(path), SFTDataConfig(min_reward=1), split="train")
    assert [example.index for example in kept] == [1]
    assert "2 recorded episodes without a reward or a turn to learn left out" in report.notes
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="need an episode with something to learn"):
        load_examples(str(path), SFTDataConfig(), split="train")


def test_rows_below_a_reward_are_left_out_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    path.write_text("".join(json.dumps({"messages": chat, "reward": r}) + "\n" for r in (0.0, 1.0, 0.5)))
    kept, report = load_examples(str(path), SFTDataConfig(min_reward=0.5), split="train")
    assert [example.columns["reward"] for example in kept] == [1.0, 0.5]
    assert report.notes[-1] == "1 rows with a reward below 0.5 left out"
    with pytest.raises(ValueError, match=r"reward of data\.min_reward 2 or more, the best has 1"):
        load_examples(str(path), SFTDataConfig(min_reward=2), split="train")
    path.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    with pytest.raises(ValueError, match="need a number in the column 'reward' of every row"):
        load_examples(str(path), SFTDataConfig(min_reward=0.5), split="train")
