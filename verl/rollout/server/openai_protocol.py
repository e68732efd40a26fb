"""OpenAI's completions and chat completions as text in and text out of requests: what is understood, refused
and answered; no network.
"""

from __future__ import annotations

import difflib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError

from verl.rollout.embedded.async_generator import Token
from verl.utils.sampling_types import Prompt, SamplingParams
from verl.utils.tokens import TextCodec

_MAX_LOGPROBS, _MAX_ANSWERS = 20, 4096
# OpenAI's default for completions; a chat answer may take the rest of the context.
_COMPLETION_TOKENS = 16

# Say who asks, or what the answer is for: they change no answer.
_HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
    }
)
# Known elsewhere, not here: fine with the value that changes nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_SAMPLING = frozenset(
    {"n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"}
)
_OUTPUT = frozenset(
    {"model", "logprobs", "stream", "stream_options", "return_token_ids", "detokenize", "first_answer"}
)
_COMPLETION_FIELDS = _SAMPLING | _OUTPUT | {"prompt"}
_CHAT_FIELDS = _SAMPLING | _OUTPUT | {"messages", "max_completion_tokens", "top_logprobs"}
_MESSAGE_FIELDS = frozenset({"role", "content", "name"})


class APIError(Exception):
    """A request that is not answered, as OpenAI's error object says it."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ParsedRequest:
    """What a body asks for.

    Attributes:
        is_chat: chat completions, else completions.
        prompts: token ids of each.
        params: of each; one seed for all if it was given.
        num_likeliest: most likely tokens beside each logprob; None: no logprobs.
        streams: answer in events.
        usage_in_stream: count tokens in a last event.
        token_ids: give the ids of prompts and answers.
        detokenize: give texts.
        first_answer: number of the first of the `n` answers, which with the seed says how it is drawn.
    """

    is_chat: bool
    prompts: list[list[int]]
    params: list[SamplingParams]
    num_likeliest: int | None
    streams: bool
    usage_in_stream: bool
    token_ids: bool
    detokenize: bool
    first_answer: int

    @property
    def num_answers(self) -> int:
        """Of all prompts together."""
        return sum(params.n for params in self.params)

    def prompt_of(self, answer: int) -> int:
        """Number of the prompt of an answer."""
        return answer // self.params[0].n


@dataclass(frozen=True)
class RequestParser:
    """Reads bodies for one model.

    Attributes:
        name: that the model is served under.
        codec: its tokenizer.
        context: most tokens of prompt and answer together.
        vocabulary: ids are below.
        token_texts: of single tokens, as far as they were needed.
    """

    name: str
    codec: TextCodec
    context: int
    vocabulary: int
    token_texts: dict[int, str] = field(default_factory=dict)

    def read(self, body: Any, *, is_chat: bool) -> ParsedRequest:
        """What is asked for.

        Raises:
            Refusal: it cannot be answered, or would be answered otherwise than the body says.
        """
        if not isinstance(body, dict):
            raise APIError("need a JSON object as the body")
        _check_names(body, _CHAT_FIELDS if is_chat else _COMPLETION_FIELDS)
        body = {name: value for name, value in body.items() if value is not None}
        if _field(body, "model", str, self.name) != self.name:
            raise APIError(
                f"the model {body['model']!r} does not exist; this server has {self.name!r}",
                status=404,
                code="model_not_found",
            )
        prompts = [self._messages(body.get("messages"))] if is_chat else self._prompts(body.get("prompt"))
        options = _field(body, "stream_options", dict, {})
        if unknown := sorted(options.keys() - {"include_usage"}):
            raise APIError(
                f"unknown stream option {unknown[0]!r}; include_usage is known", param="stream_options"
            )
        return ParsedRequest(
            is_chat,
            prompts,
            self._params(body, prompts, is_chat=is_chat),
            _num_likeliest(body, is_chat=is_chat),
            _field(body, "stream", bool, False),
            _field(options, "include_usage", bool, False),
            _field(body, "return_token_ids", bool, False),
            _field(body, "detokenize", bool, True),
            _integer(body, "first_answer", 0, 0, 2**62) or 0,
        )

    def _params(
        self, body: Mapping[str, Any], prompts: Sequence[Sequence[int]], *, is_chat: bool
    ) -> list[SamplingParams]:
        stop = body.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise APIError("need stop as a text or a list of texts, none empty", param="stop")
        seed = _integer(body, "seed", None, -(2**63), 2**63 - 1)
        top_k = _integer(body, "top_k", 0, -1, 2**31)
        common = SamplingParams(
            temperature=_number(body, "temperature", 1.0, lambda x: x >= 0, "at least 0"),
            top_p=_number(body, "top_p", 1.0, lambda x: 0 < x <= 1, "above 0 and at most 1"),
            top_k=max(0, top_k or 0),
            min_p=_number(body, "min_p", 0.0, lambda x: 0 <= x <= 1, "from 0 to 1"),
            n=_integer(body, "n", 1, 1, _MAX_ANSWERS) or 1,
            stop=tuple(stop),
            # One that the model has no output for never comes; some tokenizers know such.
            stop_ids=tuple(
                i
                for i in self._whole(body.get("stop_token_ids", []), "stop_token_ids")
                if 0 <= i < self.vocabulary
            ),
        )
        limit = self._max_tokens(body, is_chat=is_chat)
        return [self._fitting(common, prompt, limit, seed) for prompt in prompts]

    def _max_tokens(self, body: Mapping[str, Any], *, is_chat: bool) -> int | None:
        names = [name for name in ("max_completion_tokens", "max_tokens") if name in body]
        limits = [_integer(body, name, None, 1, 2**31) for name in names]
        if len(set(limits)) > 1:
            raise APIError(
                "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens"
            )
        return limits[0] if limits else None if is_chat else _COMPLETION_TOKENS

    def _fitting(
        self, params: SamplingParams, prompt: Sequence[int], limit: int | None, seed: int | None
    ) -> SamplingParams:
        room = self.context - len(prompt)
        if room < (limit or 1):
            raise APIError(
                f"this model's context is {self.context} tokens, but the prompt has {len(prompt)} and the answer may get {limit or 1}; "
                "shorten the prompt or lower max_tokens",
                param="messages" if limit is None else "max_tokens",
                code="context_length_exceeded",
            )
        # Without a seed, equal prompts get different answers.
        return replace(params, max_tokens=limit or room, seed=secrets.randbits(62) if seed is None else seed)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if prompt is None or prompt == []:
            raise APIError("need a prompt: a text, token ids, or a list of either", param="prompt")
        many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        prompts = [
            self.codec.encode(one, special_tokens=True) if isinstance(one, str) else self._ids(one, "prompt")
            for one in many
        ]
        if not all(prompts):
            raise APIError("need prompts of at least one token", param="prompt")
        return prompts

    def _whole(self, ids: Any, name: str) -> list[int]:
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise APIError(
                f"need {name} as token ids{', a text, or a list of either' if name == 'prompt' else ''}",
                param=name,
            )
        return ids

    def _ids(self, ids: Any, name: str) -> list[int]:
        ids = self._whole(ids, name)
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise APIError(
                f"need token ids from 0 to {self.vocabulary - 1} in {name}, got {wrong[0]}", param=name
            )
        return ids

    def _messages(self, messages: Any) -> list[int]:
        if not isinstance(messages, list) or not messages:
            raise APIError("need messages: a list of at least one message", param="messages")
        read = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        try:
            return self.codec.encode_prompt(Prompt(read))
        except (ValueError, TemplateError) as error:
            raise APIError(
                f"the chat template does not take these messages: {error}", param="messages"
            ) from error


def _check_names(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in body.items():
        if name in known or name in _HARMLESS or value is None or value in _WITHOUT_EFFECT.get(name, ()):
            continue
        if name in _WITHOUT_EFFECT:
            fine = " or ".join(repr(one) for one in _WITHOUT_EFFECT[name])
            raise APIError(
                f"{name} is not supported; leave it out, or give {fine}",
                param=name,
                code="unsupported_parameter",
            )
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
        raise APIError(
            f"{name} is not a field that this server knows{hint}", param=name, code="unknown_parameter"
        )


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise APIError(f"need {place} with a role and content", param=place)
    if unknown := sorted(
        name for name, value in message.items() if name not in _MESSAGE_FIELDS and value not in (None, [])
    ):
        raise APIError(
            f"{place}.{unknown[0]} is not supported; a message has role, content and name", param=place
        )
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise APIError(f"need text alone in the content of {place}", param=place)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise APIError(f"need a text as the content of {place}", param=place)
    return {**{name: value for name, value in message.items() if name in _MESSAGE_FIELDS}, "content": content}


def _field(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind):
        raise APIError(f"need {name} as {kind.__name__}, got {value!r}", param=name)
    return value


def _integer(body: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = body.get(name, default)
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise APIError(f"need {name} as a whole number from {low} to {high}, got {value!r}", param=name)
    return value


def _number(
    body: Mapping[str, Any], name: str, default: float, fits: Callable[[float], bool], bounds: str
) -> float:
    value = body.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or not fits(value):
        raise APIError(f"need {name} as a number, {bounds}, got {value!r}", param=name)
    return float(value)


def _num_likeliest(body: Mapping[str, Any], *, is_chat: bool) -> int | None:
    if not is_chat:
        return _integer(body, "logprobs", None, 0, _MAX_LOGPROBS)
    wanted = _field(body, "logprobs", bool, False)
    count = _integer(body, "top_logprobs", None, 0, _MAX_LOGPROBS)
    if count is not None and not wanted:
        raise APIError("top_logprobs needs logprobs: true", param="top_logprobs")
    return (count or 0) if wanted else None


class AnswerText:
    """The text of an answer while its tokens come, up to the first stop text; what might still change is held
    back.

    Attributes:
        tokens: so far.
        num_characters: of the texts of single tokens, those in no text included.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str]) -> None:
        self.tokens: list[Token] = []
        self.num_characters = 0
        self._codec, self._stop = codec, stop
        self._ids: list[int] = []
        # Tokens from `_start` on are decoded together; the text of those before `_read` was given out.
        self._start = self._read = 0
        self._held = ""

    def add(self, ids: Sequence[int], *, is_last: bool) -> str:
        """Takes more tokens; what can be said now."""
        self._ids += ids
        before = self._codec.decode(self._ids[self._start : self._read])
        after = self._codec.decode(self._ids[self._start :])
        # The character of a text that ends in this sign may need more tokens.
        if is_last or not after.endswith("\N{REPLACEMENT CHARACTER}"):
            self._held += after[len(before) :]
            self._start, self._read = self._read, len(self._ids)
        cuts = [self._held.find(stop) for stop in self._stop if stop in self._held]
        keep = 0 if is_last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        end = min(cuts) if cuts else len(self._held) - keep
        said, self._held = self._held[:end], self._held[end:]
        return said


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop text begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class ResponseWriter:
    """Writes the answers to one request.

    Attributes:
        asked: the request.
        name: of the model.
        codec: its tokenizer.
        token_texts: see `RequestParser`.
        identity: of the request.
        created_s: seconds since the epoch.
    """

    asked: ParsedRequest
    name: str
    codec: TextCodec
    token_texts: dict[int, str]
    identity: str
    created_s: int

    @classmethod
    def of(cls, asked: ParsedRequest, reader: RequestParser) -> ResponseWriter:
        """With a new identity."""
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        return cls(
            asked,
            reader.name,
            reader.codec,
            reader.token_texts,
            f"{kind}-{secrets.token_hex(12)}",
            int(time.time()),
        )

    def whole(self, answers: Sequence[Sequence[Token]]) -> dict[str, Any]:
        """The body with all answers."""
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        choices = [self._choice(i, tokens) for i, tokens in enumerate(answers)]
        body = {**self._head(kind), "choices": choices, "usage": self.usage(answers)}
        if self.asked.is_chat and self.asked.token_ids:
            body["prompt_token_ids"] = self.asked.prompts[0]
        return {**body, "weight_version": answers[-1][-1].version}

    def usage(self, answers: Sequence[Sequence[Token]]) -> dict[str, int]:
        """Counts of tokens; a prompt counts once for all its answers."""
        prompt, answered = sum(map(len, self.asked.prompts)), sum(map(len, answers))
        return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}

    def opening(self) -> list[dict[str, Any]]:
        """The first events of a chat: who speaks."""
        if not self.asked.is_chat:
            return []
        choices = [
            {
                "index": i,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            for i in range(self.asked.num_answers)
        ]
        prompt = {"prompt_token_ids": self.asked.prompts[0]} if self.asked.token_ids else {}
        return [{**self._head("chat.completion.chunk"), "choices": [choice], **prompt} for choice in choices]

    def event(self, answer: int, state: AnswerText, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """An event with some more tokens of one version, which are noted in the state; none if they say
        nothing yet.
        """
        is_first, start, is_last = (
            not state.tokens,
            state.num_characters,
            tokens[-1].finish_reason is not None,
        )
        ids = [token.token_id for token in tokens]
        text = state.add(ids, is_last=is_last) if self.asked.detokenize else ""
        state.tokens += tokens
        if not (text or is_last or self.asked.token_ids or self.asked.num_likeliest is not None):
            return None
        logprobs = self._logprobs(tokens, start)
        state.num_characters += sum(len(self._text(i)) for i in ids)
        content: dict[str, Any] = (
            {"delta": {"content": text} if text else {}} if self.asked.is_chat else {"text": text}
        )
        choice = {"index": answer, **content, "logprobs": logprobs, "finish_reason": tokens[-1].finish_reason}
        if self.asked.token_ids:
            choice["token_ids"] = ids
        if self.asked.token_ids and is_first and not self.asked.is_chat:
            choice["prompt_token_ids"] = self.asked.prompts[self.asked.prompt_of(answer)]
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "weight_version": tokens[-1].version}

    def closing(self, answers: Sequence[Sequence[Token]]) -> list[dict[str, Any]]:
        """The last event, if it is asked for: the counts."""
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        return (
            [{**self._head(kind), "choices": [], "usage": self.usage(answers)}]
            if self.asked.usage_in_stream
            else []
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created_s, "model": self.name}

    def _choice(self, answer: int, tokens: Sequence[Token]) -> dict[str, Any]:
        ids = [token.token_id for token in tokens]
        text = self.codec.decode_answer(ids, self.asked.params[0].stop) if self.asked.detokenize else ""
        content = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.asked.is_chat
            else {"text": text}
        )
        choice: dict[str, Any] = {
            "index": answer,
            **content,
            "logprobs": self._logprobs(tokens, 0),
            "finish_reason": tokens[-1].finish_reason,
        }
        if self.asked.token_ids:
            choice["token_ids"] = ids
        if self.asked.token_ids and not self.asked.is_chat:
            choice["prompt_token_ids"] = self.asked.prompts[self.asked.prompt_of(answer)]
        return choice

    def _logprobs(self, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
        if self.asked.num_likeliest is None:
            return None
        if self.asked.is_chat:
            return {"content": [self._with_likeliest(token) for token in tokens], "refusal": None}
        texts = [self._text(token.token_id) for token in tokens]
        starts = [start]
        for text in texts:
            starts.append(starts[-1] + len(text))
        likeliest = [{self._text(i): logprob for i, logprob in reversed(token.likeliest)} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": likeliest if self.asked.num_likeliest else None,
            "text_offset": starts[:-1],
        }

    def _with_likeliest(self, token: Token) -> dict[str, Any]:
        return {
            **self._with_bytes(token.token_id, token.logprob),
            "top_logprobs": [self._with_bytes(token_id, logprob) for token_id, logprob in token.likeliest],
        }

    def _with_bytes(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        # A part of a character has no text of its own, and its bytes are not known.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _text(self, token_id: int) -> str:
        if not self.asked.detokenize:
            return ""
        if token_id not in self.token_texts:
            self.token_texts[token_id] = str(
                self.codec.tokenizer.decode([token_id], skip_special_tokens=False)
            )
        return self.token_texts[token_id]
