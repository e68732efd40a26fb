"""OpenAI's responses API: its requests as requests for a turn, and its bodies and events."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from verl.agents.programs.turn_answer import ProgramAnswer
from verl.agents.programs.turn_request import ProgramRequest, chat_request
from verl.rollout.server.openai_request import APIError, validated
from verl.utils.chat.turn_rendering import Message
from verl.utils.sampling_types import SamplingParams
from verl.utils.tokens import TextCodec

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled", "auto"),
    "context_management": ([],),
    "conversation": (),
    "prompt": (),
    "moderation": (),
    "access_programs": (),
}
_LOGPROBS = "message.output_text.logprobs"


class ResponsesBody(BaseModel):
    """Fields of a request; those of sampling are checked as those of chat completions."""

    model_config = ConfigDict(extra="forbid")

    input: str | list[dict[str, Any]] = Field(description="a text or a list of items")
    instructions: str | None = Field(None, description="a text")
    previous_response_id: str | None = Field(None, description="a text")
    tools: list[dict[str, Any]] = Field([], description="a list of tools, each an object")
    text: dict[str, Any] = Field({}, description="an object with a format")
    include: list[str] = Field([], description="a list of texts")
    max_output_tokens: int | None = Field(None, ge=1, description="a whole number, at least 1")
    max_tool_calls: int | None = Field(None, ge=1, description="a whole number, at least 1")
    reasoning: dict[str, Any] = Field({}, description="an object")
    prompt_cache_options: dict[str, Any] = Field({}, description="an object")
    model: str | None = Field(None, description="a text")
    stream: bool = Field(False, description="true or false")
    stream_options: dict[str, Any] = Field({}, description="an object")
    temperature: float | None = Field(None, description="a number")
    top_p: float | None = Field(None, description="a number")
    tool_choice: str | dict[str, Any] = Field("auto", description="a text or an object")
    parallel_tool_calls: bool = Field(True, description="true or false")


def responses_request(
    body: Any, params: SamplingParams, codec: TextCodec, *, earlier: Mapping[str, Sequence[Message]]
) -> tuple[ProgramRequest, list[Message]]:
    """The request of a body of the responses API, and its history without instructions.

    Args:
        body: as it was sent.
        params: of the run.
        codec: of the policy.
        earlier: history of each response of the episode, without instructions, by its id.

    Raises:
        APIError: it cannot be answered as it says.
    """
    parsed = validated(body, ResponsesBody, _NEUTRAL)
    if parsed.previous_response_id is not None and parsed.previous_response_id not in earlier:
        raise APIError(
            f"there is no response {parsed.previous_response_id!r} in this episode",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if wrong := set(parsed.include) - {_LOGPROBS, "reasoning.encrypted_content"}:
        raise APIError(f"include {min(wrong)!r} is not supported; leave it out", param="include")
    known = list(earlier[parsed.previous_response_id]) if parsed.previous_response_id else []
    history = [*known, *messages_of(parsed.input)]
    system = [{"role": "system", "content": parsed.instructions}] if parsed.instructions else []
    given = parsed.model_fields_set & {"model", "stream", "temperature", "top_p", "parallel_tool_calls"}
    chat: dict[str, Any] = {
        **{name: vars(parsed)[name] for name in given},
        "messages": [*system, *history],
        "tools": [nested_tool(tool) for tool in parsed.tools],
        "tool_choice": parsed.tool_choice,
        "response_format": response_format_of(parsed.text),
        "max_tokens": parsed.max_output_tokens,
        "reasoning_effort": parsed.reasoning.get("effort"),
        "verbosity": parsed.text.get("verbosity"),
        "logprobs": _LOGPROBS in parsed.include,
    }
    request = chat_request(chat, params, codec)
    if parsed.max_tool_calls is not None:
        request = replace(request, max_calls=min(parsed.max_tool_calls, request.max_calls or 10**9))
    return request, history


def messages_of(items: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """Chat messages of input items; a call belongs to the assistant message in front of it.

    Raises:
        APIError: an item of another kind.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Message] = []
    for number, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item.get("call_id"), "type": "function", "function": call})
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":  # the thoughts of earlier turns, which templates leave out
            raise APIError(
                "need input items of the types message, function_call, function_call_output or reasoning, "
                f"got {kind!r} at input.{number}",
                param="input",
                code="unsupported_parameter",
            )
    return messages


