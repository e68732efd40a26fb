"""A request that several engines may sample in turn: the tokens so far, and when it is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from verl.rollout.inference_server import EngineError, TokenChunk
from verl.rollout.pool.replica import Replica
from verl.utils.sampling_types import Completion, FinishReason, SamplingParams
from verl.utils.tokens import TextCodec

# A request fails when more engines than this have failed at it.
_MAX_MIGRATIONS = 8
# Larger than the sample index of any completion.
_INDEX_STRIDE = 2**20


@dataclass
class InflightRequest:
    """One completion of a prompt, sampled by one engine or by several in turn.

    Attributes:
        prompt_ids: token ids of the prompt.
        params: how it is sampled; with the stop ids of the tokenizer, and `n` 1.
        codec: of the policy.
        token_ids: sampled so far, with `logprobs` and the `versions` of the weights that sampled them.
        has_logprobs: all engines gave logprobs; otherwise those in `logprobs` are not valid.
        finish_reason: None while it is incomplete.
        text: the completion, from an engine that returns text only.
        num_migrations: engines that failed at it.
        num_reused: prompt tokens that the engine of its last token had already; None: it did not say.
    """

    prompt_ids: list[int]
    params: SamplingParams
    codec: TextCodec
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    has_logprobs: bool = True
    finish_reason: FinishReason | None = None
    text: str | None = None
    num_migrations: int = 0
    num_reused: int | None = None
    # Tokens before the last `add`, which are known not to end the completion.
    _num_checked: int = 0

    def __str__(self) -> str:
        return f"answer {self.params.sample_index} to a prompt of {len(self.prompt_ids)} tokens"

    async def sample_on(self, replica: Replica, newest_version: Callable[[], int]) -> None:
        """Sample the missing tokens on one replica.

        Args:
            replica: to sample on.
            newest_version: of the policy, for tokens of an engine that does not know its version.

        Raises:
            EngineError: the completion did not become complete.
        """
        have = len(self.token_ids)
        params = self.params
        if have:
            params = replace(params, max_tokens=params.max_tokens - have)
            # An engine whose random numbers restart with each request must not repeat those of the first
            # tokens.
            shift = 0 if replica.engine.position_seeded else _INDEX_STRIDE * have
            params = replace(params, sample_index=params.sample_index + shift)
        row = [*self.prompt_ids, *self.token_ids]
        async with aclosing(replica.sample(row, params)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                known = (chunk.version, replica.version, newest_version())
                self.add(chunk, next(version for version in known if version is not None))
                if chunk.finish_reason is not None and not self.token_ids and self.text is None:
                    break
                self.finish_reason = chunk.finish_reason
                if have:
                    # The engine has not seen the beginning of a stop text that another engine sampled.
                    self.finish_if_stopped()
                if self.finish_reason is not None:
                    return
        raise EngineError(f"engine {replica.name} ended an answer without a token or without saying why")

    def add(self, chunk: TokenChunk, version: int) -> None:
        """Append tokens that a version of the weights sampled."""
        self._num_checked = len(self.token_ids)
        self.token_ids += chunk.token_ids
        self.has_logprobs = self.has_logprobs and chunk.logprobs is not None
        self.logprobs += chunk.logprobs or [0.0] * len(chunk.token_ids)
        self.versions += [version] * len(chunk.token_ids)
        self.text = chunk.text if chunk.text is not None else self.text
        if chunk.num_reused is not None:
            # Behind a migration an engine also reads tokens that another one sampled.
            self.num_reused = min(chunk.num_reused, len(self.prompt_ids))

    def restart(self) -> int:
        """Discard all sampled tokens; return how many."""
        discarded = len(self.token_ids)
        self.token_ids, self.logprobs, self.versions, self.text, self.has_logprobs = [], [], [], None, True
        self._num_checked = 0
        return discarded

    def interrupt(self) -> int:
        """Leave an engine that loads weights; return how many tokens will be computed again."""
        self.finish_if_stopped()
        is_resumed = self.token_ids and self.finish_reason is None
        return len(self.prompt_ids) + len(self.token_ids) if is_resumed else 0

    def migrate(self, error: EngineError) -> None:
        """Leave an engine that failed.

        Raises:
            RuntimeError: too many engines have failed.
        """
        self.num_migrations += 1
        if self.num_migrations > _MAX_MIGRATIONS:
            raise RuntimeError(
                f"{self} failed on {self.num_migrations} engines in turn, with {len(self.token_ids)} of "
                f"at most {self.params.max_tokens} tokens sampled; the last: {error}"
            ) from error
        self.finish_if_stopped()

    def finish_if_stopped(self) -> None:
        """Finish if the tokens of the last `add` contain a stop, and drop the tokens after it.

        An engine that fails or is interrupted may have sampled the stop, but not reported it.
        """
        ids, params = self.token_ids, self.params
        # A token spells at least one byte, so these tokens hold the longest stop text and some special
        # tokens.
        window = max((len(stop.encode()) for stop in params.stop), default=0) + 8
        for length in range(self._num_checked + 1, len(ids) + 1):
            tail = self.codec.decode(ids[max(0, length - window) : length]) if params.stop else ""
            if ids[length - 1] in params.stop_ids or any(stop in tail for stop in params.stop):
                del ids[length:], self.logprobs[length:], self.versions[length:]
                self.finish_reason = "stop"
                return
        if self.finish_reason is None and len(ids) >= params.max_tokens:
            self.finish_reason = "length"

    def completion(self, version: int) -> Completion:
        """The complete request.

        Args:
            version: of a completion that came as text, which is tokenized here and has no logprobs.
        """
        assert self.finish_reason is not None
        if self.text is None or self.token_ids:
            logprobs = self.logprobs if self.has_logprobs else None
            return Completion(
                self.token_ids,
                logprobs,
                self.finish_reason,
                self.versions[0],
                versions=self.versions,
                num_reused=self.num_reused,
            )
        ends = self.finish_reason == "stop"
        ids: Sequence[int] = self.codec.encode_answer(self.text) if ends else self.codec.encode(self.text)
        reason: FinishReason = "length" if len(ids) > self.params.max_tokens else self.finish_reason
        return Completion(ids[: self.params.max_tokens], None, reason, version, self.text)
