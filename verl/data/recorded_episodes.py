"""Messages of recorded episodes for fine-tuning, which learns of them the tokens that were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from verl.data.trajectory import Trajectory
from verl.utils.tokens import TextCodec, is_text


def weighted_messages(trajectory: Trajectory, codec: TextCodec) -> list[dict[str, Any]]:
    """Messages of an episode, those of the assistant that fine-tuning is not to learn with weight 0.

    These are the ones that the episode did not sample (an example in the prompt, a turn of a history that was
    rewritten), that were cut off, or for which the chat template writes other tokens than were sampled (a
    call with other blanks, thoughts that are dropped from earlier turns); and all of them if the episode has
    no reward, is masked as a whole, or has a text as prompt.
    """
    episode = trajectory.episode
    assert episode is not None, "need an episode"
    answers = [i for i, message in enumerate(episode.messages) if message["role"] == "assistant"]
    is_used = trajectory.outcome == "ok" and not is_text(trajectory.prompt)
    sampled = sampled_messages(trajectory, codec, answers) if is_used else set[int]()
    return [
        {**message, "weight": 0} if i in answers and i not in sampled else message
        for i, message in enumerate(episode.messages)
    ]


def sampled_messages(trajectory: Trajectory, codec: TextCodec, answers: Sequence[int]) -> set[int]:
    """Those of the messages with these indices whose tokens, as the template writes them, were sampled.

    Of an episode with several segments, the messages are those of the last one.
    """
    episode = trajectory.episode
    assert episode is not None, "need an episode"
    kwargs = trajectory.prompt.columns.get("chat_template_kwargs")
    try:
        ids, mask, starts = codec.encode_conversation(
            episode.messages, tuple(episode.tools), template_kwargs=kwargs
        )
    except ValueError:  # the template writes an earlier turn otherwise when others follow
        return set()
    bounds = [*starts, len(ids)]
    turns = sampled_turns(trajectory.response_ids, trajectory.response_mask)
    own = answers[max(0, len(answers) - len(turns)) :]
    return {
        i
        for i, turn in zip(own, turns, strict=False)
        if turn == [ids[k] for k in range(bounds[i], bounds[i + 1]) if mask[k]]
    }


def sampled_turns(ids: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    """Token ids of each unbroken run of sampled tokens."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in run] for is_sampled, run in runs if is_sampled]
