"""Responses of OpenAI's API: whole bodies and streamed events of completions and chat completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.rollout.embedded.async_generator import Token
from verl.rollout.server.openai_request import ParsedRequest
from verl.utils.tokens import TextCodec


class IncrementalDetokenizer:
    """Text of an answer while its tokens arrive, up to the first stop text.

    Text that later tokens may still change is held back: an incomplete character, or the beginning of a stop
    text.

    Attributes:
        tokens: all so far.
        num_characters: total length of the texts of the single tokens, after a stop text included.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self.tokens: list[Token] = []
        self.num_characters = 0
        self._codec, self._stop = codec, stop
        self._ids: list[int] = []
        # Tokens from `_start` on are decoded together, since some tokenizers add or drop spaces by context.
        # The text of those before `_decoded` has been returned or held back.
        self._start = self._decoded = 0
        self._held_back = ""

    def add(self, ids: Sequence[int], *, is_last: bool) -> str:
        """Add tokens and return the text that is certain now."""
        self._ids += ids
        before = self._codec.decode(self._ids[self._start : self._decoded])
        after = self._codec.decode(self._ids[self._start :])
        # A text that ends with this sign may end within a character.
        if is_last or not after.endswith("\N{REPLACEMENT CHARACTER}"):
            self._held_back += after[len(before) :]
            self._start, self._decoded = self._decoded, len(self._ids)
        cuts = [self._held_back.find(stop) for stop in self._stop if stop in self._held_back]
        overlaps = (stop_overlap(self._held_back, stop) for stop in self._stop)
        num_uncertain = 0 if is_last else max(overlaps, default=0)
        end = min(cuts) if cuts else len(self._held_back) - num_uncertain
        text, self._held_back = self._held_back[:end], self._held_back[end:]
        return text


