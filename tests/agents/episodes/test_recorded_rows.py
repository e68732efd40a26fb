"""Episodes as rows for fine-tuning: the tokens that are learned are those that were sampled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import pytest

from tests.agents.episodes.scripted import ScriptedPolicy, live_episode
from tests.chat_templates import CHATML, chat_tokenizer
from verl.config.data import SFTDataConfig
from verl.data.examples import answer_row, load_examples
from verl.data.recorded_episodes import recorded_episode
from verl.data.tasks.episode_tasks import EPISODE_TASKS
from verl.data.trajectory import Trajectory
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

HERMES = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>",
).replace("{% for m in messages %}", "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}", 1)
CALL = '<tool_call>\n{"name": "guess", "arguments": {"number": 3}}\n</tool_call>'
ASKED = [{"role": "user", "content": "Find my number."}]
TOLD = [{"role": "tool", "name": "guess", "tool_call_id": "call_0", "content": "higher"}]
TOOLS = [EPISODE_TASKS["guess"].tool]


def hermes_codec() -> TextCodec:
    return TextCodec(chat_tokenizer(HERMES))


def play(codec: TextCodec, turns: Sequence[str], told: Sequence[list], *, cut_last: bool = False) -> Trajectory:
    """An episode with these turns, and these messages between them."""
    live = live_episode(codec, ScriptedPolicy(codec, turns, cut_last=cut_last), Prompt(ASKED))

    async def run() -> None:
        live.begin(ASKED, TOOLS)
        for number in range(len(turns)):
            await live.answer()
            if number < len(told):
                live.add(told[number])

    asyncio.run(run())
    trajectory = live.trajectory()
    trajectory.reward = 1.0
    return trajectory


def written(tmp_path, row) -> str:
    path = tmp_path / "episodes.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def learned_row(tmp_path, codec: TextCodec, row):
    (example,), _ = load_examples(written(tmp_path, row), SFTDataConfig(), split="train")
    return answer_row(codec, example, example.answer)


def test_fine_tuning_learns_the_sampled_tokens_of_a_recorded_episode(tmp_path):
    codec = hermes_codec()
    episode = play(codec, [CALL, CALL, "It is 3."], [TOLD, TOLD])
    row = learned_row(tmp_path, codec, recorded_episode(episode, codec))
    assert [*row.prompt_ids, *row.response_ids] == [*episode.prompt_ids, *episode.response_ids]
    assert row.mask == episode.response_mask and sum(row.mask) > 100


BAD = '<tool_call>\n{"name": "guess"\n</tool_call>'
SPACED = CALL.replace("{", "{ ")


@pytest.mark.parametrize("odd", [BAD, SPACED], ids=["malformed", "other blanks"])
def test_a_turn_that_the_template_would_write_otherwise_is_not_learned(tmp_path, odd):
    codec = hermes_codec()
    episode = play(codec, [odd, CALL, "Done."], [TOLD, TOLD])
    row = recorded_episode(episode, codec)
    weights = [m.get("weight", 1) for m in row["messages"] if m["role"] == "assistant"]
    assert weights == [0, 1, 1]
    learned = learned_row(tmp_path, codec, row)
    texts = codec.decode_all([t for t, own in zip(learned.response_ids, learned.mask, strict=True) if own])
    assert texts == f"{CALL}<|im_end|>Done.<|im_end|>"


def test_a_turn_that_was_cut_off_is_not_learned():
    codec = hermes_codec()
    row = recorded_episode(play(codec, [CALL, "It is th"], [TOLD], cut_last=True), codec)
    assert [m.get("weight", 1) for m in row["messages"]] == [1, 1, 1, 0]


def masked(episode: Trajectory) -> None:
    episode.mask_all()


def failed(episode: Trajectory) -> None:
    episode.outcome, episode.reward = "environment_error", None


@pytest.mark.parametrize("change", [masked, failed])
def test_an_episode_with_nothing_to_learn_has_no_row(change: Callable[[Trajectory], None]):
    codec = hermes_codec()
    episode = play(codec, ["It is 3."], [])
    change(episode)
    assert recorded_episode(episode, codec) is None


def test_rows_below_a_reward_are_left_out_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": "3"}], "reward": r} for r in (0.0, 1.0, 0.5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, report = load_examples(str(path), SFTDataConfig(min_reward=0.5), split="train")
    assert [example.columns["reward"] for example in kept] == [1.0, 0.5]
    assert report.notes[-1] == "1 rows with a reward below 0.5 left out"
    with pytest.raises(ValueError, match="need a row with a reward of data.min_reward 2 or more, the best has 1"):
        load_examples(str(path), SFTDataConfig(min_reward=2), split="train")
    path.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    with pytest.raises(ValueError, match="need a number in the column 'reward' of every row for data.min_reward"):
        load_examples(str(path), SFTDataConfig(min_reward=0.5), split="train")
