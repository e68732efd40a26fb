"""Parses the events that a vLLM server streams for one answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from verl.rollout.inference_server import TokenChunk
from verl.rollout.vllm.options import FINISH_REASONS


def parse_event(event: dict[str, Any], *, prompt_ids: Sequence[int], vocab_size: int) -> TokenChunk:
    """Parse one event of a streamed completion; a chunk without tokens and reason says nothing new.

    Args:
        event: with at most one choice.
        prompt_ids: of the request, compared with those that the server says it read.
        vocab_size: token ids are below.

    Raises:
        ValueError: it is not a valid chunk of the answer.
    """
    if not event.get("choices"):
        return TokenChunk()
    choice = event["choices"][0]
    read_ids = choice.get("prompt_token_ids")
    if read_ids is not None and read_ids != list(prompt_ids):
        raise ValueError(f"read another prompt of {len(read_ids)} tokens, not that of {len(prompt_ids)}")
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if ids is None or len(logprobs) != len(ids):
        raise ValueError(f"gave tokens {ids} with {len(logprobs)} logprobs")
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"gave tokens outside of the vocabulary of {vocab_size}: {ids}")
    # A logprob that is NaN arrives as null: vLLM's models of responses write it so.
    if not all(isinstance(logprob, float | int) and math.isfinite(logprob) for logprob in logprobs):
        raise ValueError(f"gave logprobs that are not finite: {logprobs}; look at the last updates")
    if reason is not None and reason not in FINISH_REASONS:
        raise ValueError(f"ended an answer with {reason!r}")
    return TokenChunk(ids, logprobs, FINISH_REASONS.get(reason))
