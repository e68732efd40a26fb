"""What an SGLang server streams for one request, as chunks: deltas or everything so far, with the versions
that it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from verl.rollout.engine import TokenChunk
from verl.utils.sampling_types import FinishReason

# SGLang ends an answer so, as if by a stop text, whose next id is not in the vocabulary.
_BROKEN = "NaN happen"
_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class SGLangStream:
    """The tokens of one request as they come.

    Args:
        truncates: whether the logprobs are those of a truncated distribution, which SGLang gives beside its
            usual ones.

    Attributes:
        is_finished: whether the last chunk has come.
    """

    def __init__(self, *, truncates: bool) -> None:
        self._truncates = truncates
        self._num_tokens = 0
        self.is_finished = False

    def take(self, event: Mapping[str, Any]) -> list[TokenChunk]:
        """The new tokens of an event, in several chunks if their versions differ.

        Raises:
            ValueError: its parts contradict each other, or the model is broken.
            KeyError, TypeError, IndexError: it is not an event of SGLang.
        """
        meta = event["meta_info"]
        first, self._num_tokens = self._num_tokens, meta["completion_tokens"]
        num_new = self._num_tokens - first
        ids = _last(event["output_ids"], num_new)
        entries = _last(meta["output_token_logprobs"], num_new)
        if [entry[1] for entry in entries] != list(ids):
            raise ValueError(f"logprobs of {[entry[1] for entry in entries]} for the ids {list(ids)}")
        own = (
            _last(meta["output_token_sampling_logprobs"], num_new)
            if self._truncates and num_new
            else [entry[0] for entry in entries]
        )
        reason = self._reason(meta["finish_reason"])
        spans = list(_spans(meta, first, self._num_tokens))
        chunks = [
            TokenChunk(tuple(ids[start:stop]), tuple(own[start:stop]), None, version)
            for start, stop, version in spans
        ]
        if reason is None:
            return chunks
        self.is_finished = True
        last = chunks.pop() if chunks else TokenChunk()
        return [*chunks, TokenChunk(last.token_ids, last.logprobs, reason, last.version)]

    def _reason(self, given: Mapping[str, Any] | None) -> FinishReason | None:
        if given is None:
            return None
        if _BROKEN in str(given.get("matched", "")):
            raise ValueError("the model gives numbers that are none")
        return _REASONS[given["type"]]


def _last(items: Sequence[Any], count: int) -> Sequence[Any]:
    """The new ones, of a delta or of everything so far."""
    if not 0 <= count <= len(items):
        raise ValueError(f"{count} new tokens, but {len(items)} ids or logprobs")
    return items[len(items) - count :]


def _spans(meta: Mapping[str, Any], first: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
    """(start, stop, version) of the new tokens: by token where SGLang says it, which it does at the end, else
    the version of now.
    """
    spans = meta.get("weight_versions") or [
        {"start": first, "end": stop, "version": meta.get("weight_version")}
    ]
    for span in spans:
        start, end = max(span["start"], first), min(span["end"], stop)
        if start < end:
            yield start - first, end - first, _number(span["version"])


def _number(version: Any) -> int | None:
    """Versions of this project are numbers; a server that was given none has another text."""
    return int(version) if isinstance(version, str) and version.isdecimal() else None
