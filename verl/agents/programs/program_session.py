"""One episode behind the gateway: requests of its agent become turns on its tapes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from verl.agents.environments.session import EpisodeFailure
from verl.agents.episodes.conversation import LiveConversation
from verl.agents.episodes.live_episode import EpisodeEnd, LiveEpisode
from verl.agents.programs.chat_messages import MessageKey, message_key, message_keys
from verl.agents.programs.turn_answer import ProgramAnswer, completion_text
from verl.agents.programs.turn_request import ProgramRequest
from verl.config.agent import Ending
from verl.rollout.server.openai_request import APIError
from verl.utils.chat.turn_rendering import renderer_for
from verl.utils.event_loops import gather_all
from verl.utils.sampling_types import Prompt
from verl.utils.tool_calls.calls import ParsedTurn

# Turns that may follow one that a request does not allow, each after a word about its fault.
_MAX_RETOLD = 1
# Requests that are refused after the end of an episode, before its program is ended.
_MAX_REFUSED = 32
# Roles that may follow a turn on its tape.
_GIVEN = frozenset({"user", "tool", "system", "developer"})


@dataclass(eq=False)
class OpenConversation:
    """A segment that later requests may continue.

    Attributes:
        conversation: its messages and tokens.
        setting: of the requests that it holds, see `ProgramRequest.setting`.
        keys: of the messages as the agent knows them.
        text: prompt and answers of completions whose prompts are texts; None: others.
        is_chat: for chats, else for completions.
        is_busy: a turn of it is being sampled.
        is_ended: no text can follow, as tokens were sampled that the text does not have.
    """

    conversation: LiveConversation
    setting: str
    keys: list[MessageKey] = field(default_factory=list)
    text: str | None = None
    is_chat: bool = True
    is_busy: bool = False
    is_ended: bool = False

    def new_from(self, keys: list[MessageKey]) -> int | None:
        """Index of the first message of a history that is new; None if it does not continue this one."""
        known = len(self.keys)
        if self.is_busy or keys[:known] != self.keys:
            return None
        if self.keys[-1][0] != "assistant":  # the request for its next turn was given up, and is here again
            return known if len(keys) == known else None
        is_given = len(keys) > known and all(role in _GIVEN for role, _, _ in keys[known:])
        return known if is_given else None


class ProgramSession:
    """Answers the requests of an agent. All methods run in the event loop of the episode.

    Args:
        live: the episode.
        note: takes a human-readable line, which is shown once in a run.

    Attributes:
        live: as above.
        ending: limit that was reached; None: none.
        reward: that the agent sent; None: none.
        refused: message of the last request that was refused; "": none.
        is_full: the last request was refused because its conversation is too long.
        stopped: is done when the episode cannot go on, with the error if there is one.
    """

    def __init__(self, live: LiveEpisode, note: Callable[[str], None]) -> None:
        self.live = live
        self.ending: Ending | None = None
        self.reward: Any = None
        self.refused, self.is_full = "", False
        self.loop = asyncio.get_running_loop()
        self.stopped: asyncio.Future[None] = self.loop.create_future()
        self._note = note
        self._open: list[OpenConversation] = []
        self._tasks: set[asyncio.Task[list[ProgramAnswer]]] = set()
        self._num_refused = self._num_running = 0
        self._busy_since_s, self._busy_s, self._is_closed = 0.0, 0.0, False

    async def answer(self, request: ProgramRequest) -> list[ProgramAnswer]:
        """The turns that answer a request; cancelling it leaves none of a turn in sampling.

        Raises:
            APIError: there is none; it has the cause in words for the agent.
        """
        if self._is_closed or self.ending:
            raise self._refusal(self.ending)
        task = asyncio.ensure_future(self._answers(request))
        self._tasks.add(task)
        try:
            with self._busy():
                answers = await task
            self.is_full = False
            return answers
        except EpisodeEnd as end:
            if end.ending == "max_tokens":  # of one conversation: the agent may shorten it
                self.is_full = True
                raise APIError(
                    "this conversation has as many tokens as agent.max_tokens and the model's context allow; "
                    "begin a shorter one",
                    param="messages",
                    code="context_length_exceeded",
                ) from end
            self.ending = end.ending
            raise self._refusal(end.ending) from end
        except APIError:
            raise
        except ValueError as error:  # the template or the engine does not take it
            self.refused = str(error)
            raise APIError(str(error), code="invalid_request") from error
        except Exception as error:  # raised by the driver, which waits for it
            if not self.stopped.done():
                self.stopped.set_exception(error)
            raise APIError(f"the policy cannot answer: {error}", code="episode_failed") from error
        finally:
            task.cancel()
            self._tasks.discard(task)

    def close(self) -> float:
        """End all requests; returns the seconds in which one was answered."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        if self.stopped.done() and not self.stopped.cancelled():
            self.stopped.exception()  # it is raised elsewhere, if it is the cause of the end
        self.stopped.cancel()
        return self._busy_s

    async def take_reward(self, reward: Any) -> None:
        """Note the reward that the agent sends; the last one counts."""
        self.reward = reward

    @contextmanager
    def _busy(self) -> Iterator[None]:
        if not self._num_running:
            self._busy_since_s = time.monotonic()
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._busy_s += time.monotonic() - self._busy_since_s

    def _refusal(self, ending: Ending | None) -> APIError:
        self._num_refused += 1
        if self._num_refused > _MAX_REFUSED and not self.stopped.done():
            self.stopped.set_result(None)
        if ending is None:
            return APIError("this episode is over", code="episode_over")
        return APIError(
            f"this episode is over by its limit {ending} (see agent.max_{ending.removeprefix('max_')}); no "
            "request of it is answered any more",
            code=f"episode_{ending}",
        )

    async def _answers(self, request: ProgramRequest) -> list[ProgramAnswer]:
        if request.overridden:
            self._note_overridden(request)
        first = self._conversation_of(request)
        branches = [first, *(self._branch(first) for _ in range(request.num_answers - 1))]
        for branch in branches:
            branch.is_busy = True
        return await gather_all([self._turn(branch, request) for branch in branches])

    def _note_overridden(self, request: ProgramRequest) -> None:
        self.live.count("overridden")
        self._note(
            f"requests of the program set {', '.join(request.overridden)}; the values of sampling take their "
            "place, since training compares logprobs at these"
        )

    def _conversation_of(self, request: ProgramRequest) -> OpenConversation:
        """The conversation that a request continues, with its new messages; else a new one."""
        if request.prompt is not None:
            return self._prompted(request)
        keys = message_keys(request.messages)
        fitting = [
            (known, opened)
            for opened in self._open
            if opened.is_chat and opened.setting == request.setting
            for known in [opened.new_from(keys)]
            if known is not None
        ]
        for known, opened in sorted(fitting, key=lambda pair: -pair[0]):
            if self._extended(opened, request, known):
                opened.keys = keys
                return opened
        row = self.live.start.prompt
        own = row.columns.get("chat_template_kwargs") or {}
        columns = {**row.columns, "chat_template_kwargs": {**own, **request.template_kwargs}}
        renderer = renderer_for(self.live.codec, Prompt(request.messages, columns=columns), request.tools)
        try:
            conversation = self.live.begin(request.messages, request.tools, renderer=renderer)
        except EpisodeFailure as failure:
            raise ValueError(failure.detail) from failure
        self._open.append(OpenConversation(conversation, request.setting, keys))
        return self._open[-1]

    def _extended(self, opened: OpenConversation, request: ProgramRequest, known: int) -> bool:
        """Append the new messages of a request; False if the template writes them so that they cannot be."""
        if known == len(request.messages):
            return True
        try:
            self.live.add(request.messages[known:], conversation=opened.conversation)
        except EpisodeFailure:  # a new segment has the whole history
            self.live.count("not_appended")
            return False
        return True

    def _prompted(self, request: ProgramRequest) -> OpenConversation:
        """The conversation of a request for completions."""
        codec, prompt = self.live.codec, request.prompt
        assert prompt is not None
        for opened in self._open:
            if not opened.is_chat and not opened.is_busy and self._is_continued(opened, prompt):
                return opened
        if isinstance(prompt, str):
            text, ids = prompt, codec.encode(prompt, special_tokens=True)
        else:
            text, ids = codec.decode_all(prompt), prompt
        conversation = self.live.begin([{"role": "user", "content": text}], prompt_ids=ids)
        known = prompt if isinstance(prompt, str) else None
        self._open.append(OpenConversation(conversation, "", text=known, is_chat=False))
        return self._open[-1]

    def _is_continued(self, opened: OpenConversation, prompt: str | list[int]) -> bool:
        """Append what is new in a prompt; False if it does not begin with the conversation."""
        tape = opened.conversation.tape
        if isinstance(prompt, list):
            is_continued = prompt[: len(tape.ids)] == tape.ids
            if is_continued:
                tape.append_given(prompt[len(tape.ids) :])
            return is_continued
        if not opened.text or opened.is_ended or not prompt.startswith(opened.text):
            return False
        tape.append_given(self.live.codec.encode(prompt[len(opened.text) :]))
        opened.text = prompt
        return True

    def _branch(self, opened: OpenConversation) -> OpenConversation:
        """A segment with the same history in front of its first turn."""
        first = opened.conversation
        conversation = self.live.begin(
            first.messages, first.tools, prompt_ids=list(first.tape.ids), renderer=first.renderer
        )
        self._open.append(replace(opened, conversation=conversation, keys=list(opened.keys)))
        return self._open[-1]

    async def _turn(self, opened: OpenConversation, request: ProgramRequest) -> ProgramAnswer:
        """Sample a turn that the request allows, or the last one that was tried."""
        conversation = opened.conversation
        try:
            answer = await self._sampled(conversation, request)
            for _ in range(_MAX_RETOLD):
                fault = request.fault_of(answer.turn)
                if request.prompt is not None or not fault or conversation.is_cut:
                    break
                answer = await self._retold(conversation, answer, fault)
        finally:
            opened.is_busy = False
        conversation.messages.append(answer.turn.message)
        if opened.is_chat:
            opened.keys = [*opened.keys, message_key(answer.turn.message)]
            self._count_calls(answer.turn)
        elif opened.text is not None:
            opened.text += completion_text(answer)
            ids = list(answer.completion.token_ids)
            is_whole = self.live.codec.decode(ids) == self.live.codec.decode_all(ids)
            opened.is_ended = answer.completion.finish_reason != "length" or not is_whole
        return answer

    async def _retold(
        self, conversation: LiveConversation, answer: ProgramAnswer, fault: str
    ) -> ProgramAnswer:
        """The turn after a word about the fault of the last one, which the agent does not get to see."""
        conversation.messages.append(answer.turn.message)
        try:
            self.live.add([{"role": "user", "content": fault}], conversation=conversation)
            self.live.count("retold")
            again = await self._sampled(conversation, answer.request)
        except (EpisodeEnd, EpisodeFailure, ValueError):  # the agent gets the turn as it is
            return answer
        finally:
            del conversation.messages[-2 if conversation.messages[-1]["role"] == "user" else -1 :]
        return again

    async def _sampled(self, conversation: LiveConversation, request: ProgramRequest) -> ProgramAnswer:
        prompt_ids = conversation.tape.ids
        completion = await self.live.sample(conversation, request.params)
        params = conversation.params or request.params
        turn = self._parsed(conversation, request)
        return ProgramAnswer(request, turn, completion, params, prompt_ids, self.live.codec)

    def _parsed(self, conversation: LiveConversation, request: ProgramRequest) -> ParsedTurn:
        codec, params = self.live.codec, conversation.params
        assert params is not None
        ids = conversation.turn_ids(codec)
        while ids and ids[-1] in params.stop_ids:
            ids.pop()
        text = codec.decode_all(ids)
        text = text[: min((text.find(stop) for stop in params.stop if stop in text), default=len(text))]
        if request.prompt is not None:
            return ParsedTurn(text)
        turn = self.live.parsed(text, request.tools)
        if turn.error or (turn.calls and not request.takes_calls):
            return ParsedTurn(text, error=turn.error if request.takes_calls else "")
        return replace(turn, calls=turn.calls[: request.max_calls])

    def _count_calls(self, turn: ParsedTurn) -> None:
        if turn.error:
            self.live.count_bad_call()
        elif turn.calls:
            self.live.count_calls(len(turn.calls))
