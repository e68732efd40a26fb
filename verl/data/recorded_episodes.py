"""Rows of recorded episodes, which `verl sft` reads as they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from verl.data.trajectory import Trajectory
from verl.utils.tokens import TextCodec, is_text


def recorded_episode(trajectory: Trajectory, codec: TextCodec) -> dict[str, Any] | None:
    """Row {messages, tools, reward, ending, turn_rewards, scores, counts} of an episode with a reward.

    What fine-tuning learns from the row are the sampled tokens. So a message of the assistant has weight 0 if
    the episode did not sample it (an example in the prompt, or a turn of a history that was rewritten), if it
    was cut off, or if the chat template writes other tokens for it than were sampled (a call with other
    blanks, thoughts that are dropped from earlier turns).

    Args:
        trajectory: rewarded.
        codec: of the policy that sampled it.

    Returns:
        The row; None if the episode has no reward or nothing to learn: it failed, is masked as a whole, or
        its prompt is a text.
    """
    record = trajectory.episode
    if record is None or trajectory.outcome != "ok" or is_text(trajectory.prompt):
        return None
    weights = sampled_messages(trajectory, codec)
    if True not in weights.values():
        return None
    messages = [
        message if weights.get(i, True) else {**message, "weight": 0}
        for i, message in enumerate(record.messages)
    ]
    return {
        "messages": messages,
        "tools": record.tools,
        "reward": trajectory.reward,
        "ending": record.ending,
        "turn_rewards": record.turn_rewards,
        "scores": trajectory.scores,
        "counts": record.counts,
    }


def sampled_messages(trajectory: Trajectory, codec: TextCodec) -> dict[int, bool]:
    """Index of each message of the assistant -> its tokens, as the template writes them, are those sampled.

    Of an episode with several segments, the messages are those of the last one.
    """
    record = trajectory.episode
    assert record is not None, "need an episode"
    answers = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
    try:
        kwargs = trajectory.prompt.columns.get("chat_template_kwargs")
        encoded = codec.encode_conversation(record.messages, tuple(record.tools), template_kwargs=kwargs)
    except ValueError:  # the template writes an earlier turn otherwise when others follow
        return dict.fromkeys(answers, False)
    starts = [*encoded.turn_starts, len(encoded.ids)]
    written = {
        i: [encoded.ids[k] for k in range(starts[i], starts[i + 1]) if encoded.mask[k]] for i in answers
    }
    turns = sampled_turns(trajectory.response_ids, trajectory.response_mask)
    own = answers[len(answers) - len(turns) :] if turns else []
    sampled = dict(zip(own, turns, strict=False))
    return {i: i in sampled and written[i] == sampled[i] for i in answers}


def sampled_turns(ids: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    """Token ids of each unbroken run of sampled tokens."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in run] for is_sampled, run in runs if is_sampled]
