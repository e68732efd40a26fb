"""Parses the events that an SGLang server streams for one request, with the weight version of each token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from verl.rollout.inference_server import TokenChunk
from verl.utils.sampling_types import FinishReason

# With logits that are not finite, SGLang ends an answer as if by a stop text, whose next id is not in the
# vocabulary.
_NAN_MARK = "NaN happen"
_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class SGLangStream:
    """State of one stream, which has new tokens in each event, or all tokens so far.

    Args:
        truncates: take the logprobs of a truncated distribution, which SGLang gives beside its usual ones.

    Attributes:
        is_finished: the last event was parsed.
    """

    def __init__(self, *, truncates: bool) -> None:
        self._truncates = truncates
        self._num_tokens = 0
        self.is_finished = False

    def parse(self, event: Mapping[str, Any]) -> list[TokenChunk]:
        """Parse one event into chunks of one weight version each.

        Raises:
            ValueError: the event contradicts itself, or the model's logits are not finite.
            KeyError, TypeError, IndexError: it is not an event of SGLang.
        """
        meta = event["meta_info"]
        start, self._num_tokens = self._num_tokens, meta["completion_tokens"]
        num_new = self._num_tokens - start
        ids = last_items(event["output_ids"], num_new)
        entries = last_items(meta["output_token_logprobs"], num_new)
        if [entry[1] for entry in entries] != list(ids):
            raise ValueError(f"logprobs of {[entry[1] for entry in entries]} for the ids {list(ids)}")
        logprobs: Sequence[float] = [entry[0] for entry in entries]
        if self._truncates and num_new:
            logprobs = last_items(meta["output_token_sampling_logprobs"], num_new)
        chunks = [
            TokenChunk(tuple(ids[first:stop]), tuple(logprobs[first:stop]), None, version)
            for first, stop, version in version_spans(meta, start, self._num_tokens)
        ]
        finish = meta["finish_reason"]
        if finish is None:
            return chunks
        if _NAN_MARK in str(finish.get("matched", "")):
            raise ValueError("the model's logits are not finite")
        self.is_finished = True
        last = chunks.pop() if chunks else TokenChunk()
        reason, num_reused = _FINISH_REASONS[finish["type"]], meta.get("cached_tokens")
        end = TokenChunk(last.token_ids, last.logprobs, reason, last.version, num_reused=num_reused)
        return [*chunks, end]


def last_items(items: Sequence[Any], count: int) -> Sequence[Any]:
    """The last `count` items: the new ones, if an event has new tokens alone or all so far."""
    if not 0 <= count <= len(items):
        raise ValueError(f"{count} new tokens, but {len(items)} ids or logprobs")
    return items[len(items) - count :]


def version_spans(meta: Mapping[str, Any], start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
    """Spans of one weight version among the tokens from `start` to `stop`.

    SGLang gives the version of each token in the last event; others have that of the time of the event.

    Yields:
        First and last bound of a span, counted from `start`, and its version; None: not a number, as in a
        server that was never given weights.
    """
    spans = meta.get("weight_versions") or [
        {"start": start, "end": stop, "version": meta.get("weight_version")}
    ]
    for span in spans:
        first, end, version = max(span["start"], start), min(span["end"], stop), span["version"]
        if first < end:
            is_number = isinstance(version, str) and version.isdecimal()
            yield first - start, end - start, int(version) if is_number else None
