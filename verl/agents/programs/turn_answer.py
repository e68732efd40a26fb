"""Answers to requests of agents in OpenAI's form: chat completions and completions, whole or as events."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from verl.agents.programs.turn_request import ProgramRequest
from verl.rollout.embedded.async_generator import Token
from verl.rollout.server.openai_request import ParsedRequest
from verl.rollout.server.openai_response import ResponseWriter
from verl.utils.chat.turn_rendering import Message
from verl.utils.sampling_types import Completion, SamplingParams
from verl.utils.tokens import TextCodec
from verl.utils.tool_calls.calls import ParsedTurn


@dataclass(frozen=True)
class ProgramAnswer:
    """One sampled turn as an answer.

    Attributes:
        request: that is answered.
        turn: parsed, with the calls that the agent gets.
        completion: as it was sampled.
        params: with which it was sampled.
        prompt_ids: tokens before it.
        codec: of the policy.
        id: new for each answer.
    """

    request: ProgramRequest
    turn: ParsedTurn
    completion: Completion
    params: SamplingParams
    prompt_ids: list[int]
    codec: TextCodec
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def message(self) -> Message:
        """The turn as OpenAI's message."""
        message: Message = {"role": "assistant", "content": self.turn.content, "refusal": None}
        if self.turn.thoughts:
            message["reasoning_content"] = self.turn.thoughts
        if self.turn.calls:
            message["tool_calls"] = [call.as_openai() for call in self.turn.calls]
            message["content"] = self.turn.content or None
        return message

    @property
    def finish_reason(self) -> str:
        """OpenAI's reason for the end of the turn."""
        if self.completion.finish_reason == "stop" and self.turn.calls:
            return "tool_calls"
        return self.completion.finish_reason

    @property
    def tokens(self) -> list[Token]:
        """The sampled tokens, as a server of verl has them."""
        ids, last = list(self.completion.token_ids), len(self.completion.token_ids) - 1
        logprobs = list(self.completion.logprobs or [0.0] * len(ids))
        versions = self.completion.versions or [self.completion.version] * len(ids)
        end = self.completion.finish_reason
        return [
            Token(i, logprobs[at], versions[at], (), end if at == last else None) for at, i in enumerate(ids)
        ]

    @property
    def logprob_entries(self) -> list[dict[str, Any]]:
        """Logprob of each token in OpenAI's form, without other likely tokens."""
        choice = writer_of([self]).choice(0, {}, self.tokens, num_characters=0, is_first=True)
        entries: list[dict[str, Any]] = choice["logprobs"]["content"]
        return [{**entry, "bytes": entry["bytes"] or []} for entry in entries]


def writer_of(answers: Sequence[ProgramAnswer]) -> ResponseWriter:
    """The writer of the answers to one request."""
    first = answers[0]
    request = first.request
    parsed = ParsedRequest(
        is_chat=request.prompt is None,
        prompts=[first.prompt_ids] * len(answers),
        params=[first.params] * len(answers),
        num_top_logprobs=0 if request.logprobs else None,
        streams=request.streams,
        usage_in_stream=request.usage_in_stream,
        token_ids=request.token_ids,
        detokenize=True,
        first_answer=0,
    )
    return ResponseWriter.create(parsed, request.model, first.codec)


def completion_body(answers: Sequence[ProgramAnswer]) -> dict[str, Any]:
    """Body of chat completions or completions."""
    writer = writer_of(answers)
    body = writer.body([answer.tokens for answer in answers])
    body["usage"] = usage_of(answers)
    for choice, answer in zip(body["choices"], answers, strict=True):
        choice["finish_reason"] = answer.finish_reason
        if "message" in choice:
            choice["message"] = answer.message
    return body


def completion_events(answers: Sequence[ProgramAnswer]) -> list[dict[str, Any]]:
    """Events of the same answers: the whole turns, as engines give them whole."""
    writer, events = writer_of(answers), []
    is_chat = answers[0].request.prompt is None
    head = writer.head("chat.completion.chunk" if is_chat else "text_completion")
    for index, answer in enumerate(answers):
        tokens = answer.tokens
        choice = writer.choice(index, {}, tokens, num_characters=0, is_first=True)
        parts = deltas_of(answer) if is_chat else [{"text": completion_text(answer)}]
        for content in parts:
            part = {"delta": content} if is_chat else content
            events.append({**choice, **part, "finish_reason": None})
            choice = {"index": index, "logprobs": None}
        end: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        events.append({**choice, **end, "finish_reason": answer.finish_reason})
    chunks = [{**head, "choices": [event]} for event in events]
    if answers[0].request.usage_in_stream:
        chunks.append({**head, "choices": [], "usage": usage_of(answers)})
    return chunks


def deltas_of(answer: ProgramAnswer) -> list[dict[str, Any]]:
    """A chat message as parts; the first says whose it is."""
    turn = answer.turn
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if turn.thoughts:
        deltas.append({"reasoning_content": turn.thoughts})
    if turn.content:
        deltas.append({"content": turn.content})
    if turn.calls:
        calls = [{"index": i, **call.as_openai()} for i, call in enumerate(turn.calls)]
        deltas.append({"tool_calls": calls})
    return deltas


def completion_text(answer: ProgramAnswer) -> str:
    """Text of an answer of completions, without its stop text."""
    return answer.codec.decode_answer(answer.completion.token_ids, answer.params.stop)


def usage_of(answers: Sequence[ProgramAnswer]) -> dict[str, int]:
    """Token counts; the prompt counts once."""
    prompt = len(answers[0].prompt_ids)
    answered = sum(len(answer.completion.token_ids) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}


def encoded_events(events: Sequence[dict[str, Any]], *, ends_with_done: bool) -> bytes:
    """Objects as server-sent events; one with a `type` has it as its name."""
    lines = []
    for event in events:
        name = f"event: {event['type']}\n" if "type" in event else ""
        lines.append(f"{name}data: {json.dumps(event, separators=(',', ':'))}\n\n")
    return ("".join(lines) + ("data: [DONE]\n\n" if ends_with_done else "")).encode()
