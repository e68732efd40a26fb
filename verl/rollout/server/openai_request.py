"""Requests of OpenAI's API: parses and checks the bodies of completions and chat completions."""

from __future__ import annotations

import difflib
import reprlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from verl.utils.sampling_types import SamplingParams
from verl.utils.tokens import TextCodec

# Name the caller or the purpose of a request: they change no answer.
_IGNORED_FIELDS = frozenset(
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
# Fields of other servers that are not supported here, accepted with values that have no effect.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}


B = TypeVar("B", bound=BaseModel)


class APIError(Exception):
    """An error that is sent to the client as OpenAI's error object.

    Attributes:
        status: of HTTP.
        param: field of the request that is wrong.
        code: OpenAI's name of the error.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def as_json(self) -> dict[str, Any]:
        """Body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _integer(default: int | None, low: int, high: int) -> Any:
    return Field(default, ge=low, le=high, description=f"a whole number from {low} to {high}")


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class RequestBody(BaseModel):
    """Fields of completions and chat completions; a description says what a value must be, for errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="a text")
    n: int = _integer(1, 1, 4096)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="a number, at least 0")
    top_p: float = Field(1.0, gt=0, le=1, description="a number, above 0 and at most 1")
    top_k: int = _integer(0, -1, 2**31)
    min_p: float = Field(0.0, ge=0, le=1, description="a number, from 0 to 1")
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False, description="a number, above 0")
    seed: int | None = _integer(None, -(2**63), 2**63 - 1)
    stop: str | list[str] = Field([], description="a text or a list of texts, none empty")
    stop_token_ids: list[int] = Field([], description="token ids")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(StreamOptions(), description="an object with include_usage")
    return_token_ids: bool = Field(False, description="true or false")
    detokenize: bool = Field(True, description="true or false")
    first_answer: int = _integer(0, 0, 2**62)


class CompletionBody(RequestBody):
    """Body of a request for completions."""

    prompt: str | list[int] | list[str | list[int]] = Field(
        description="token ids, a text, or a list of either"
    )
    # OpenAI's default, https://platform.openai.com/docs/api-reference/completions.
    max_tokens: int = _integer(16, 1, 2**31)
    logprobs: int | None = _integer(None, 0, 20)


class TextPart(BaseModel):
    """One part of the content of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(BaseModel):
    """A chat message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_empty_fields(cls, message: Any) -> Any:
        """Drop fields without a value, such as the `refusal` of OpenAI's own client.

        Raises:
            ValueError: a message without content and calls of tools.
        """
        if not isinstance(message, dict):
            return message
        kept = {name: value for name, value in message.items() if value not in (None, [])}
        if "content" not in kept and "role" in kept and "tool_calls" not in kept:
            raise ValueError("need content, or calls of tools")
        return kept

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"content": "", **self.model_dump(exclude_unset=True)}


class ChatBody(RequestBody):
    """Body of a request for chat completions."""

    messages: list[Message] = Field(
        min_length=1,
        description="a list of at least one message, each with a role and with text alone as its content",
    )
    tools: list[dict[str, Any]] = Field([], description="a list of tools, each an object")
    chat_template_kwargs: dict[str, Any] = Field({}, description="an object with variables of the template")
    add_generation_prompt: bool = Field(True, description="true or false")
    continue_final_message: bool = Field(False, description="true or false")
    max_tokens: int | None = _integer(None, 1, 2**31)
    max_completion_tokens: int | None = _integer(None, 1, 2**31)
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int | None = _integer(None, 0, 20)


@dataclass(frozen=True)
class ParsedRequest:
    """A request that passed all checks.

    Attributes:
        is_chat: chat completions, else completions.
        prompts: token ids of each.
        params: of each prompt; with one seed for all, if the request has one.
        num_top_logprobs: most likely tokens beside each logprob; None: no logprobs.
        streams: answer in events.
        usage_in_stream: send the token counts in a last event.
        token_ids: return the ids of prompts and answers.
        detokenize: return texts.
        first_answer: number of the first of the `n` answers; seed and number select the random numbers that
            an answer is sampled with.
    """

    is_chat: bool
    prompts: list[list[int]]
    params: list[SamplingParams]
    num_top_logprobs: int | None
    streams: bool
    usage_in_stream: bool
    token_ids: bool
    detokenize: bool
    first_answer: int

    @property
    def num_answers(self) -> int:
        """Answers to all prompts together."""
        return sum(params.n for params in self.params)

    def prompt_of(self, answer: int) -> list[int]:
        """Token ids of the prompt of an answer."""
        return self.prompts[answer // self.params[0].n]


@dataclass(frozen=True)
class RequestParser:
    """Parses request bodies for one model.

    Attributes:
        name: under which the model is served.
        codec: tokenizer of the model.
        context: most tokens of prompt and answer together.
        vocab_size: token ids are below.
        token_texts: texts of single tokens, filled as they are needed.
    """

    name: str
    codec: TextCodec
    context: int
    vocab_size: int
    token_texts: dict[int, str] = field(default_factory=dict)

    def parse(self, body: Any, *, is_chat: bool) -> ParsedRequest:
        """Parse the body of a request.

        Raises:
            APIError: it cannot be answered, or its answer would differ from what the body says.
        """
        parsed: RequestBody = validated(body, ChatBody if is_chat else CompletionBody)
        if parsed.model not in (None, self.name):
            raise APIError(
                f"the model {parsed.model!r} does not exist; this server has {self.name!r}",
                status=404,
                code="model_not_found",
            )
        if isinstance(parsed, ChatBody):
            if parsed.top_logprobs is not None and not parsed.logprobs:
                raise APIError("top_logprobs needs logprobs: true", param="top_logprobs")
            prompts, limit = [self._encode_chat(parsed)], max_chat_tokens(parsed)
            num_top_logprobs = (parsed.top_logprobs or 0) if parsed.logprobs else None
        else:
            assert isinstance(parsed, CompletionBody)
            prompts, limit = self._encode_prompts(parsed.prompt), parsed.max_tokens
            num_top_logprobs = parsed.logprobs
        return ParsedRequest(
            is_chat=is_chat,
            prompts=prompts,
            params=self._sampling_params(parsed, prompts, limit),
            num_top_logprobs=num_top_logprobs,
            streams=parsed.stream,
            usage_in_stream=parsed.stream_options.include_usage,
            token_ids=parsed.return_token_ids,
            detokenize=parsed.detokenize,
            first_answer=parsed.first_answer,
        )

    def _sampling_params(
        self, body: RequestBody, prompts: Sequence[Sequence[int]], limit: int | None
    ) -> list[SamplingParams]:
        """Sampling parameters of each prompt; without a limit an answer may fill the rest of the context."""
        stop = stop_texts(body)
        common = SamplingParams(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(0, body.top_k),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            n=body.n,
            stop=tuple(stop),
            # Some tokenizers know ids that the model has no output for; these are never sampled.
            stop_ids=tuple(
                i for i in [*body.stop_token_ids, *self.codec.token_ids_of(stop)] if 0 <= i < self.vocab_size
            ),
        )
        params = []
        for prompt in prompts:
            left = self.context - len(prompt)
            if left < (limit or 1):
                raise APIError(
                    f"this model's context is {self.context} tokens, but the prompt has {len(prompt)} and the"
                    f" answer may get {limit or 1}; shorten the prompt or lower max_tokens",
                    param="messages" if limit is None else "max_tokens",
                    code="context_length_exceeded",
                )
            # Without a seed, equal prompts get different answers.
            seed = secrets.randbits(62) if body.seed is None else body.seed
            params.append(replace(common, max_tokens=limit or left, seed=seed))
        return params

    def _encode_prompts(self, prompt: str | list[int] | list[str | list[int]]) -> list[list[int]]:
        is_one = isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
        prompts: list[list[int]] = []
        for one in [prompt] if is_one else prompt:
            ids: Any = self.codec.encode(one, special_tokens=True) if isinstance(one, str) else one
            if not ids:
                raise APIError("need prompts of at least one token", param="prompt")
            prompts.append(self._checked(ids, "prompt"))
        return prompts

    def _encode_chat(self, body: ChatBody) -> list[int]:
        """Token ids of a chat; the answer is a new message unless the client wants the last one continued."""
        if body.continue_final_message and body.add_generation_prompt:
            raise APIError(
                "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
            )
        template = self.codec.template
        try:
            chat = template.chat(
                [message.as_dict() for message in body.messages],
                tools=body.tools,
                kwargs=body.chat_template_kwargs,
            )
            if body.add_generation_prompt or body.continue_final_message:
                text = template.open(chat, continues=body.continue_final_message)
            else:
                text = template.render(chat)
        except ValueError as error:
            raise APIError(str(error), param="messages") from error
        return self._checked(self.codec.encode(text), "messages")

    def _checked(self, ids: list[int], param: str) -> list[int]:
        """The ids of a prompt, which must be rows of the model's embedding."""
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise APIError(
                f"need token ids from 0 to {self.vocab_size - 1} in {param}, got {wrong[0]}", param=param
            )
        return ids


def validated(body: Any, kind: type[B], neutral: Mapping[str, Collection[Any]] = NEUTRAL_VALUES) -> B:
    """The body of a request as fields with types.

    Args:
        body: as it was sent.
        kind: its fields.
        neutral: values without effect of fields that are not supported.

    Raises:
        APIError: a field is unknown or has a wrong value, or one that is not supported has an effect.
    """
    if not isinstance(body, dict):
        raise APIError("need a JSON object as the body")
    try:
        return kind.model_validate(supported_fields(body, neutral))
    except ValidationError as error:
        raise as_api_error(error, kind) from None


def stop_texts(body: RequestBody) -> list[str]:
    """Stop texts of a request; raise APIError if one is empty."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if not all(stop):
        raise APIError("need stop as a text or a list of texts, none empty", param="stop")
    return stop


def supported_fields(body: Mapping[str, Any], neutral: Mapping[str, Collection[Any]]) -> dict[str, Any]:
    """The fields of a body that may change the answer, unknown ones included.

    Raises:
        APIError: a field that is not supported has a value with an effect.
    """
    kept = {}
    for name, value in body.items():
        if value is None or name in _IGNORED_FIELDS or value in neutral.get(name, ()):
            continue
        if name in neutral:
            values = " or ".join(map(repr, neutral[name]))
            raise APIError(
                f"{name} is not supported; leave it out, or give {values}",
                param=name,
                code="unsupported_parameter",
            )
        kept[name] = value
    return kept


def as_api_error(error: ValidationError, kind: type[BaseModel]) -> APIError:
    """Convert a validation error, naming the field and what it must be; unknown fields come first."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    name, *rest = map(str, first["loc"])
    # Below other fields than messages are only the branches of a union.
    place = ".".join([name, *rest[:2]]) if name in ("messages", "input") else name
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, kind.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(kind.model_fields))}"
        message = f"{place} is not a field that this server knows; {hint}"
        return APIError(message, param=name, code="unknown_parameter")
    got = "nothing" if first["type"] == "missing" else reprlib.repr(first["input"])
    at = f" at {place}" if place != name else ""
    return APIError(f"need {name} as {kind.model_fields[name].description}, got {got}{at}", param=name)


def max_chat_tokens(body: ChatBody) -> int | None:
    """Longest answer by the two names that OpenAI has for it; None: no limit but the context.

    Raises:
        APIError: the two differ.
    """
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise APIError("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return next(iter(limits), None)
