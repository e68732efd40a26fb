"""One answer as a row for readers and programs."""

from __future__ import annotations

from typing import Any

from verl.data.trajectory import Trajectory
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
        reference, reward, scores, truncated, mean_logprob, group, outcome, detail: see `Trajectory`.
    """
    t = trajectory
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
        "tokens": len(t.response_ids),
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "group": t.group,
        "outcome": t.outcome,
        "detail": t.detail,
        "columns": t.prompt.columns,
        **({"extras": t.extras} if t.extras else {}),
    }


def answer_row(trajectory: Trajectory, codec: TextCodec) -> dict[str, Any]:
    """One answer of an evaluation: `sample_row` with the messages and the place of the prompt.

    Returns:
        source, index: data set and number of the row that the prompt is from.
        messages: of a chat prompt, all of them; None for a text.
        finish: stop, or length if the answer was cut off.
        All of `sample_row` except `group`.
    """
    row, prompt = sample_row(trajectory, codec), trajectory.prompt
    del row["group"]
    return {
        "source": prompt.source,
        "index": prompt.index,
        "messages": None if isinstance(prompt.content, str) else prompt.content,
        "finish": "length" if trajectory.truncated else "stop",
        **row,
    }
