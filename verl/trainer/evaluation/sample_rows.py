"""One answer as a row for readers and programs."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from verl.data.recorded_episodes import weighted_messages
from verl.data.trajectory import EpisodeRecord, Trajectory
from verl.utils.tokens import TextCodec


def sample_row(trajectory: Trajectory, codec: TextCodec) -> dict[str, Any]:
    """One answer as a row for readers.

    Returns:
        prompt: the text of the prompt, or of its last message.
        prompt_text, response_text: prompt and answer as the model reads and writes them, with special tokens.
        response: the text that the reward functions get.
        prompt_tokens, tokens: lengths of prompt and answer.
        columns: the other columns of the row in the data.
        extras: values that the reward functions logged.
        turns, messages, tools, ending, counts, turn_rewards: of an episode alone, see `turn_rows` and
            `episode_row`.
        reference, reward, scores, truncated, mean_logprob, group, outcome, detail: see `Trajectory`.
    """
    t = trajectory
    turns = {} if t.episode is None else {"turns": turn_rows(t, codec), **episode_row(t.episode)}
    content = t.prompt.content
    logprobs = t.rollout_logprobs or []
    return {
        "prompt": content if isinstance(content, str) else content[-1].get("content", ""),
        "prompt_text": codec.decode_all(t.prompt_ids),
        "response": t.text,
        "response_text": codec.decode_all(list(t.response_ids)),
        "reference": t.prompt.answer,
        "reward": t.reward,
        "scores": t.scores,
        "truncated": t.truncated,
        "prompt_tokens": len(t.prompt_ids),
        "tokens": t.num_response_tokens,
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "group": t.group,
        "outcome": t.outcome,
        "detail": t.detail,
        "columns": t.prompt.columns,
        **({"extras": t.extras} if t.extras else {}),
        **turns,
    }


def episode_row(episode: EpisodeRecord) -> dict[str, Any]:
    """The record of an episode: the conversation as fine-tuning reads it, and what happened.

    Returns:
        messages, tools: the whole conversation, and the schemas of the tools that were offered.
        ending, counts, turn_rewards: see `EpisodeRecord`.
    """
    return {
        "messages": episode.messages,
        "tools": episode.tools,
        "ending": episode.ending,
        "counts": episode.counts,
        "turn_rewards": episode.turn_rewards,
    }


def recorded_row(trajectory: Trajectory, codec: TextCodec, step: int) -> dict[str, Any]:
    """An episode as fine-tuning reads it: messages and tools, with reward, ending, step and data row.

    Messages that it is not to learn have weight 0, see `weighted_messages`.
    """
    t = trajectory
    assert t.episode is not None, "need an episode"
    return {
        **episode_row(t.episode),
        "messages": weighted_messages(t, codec),
        "reward": t.reward,
        "scores": t.scores,
        "outcome": t.outcome,
        "detail": t.detail,
        "step": step,
        "group": t.group,
        "source": t.prompt.source,
        "index": t.prompt.index,
    }


def turn_rows(trajectory: Trajectory, codec: TextCodec) -> list[dict[str, Any]]:
    """Runs of tokens of an episode, in order: those of the policy, which are trained on, and given ones.

    Returns:
        For each run: trained, segment (from 0), text with special tokens, tokens. A run that begins a segment
        is its prompt.
    """
    rows = []
    for number, segment in enumerate(trajectory.rows()):
        rows.append(_run(False, number, list(segment.prompt_ids), codec))
        ids, start = list(segment.response_ids), 0
        for trained, run in groupby(segment.response_mask):
            count = len(list(run))
            rows.append(_run(trained, number, ids[start : start + count], codec))
            start += count
    return rows


def _run(trained: bool, segment: int, ids: list[int], codec: TextCodec) -> dict[str, Any]:
    return {"trained": trained, "segment": segment, "text": codec.decode_all(ids), "tokens": len(ids)}


def answer_row(trajectory: Trajectory, codec: TextCodec) -> dict[str, Any]:
    """One answer of an evaluation: `sample_row` with the messages and the place of the prompt.

    Returns:
        source, index: data set and number of the row that the prompt is from.
        messages: of a chat prompt, all of them; None for a text.
        conversation: of an episode, all messages.
        finish: stop, or length if the answer was cut off.
        All of `sample_row` except `group`.
    """
    row, prompt = sample_row(trajectory, codec), trajectory.prompt
    del row["group"]
    if trajectory.episode is not None:
        row["conversation"] = row.pop("messages")
    return {
        "source": prompt.source,
        "index": prompt.index,
        "messages": None if isinstance(prompt.content, str) else prompt.content,
        "finish": "length" if trajectory.truncated else "stop",
        **row,
    }
