"""Requests of agents in OpenAI's API for the next turn: chat completions, and completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jsonschema
from pydantic import Field

from verl.agents.programs.chat_messages import canonical, template_message
from verl.rollout.server.openai_request import (
    NEUTRAL_VALUES,
    APIError,
    ChatBody,
    CompletionBody,
    RequestBody,
    max_chat_tokens,
    stop_texts,
    validated,
)
from verl.utils.chat.turn_rendering import Message
from verl.utils.sampling_types import SamplingParams
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.calls import ParsedTurn

# The run's value takes the place of these, since training computes logprobs as the run samples.
_OF_THE_RUN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_PENALTIES = ("frequency_penalty", "presence_penalty")
# What agents of OpenAI's models ask of these; a policy thinks and writes as it was trained.
_EFFORTS = ("reasoning_effort", "verbosity")
_SUPPORTED = ("tool_choice", "parallel_tool_calls", "response_format")
NEUTRAL = {name: values for name, values in NEUTRAL_VALUES.items() if name not in (*_SUPPORTED, *_PENALTIES)}
_MAX_BRANCHES = 16
R = TypeVar("R", bound=RequestBody)


class ProgramChatBody(ChatBody):
    """Fields of chat completions that an agent may send, besides those of every server of verl."""

    tool_choice: str | dict[str, Any] = Field(
        "auto", description="auto, none, required, or an object with the name of a function"
    )
    parallel_tool_calls: bool = Field(True, description="true or false")
    response_format: dict[str, Any] = Field(
        {"type": "text"}, description="an object with the type text, json_object or json_schema"
    )
    frequency_penalty: float = Field(0.0, description="a number")
    presence_penalty: float = Field(0.0, description="a number")
    reasoning_effort: str | None = Field(None, description="a text")
    verbosity: str | None = Field(None, description="a text")


class ProgramCompletionBody(CompletionBody):
    """Fields of completions that an agent may send."""

    frequency_penalty: float = Field(0.0, description="a number")
    presence_penalty: float = Field(0.0, description="a number")


@dataclass(frozen=True)
class ProgramRequest:
    """A request for the next turn of a conversation.

    Attributes:
        messages: the whole history, as chat templates take it; empty for completions.
        tools: schemas of the tools offered.
        prompt: text or token ids of completions; None: a chat.
        params: of the run, with the request's limit and stop texts.
        overridden: fields whose value the run's takes the place of.
        num_answers: each after the first is a segment of its own.
        tool_choice: auto, none, required, or the name of a function.
        max_calls: calls of tools that are taken from a turn; None: all.
        schema: of the JSON object that the answer must be; None: any text.
        template_kwargs: further variables of the chat template.
        logprobs: they are returned.
        token_ids: they are returned.
        streams: the answer is sent as events.
        usage_in_stream: token counts are sent in a last event.
        model: name that the agent gave to the policy.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]
    prompt: str | list[int] | None
    params: SamplingParams
    overridden: tuple[str, ...] = ()
    num_answers: int = 1
    tool_choice: str = "auto"
    max_calls: int | None = None
    schema: dict[str, Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    logprobs: bool = False
    token_ids: bool = False
    streams: bool = False
    usage_in_stream: bool = False
    model: str = "policy"

    @property
    def setting(self) -> str:
        """Text that is equal for requests that one segment can hold: tools and variables of the template."""
        return canonical([self.tools, dict(self.template_kwargs)])

    @property
    def takes_calls(self) -> bool:
        """True if calls of tools in the answer are calls, and not text."""
        return bool(self.tools) and self.tool_choice != "none"

    def fault_of(self, turn: ParsedTurn) -> str:
        """Words for the policy about a turn that the request does not allow; "" if it does."""
        names = {call.name for call in turn.calls}
        if self.tool_choice == "required" and not names:
            return "Answer with a call of one of the tools."
        if self.tool_choice not in ("auto", "none", "required") and self.tool_choice not in names:
            return f"Answer with a call of the tool {self.tool_choice}."
        if self.schema is None or turn.calls:
            return ""
        return json_fault(turn.content, self.schema)


def json_fault(text: str, schema: Mapping[str, Any]) -> str:
    """Words for the policy about an answer that is no JSON object of a schema; "" if it is."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except json.JSONDecodeError as error:
        return f"Answer with a JSON object alone: {error}."
    except jsonschema.ValidationError as error:
        place = error.json_path
        return f"Answer with a JSON object that fits the schema: {error.message} at {place}."
    return ""


def chat_request(body: Any, params: SamplingParams, codec: TextCodec) -> ProgramRequest:
    """The request of a body of chat completions.

    Args:
        body: as it was sent.
        params: of the run.
        codec: of the policy.

    Raises:
        APIError: it cannot be answered as it says.
    """
    parsed = validated(with_content(body), ProgramChatBody, NEUTRAL)
    if parsed.top_logprobs:
        raise APIError(
            "top_logprobs is not supported, as engines give the logprob of the sampled token alone; leave it "
            "out, or give 0",
            param="top_logprobs",
            code="unsupported_parameter",
        )
    if not parsed.add_generation_prompt and not parsed.continue_final_message:
        raise APIError(
            "add_generation_prompt: false needs continue_final_message", param="add_generation_prompt"
        )
    limit = max_chat_tokens(parsed)
    request = ProgramRequest(
        plain_messages([message.as_dict() for message in parsed.messages]),
        [checked_tool(tool) for tool in parsed.tools],
        None,
        own_params(parsed, params, codec, limit),
        template_kwargs=parsed.chat_template_kwargs,
        logprobs=parsed.logprobs,
        max_calls=None if parsed.parallel_tool_calls else 1,
        schema=schema_of(parsed.response_format),
    )
    return with_tool_choice(with_common(request, parsed, params), parsed.tool_choice)


def completion_request(body: Any, params: SamplingParams, codec: TextCodec) -> ProgramRequest:
    """The request of a body of completions; arguments and errors as those of `chat_request`."""
    parsed = validated(body, ProgramCompletionBody, NEUTRAL)
    prompt = parsed.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not prompt or not isinstance(prompt, str) and not all(isinstance(i, int) for i in prompt):
        raise APIError(
            "need one prompt, as a text or as token ids; ask for others by themselves", param="prompt"
        )
    if parsed.logprobs:
        raise APIError(
            "need logprobs as 0, as engines give the logprob of the sampled token alone",
            param="logprobs",
            code="unsupported_parameter",
        )
    ids: Any = prompt
    if not isinstance(prompt, str) and (wrong := [i for i in ids if not 0 <= i < codec.num_ids]):
        raise APIError(
            f"need token ids from 0 to {codec.num_ids - 1} in prompt, got {wrong[0]}", param="prompt"
        )
    request = ProgramRequest(
        [],
        [],
        ids,
        own_params(parsed, params, codec, parsed.max_tokens),
        logprobs=parsed.logprobs is not None,
    )
    return with_common(request, parsed, params)


def with_content(body: Any) -> Any:
    """A body in which assistant messages without text and calls have an empty text."""
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list):
        return body
    filled = [{**m, "content": ""} if is_silent(m) else m for m in messages]
    return {**body, "messages": filled}


def is_silent(message: Any) -> bool:
    """True for an assistant message without text and calls."""
    return (
        isinstance(message, dict)
        and message.get("role") == "assistant"
        and message.get("content") is None
        and not message.get("tool_calls")
    )


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as chat templates take them; raise APIError if one has content other than text."""
    try:
        return [template_message(message, f"message {i + 1}") for i, message in enumerate(messages)]
    except ValueError as error:
        raise APIError(str(error), param="messages") from error


def own_params(
    body: RequestBody, params: SamplingParams, codec: TextCodec, limit: int | None
) -> SamplingParams:
    """Parameters of the run with the limit and the stop texts of a request, which replace the run's."""
    stop = stop_texts(body)
    changes: dict[str, Any] = {}
    if limit is not None:
        changes["max_tokens"] = min(limit, params.max_tokens)
    if stop:
        replaced = set(codec.token_ids_of(params.stop))
        changes["stop"] = tuple(stop)
        changes["stop_ids"] = (*(i for i in params.stop_ids if i not in replaced), *codec.token_ids_of(stop))
    if body.stop_token_ids:
        changes["stop_ids"] = (*changes.get("stop_ids", params.stop_ids), *body.stop_token_ids)
    return replace(params, **changes)


def with_common(
    request: ProgramRequest, body: ProgramChatBody | ProgramCompletionBody, params: SamplingParams
) -> ProgramRequest:
    """A request with the fields that all kinds have; raise APIError for those without an effect here."""
    if body.n > _MAX_BRANCHES:
        raise APIError(f"need n of at most {_MAX_BRANCHES}, got {body.n}", param="n")
    for name in ("detokenize", "first_answer"):
        if vars(body)[name] != type(body).model_fields[name].default:
            raise APIError(f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
    # None: any value is another one, such as a seed, since random numbers are the episode's.
    own = {"seed": None, "reasoning_effort": None, "verbosity": None}
    wanted = {**vars(params), **dict.fromkeys(_PENALTIES, 0.0), **own}
    if body.top_k == -1:  # all tokens, as vLLM spells it
        body.top_k = 0
    given = body.model_fields_set & {*_OF_THE_RUN, *_PENALTIES, *_EFFORTS}
    return replace(
        request,
        overridden=tuple(sorted(name for name in given if vars(body)[name] != wanted[name])),
        num_answers=body.n,
        token_ids=body.return_token_ids,
        streams=body.stream,
        usage_in_stream=body.stream_options.include_usage,
        model=body.model or request.model,
    )


def checked_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function; raise APIError for another kind of tool."""
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise APIError(
            f"need tools of the type function, got {tool.get('type')!r}; the agent must run tools itself",
            param="tools",
            code="unsupported_parameter",
        )
    if not isinstance(function.get("name"), str):
        raise APIError("need a name for every function of tools", param="tools")
    return {"type": "function", "function": dict(function)}


def with_tool_choice(request: ProgramRequest, choice: str | Mapping[str, Any]) -> ProgramRequest:
    """A request with OpenAI's `tool_choice`; raise APIError if no tool fits it."""
    name: Any = choice
    if isinstance(choice, Mapping):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, Mapping) else choice.get("name")
    offered = [tool["function"]["name"] for tool in request.tools]
    known = ["auto", "none", *(["required"] if offered else []), *offered]
    if name not in known or (isinstance(choice, Mapping) and name not in offered):
        raise APIError(f"need tool_choice as one of {', '.join(known)}, got {name!r}", param="tool_choice")
    return replace(request, tool_choice=name)


def schema_of(response_format: Mapping[str, Any]) -> dict[str, Any] | None:
    """JSON schema of a response format; None for plain text. Raise APIError for another one."""
    kind, inner = response_format.get("type"), response_format.get("json_schema", response_format)
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise APIError(
            "need response_format with the type text, json_object, or json_schema and a schema",
            param="response_format",
        )
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise APIError(
            f"need a JSON schema in response_format: {error.message}", param="response_format"
        ) from None
    return dict(schema)
