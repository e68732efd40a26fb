"""An answer that several engines may sample, one after the other: what there is of it, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from verl.rollout.engine import TokenChunk
from verl.utils.sampling_types import Completion, FinishReason, SamplingParams
from verl.utils.tokens import TextCodec


@dataclass
class InflightRequest:
    """What has been sampled of an answer, by whichever engines.

    Attributes:
        params: how it is sampled.
        codec: of the policy.
        moves: engines that failed at it.
    """

    params: SamplingParams
    codec: TextCodec
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    has_logprobs: bool = True
    finish_reason: FinishReason | None = None
    text: str | None = None
    num_migrations: int = 0
    _num_seen: int = 0

    def add(self, chunk: TokenChunk, version: int) -> None:
        """Some more tokens, of a version of the weights; what the engine went on after did not end it."""
        self._num_seen = len(self.token_ids)
        self.token_ids += chunk.token_ids
        self.has_logprobs = self.has_logprobs and chunk.logprobs is not None
        self.logprobs += chunk.logprobs or [0.0] * len(chunk.token_ids)
        self.versions += [version] * len(chunk.token_ids)
        self.text = chunk.text if chunk.text is not None else self.text

    def restart(self) -> int:
        """Throws away what was sampled; how many tokens that were."""
        thrown = len(self.token_ids)
        self.token_ids, self.logprobs, self.versions, self.text, self.has_logprobs = [], [], [], None, True
        self._num_seen = 0
        return thrown

    def finish_if_stopped(self) -> None:
        """Ends it where an engine had no time to, or where its stop text began on another engine, after the
        token that ends it.

        Only tokens of the last `add` are looked at.
        """
        ids, params = self.token_ids, self.params
        window = max((len(stop.encode()) for stop in params.stop), default=0) + 8
        for length in range(self._num_seen + 1, len(ids) + 1):
            tail = self.codec.decode(ids[max(0, length - window) : length]) if params.stop else ""
            if ids[length - 1] in params.stop_ids or any(stop in tail for stop in params.stop):
                self._cut(length, "stop")
                return
        if self.finish_reason is None and len(ids) >= params.max_tokens:
            self.finish_reason = "length"

    def completion(self, version: int) -> Completion:
        """All of it; one that came as text is tokenized once, without logprobs, and is of a version."""
        assert self.finish_reason is not None
        if self.text is None or self.token_ids:
            logprobs = self.logprobs if self.has_logprobs else None
            return Completion(
                self.token_ids, logprobs, self.finish_reason, self.versions[0], versions=self.versions
            )
        ids: Sequence[int] = (
            self.codec.encode_answer(self.text)
            if self.finish_reason == "stop"
            else self.codec.encode(self.text)
        )
        reason: FinishReason = "length" if len(ids) > self.params.max_tokens else self.finish_reason
        return Completion(ids[: self.params.max_tokens], None, reason, version, self.text)

    def _cut(self, length: int, reason: FinishReason) -> None:
        for column in (self.token_ids, self.logprobs, self.versions):
            del column[length:]
        self.finish_reason = reason