def nested_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in the form of chat completions."""
    if tool.get("type") != "function":
        return dict(tool)
    inner = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": inner}


def response_format_of(text: Mapping[str, Any]) -> dict[str, Any]:
    """The format of an answer in the form of chat completions."""
    return dict(text.get("format") or {"type": "text"})


def response_body(answer: ProgramAnswer) -> dict[str, Any]:
    """The body of a response."""
    request, turn, completion = answer.request, answer.turn, answer.completion
    is_cut = completion.finish_reason == "length"
    status = "incomplete" if is_cut else "completed"
    output: list[dict[str, Any]] = []
    if turn.thoughts:
        part = {"type": "summary_text", "text": turn.thoughts}
        output.append({"type": "reasoning", "id": f"rs_{answer.id}", "summary": [part]})
    if turn.content or not turn.calls:
        logprobs = answer.logprob_entries if request.logprobs else []
        text = {"type": "output_text", "text": turn.content, "annotations": [], "logprobs": logprobs}
        common = {"type": "message", "role": "assistant", "status": status}
        output.append({**common, "id": f"msg_{answer.id}", "content": [text]})
    for number, call in enumerate(turn.calls):
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        own = {"id": f"fc_{answer.id}_{number}", "call_id": call.id, "status": status}
        output.append({"type": "function_call", "name": call.name, "arguments": arguments, **own})
    num_prompt, num_answered = len(answer.prompt_ids), len(completion.token_ids)
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": None,
        "model": request.model,
        "output": output,
        "parallel_tool_calls": request.max_calls != 1,
        "tool_choice": request.tool_choice if request.tool_choice in ("auto", "none", "required") else "auto",
        "tools": [{**tool["function"], "type": "function", "strict": False} for tool in request.tools],
        "temperature": request.params.temperature,
        "top_p": request.params.top_p,
        "metadata": {},
        "usage": {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": num_answered,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt + num_answered,
        },
    }


def response_events(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed response; each names its kind in `type`."""
    begun = {**body, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    events: list[dict[str, Any]] = [
        {"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")
    ]
    for index, item in enumerate(body["output"]):
        events += item_events(item, index)
    events.append({"type": f"response.{body['status']}", "response": dict(body)})
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def item_events(item: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    """Events of one item of the output."""
    at = {"output_index": index}
    within = {**at, "item_id": item["id"]}
    events: list[dict[str, Any]] = []
    started: dict[str, Any] = {**item, "status": "in_progress"}
    if item["type"] == "message":
        started["content"] = []
        (part,) = item["content"]
        part_at = {**within, "content_index": 0}
        text, logprobs = part["text"], part["logprobs"]
        empty = {**part, "text": "", "logprobs": []}
        events = [
            {"type": "response.content_part.added", **part_at, "part": empty},
            {"type": "response.output_text.delta", **part_at, "delta": text, "logprobs": logprobs},
            {"type": "response.output_text.done", **part_at, "text": text, "logprobs": logprobs},
            {"type": "response.content_part.done", **part_at, "part": part},
        ]
    elif item["type"] == "function_call":
        started["arguments"] = ""
        arguments = item["arguments"]
        events = [
            {"type": "response.function_call_arguments.delta", **within, "delta": arguments},
            {
                "type": "response.function_call_arguments.done",
                **within,
                "name": item["name"],
                "arguments": arguments,
            },
        ]
    else:
        started = dict(item)
    return [
        {"type": "response.output_item.added", **at, "item": started},
        *events,
        {"type": "response.output_item.done", **at, "item": dict(item)},
    ]