def stop_overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class ResponseWriter:
    """Writes the response to one request, as plain dicts for JSON.

    Attributes:
        request: that is answered.
        name: of the model.
        codec: tokenizer of the model.
        token_texts: see `RequestParser`.
        response_id: a new one for each request.
        created_s: seconds since the epoch.
    """

    request: ParsedRequest
    name: str
    codec: TextCodec
    token_texts: dict[int, str]
    response_id: str
    created_s: int

    @classmethod
    def create(
        cls,
        request: ParsedRequest,
        name: str,
        codec: TextCodec,
        token_texts: dict[int, str] | None = None,
    ) -> ResponseWriter:
        """Create a writer with a new id."""
        prefix = "chatcmpl" if request.is_chat else "cmpl"
        return cls(
            request,
            name,
            codec,
            {} if token_texts is None else token_texts,
            f"{prefix}-{secrets.token_hex(12)}",
            int(time.time()),
        )

    def body(self, answers: Sequence[Sequence[Token]]) -> dict[str, Any]:
        """Body with all answers, for a request that does not stream."""
        kind = "chat.completion" if self.request.is_chat else "text_completion"
        choices = []
        for answer, tokens in enumerate(answers):
            ids = [token.token_id for token in tokens]
            text = (
                self.codec.decode_answer(ids, self.request.params[0].stop) if self.request.detokenize else ""
            )
            message = {"role": "assistant", "content": text, "refusal": None}
            content: dict[str, Any] = {"message": message} if self.request.is_chat else {"text": text}
            choices.append(self.choice(answer, content, tokens, num_characters=0, is_first=True))
        body = {**self.head(kind), "choices": choices, "usage": self.usage(answers)}
        if self.request.is_chat and self.request.token_ids:
            body["prompt_token_ids"] = self.request.prompts[0]
        return {**body, "weight_version": answers[-1][-1].version}

    def usage(self, answers: Sequence[Sequence[Token]]) -> dict[str, Any]:
        """Token counts; a prompt counts once for all its answers."""
        prompt, answered = sum(map(len, self.request.prompts)), sum(map(len, answers))
        count = self.request.num_answers // len(self.request.prompts)
        # The first answer to each prompt: the others share what was computed for it.
        cached = sum(tokens[0].num_reused for tokens in answers[::count] if tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answered,
            "total_tokens": prompt + answered,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def first_events(self) -> list[dict[str, Any]]:
        """Events before the first token: the role of each answer of a chat."""
        if not self.request.is_chat:
            return []
        prompt = {"prompt_token_ids": self.request.prompts[0]} if self.request.token_ids else {}
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            for i in range(self.request.num_answers)
        ]
        return [{**self.head("chat.completion.chunk"), "choices": [choice], **prompt} for choice in choices]

    def token_event(
        self, answer: int, detokenizer: IncrementalDetokenizer, tokens: Sequence[Token]
    ) -> dict[str, Any] | None:
        """Event for new tokens of one version, which are added to the detokenizer.

        Returns:
            None if the client learns nothing from them yet.
        """
        is_first, is_last = not detokenizer.tokens, tokens[-1].finish_reason is not None
        ids = [token.token_id for token in tokens]
        text = detokenizer.add(ids, is_last=is_last) if self.request.detokenize else ""
        detokenizer.tokens += tokens
        if not (text or is_last or self.request.token_ids or self.request.num_top_logprobs is not None):
            return None
        content: dict[str, Any] = {"text": text}
        if self.request.is_chat:
            content = {"delta": {"content": text} if text else {}}
        num_characters = detokenizer.num_characters
        choice = self.choice(answer, content, tokens, num_characters=num_characters, is_first=is_first)
        detokenizer.num_characters += sum(len(self._token_text(i)) for i in ids)
        kind = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        return {**self.head(kind), "choices": [choice], "weight_version": tokens[-1].version}

    def last_events(self, answers: Sequence[Sequence[Token]]) -> list[dict[str, Any]]:
        """Events after the last token: the token counts, if they are requested."""
        if not self.request.usage_in_stream:
            return []
        kind = "chat.completion.chunk" if self.request.is_chat else "text_completion"
        return [{**self.head(kind), "choices": [], "usage": self.usage(answers)}]

    def head(self, kind: str) -> dict[str, Any]:
        """Fields that all bodies and events begin with."""
        return {"id": self.response_id, "object": kind, "created": self.created_s, "model": self.name}

    def choice(
        self,
        answer: int,
        content: dict[str, Any],
        tokens: Sequence[Token],
        *,
        num_characters: int,
        is_first: bool,
    ) -> dict[str, Any]:
        """One choice with some tokens of an answer, which begin after `num_characters`."""
        choice: dict[str, Any] = {
            "index": answer,
            **content,
            "logprobs": self._logprobs(tokens, num_characters),
            "finish_reason": tokens[-1].finish_reason,
        }
        if self.request.token_ids:
            choice["token_ids"] = [token.token_id for token in tokens]
        if self.request.token_ids and is_first and not self.request.is_chat:
            choice["prompt_token_ids"] = self.request.prompt_of(answer)
        return choice

    def _logprobs(self, tokens: Sequence[Token], num_characters: int) -> dict[str, Any] | None:
        if self.request.num_top_logprobs is None:
            return None
        if self.request.is_chat:
            entries = [
                {
                    **self._logprob_entry(token.token_id, token.logprob),
                    "top_logprobs": [self._logprob_entry(*likely) for likely in token.top_logprobs],
                }
                for token in tokens
            ]
            return {"content": entries, "refusal": None}
        texts = [self._token_text(token.token_id) for token in tokens]
        offsets = [num_characters]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        # The most likely token last: of two tokens with the same text, its logprob is the one that stays.
        top_logprobs = [
            {self._token_text(i): logprob for i, logprob in reversed(token.top_logprobs)} for token in tokens
        ]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top_logprobs if self.request.num_top_logprobs else None,
            "text_offset": offsets[:-1],
        }

    def _logprob_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token_id)
        # A token that is part of a character has no text of its own, and its bytes are not known.
        is_text = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_text else None}

    def _token_text(self, token_id: int) -> str:
        if not self.request.detokenize:
            return ""
        if token_id not in self.token_texts:
            text = self.codec.tokenizer.decode([token_id], skip_special_tokens=False)
            self.token_texts[token_id] = str(text)
        return self.token_texts[token_id]
