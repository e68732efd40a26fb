"""One episode while it runs: its tokens, its messages, its limits, and the engine that answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from verl.agents.environments.session import EpisodeFailure, EpisodeStart, StepResult, ToolResult
from verl.agents.episodes.tape import Tape
from verl.config.agent import Ending
from verl.data.trajectory import EpisodeRecord, Segment, Trajectory, state_number
from verl.rollout.group_sampling import Sampler
from verl.utils.chat.turn_rendering import Message, renderer_for
from verl.utils.sampling_types import Completion, PrefixAffinity, SamplingParams
from verl.utils.tokens import TextCodec, is_text
from verl.utils.tool_calls.calls import ParsedTurn, ToolCallParser

# Between the numbers of the answers of two turns, on which their random numbers depend.
TURN_STRIDE = 1 << 40


class EpisodeEnd(Exception):
    """The end of an episode by one of its limits; it has a reward unless `agent.endings` says otherwise.

    Args:
        ending: name of the limit.
    """

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending: Ending = ending


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of an episode.

    Attributes:
        max_turns: turns of the policy.
        max_calls: calls of tools; None: no limit.
        max_tokens: tokens after the prompt of a segment; None: the context alone.
        max_bad_calls: malformed calls one after the other.
        context: tokens that the model reads at most; None: the engine checks it.
    """

    max_turns: int = 1
    max_calls: int | None = None
    max_tokens: int | None = None
    max_bad_calls: int = 3
    context: int | None = None


class LiveEpisode:
    """One episode while it runs.

    A driver calls `begin`, then `answer` and `add` in turn. A conversation that does not continue the one on
    the tape opens a new segment (`begin` again).

    Args:
        start: the row, and the numbers of the episode.
        params: how each turn is sampled; `n` is 1.
        engine: answers.
        codec: of the policy.
        parser: of what the policy writes.
        limits: of the episode.
        affinity: shared by the answers to one prompt.

    Attributes:
        start: as above.
        record: messages and counts so far.
        num_turns: turns so far, of all segments.
    """

    def __init__(
        self,
        start: EpisodeStart,
        params: SamplingParams,
        *,
        engine: Sampler,
        codec: TextCodec,
        parser: ToolCallParser,
        limits: EpisodeLimits,
        affinity: PrefixAffinity,
    ) -> None:
        self.start, self.params, self.limits = start, params, limits
        self.record = EpisodeRecord()
        self.num_turns = 0
        self._engine, self._codec, self._parser, self._affinity = engine, codec, parser, affinity
        self._tapes: list[Tape] = []
        self._renderer = renderer_for(codec, start.prompt)
        self._num_calls = self._num_bad_calls = 0
        self._call_ids: list[str] = []
        self._counts: dict[str, float] = {}
        self._last: Completion | None = None
        self._last_params = params
        self._state = 0

    @property
    def tape(self) -> Tape:
        """Tokens of the current segment."""
        return self._tapes[-1]

    def first_messages(self, more: Sequence[Message] = ()) -> list[Message]:
        """Messages of the prompt, and those of the environment behind them.

        A user message behind the last user message of the prompt is appended to its text, as in TRL. To a
        prompt that is a text, messages of the environment are appended as they are.
        """
        prompt = self.start.prompt
        own = [] if is_text(prompt) else self._codec.messages(prompt)
        if own and more and own[-1]["role"] == more[0]["role"] == "user":
            content = joined_content(own[-1]["content"], more[0]["content"])
            return [*own[:-1], {**own[-1], "content": content}, *more[1:]]
        return [*own, *more]

    def begin(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        prompt_ids: list[int] | None = None,
        state: str | None = None,
    ) -> None:
        """Begin a segment.

        Args:
            messages: the conversation before the next turn.
            tools: schemas of the tools offered.
            prompt_ids: its tokens, if they are known.
            state: of the environment before the next turn; None: what the messages say.

        Raises:
            EpisodeFailure: the chat template does not take the messages.
            ValueError: it writes calls in a form that is not known.
        """
        self._parser.check_tools(tools)
        prompt = self.start.prompt
        self._renderer = renderer_for(self._codec, prompt, tools)
        with as_failure():
            ids = self._renderer.start(messages) if prompt_ids is None else prompt_ids
        self._tapes.append(Tape(ids))
        self._last = None
        self._note_state(state, messages)
        self.record.messages, self.record.tools = list(messages), list(tools)

    async def answer(self, params: SamplingParams | None = None) -> ParsedTurn:
        """Sample the next turn of the policy.

        Args:
            params: in place of those of the episode; seed and sample index stay those of the episode.

        Raises:
            EpisodeEnd: a limit is reached, by this turn or before it.
            EpisodeFailure: the engine sampled an id that is no token.
        """
        if self.num_turns >= self.limits.max_turns:
            raise EpisodeEnd("max_turns")
        wanted = self._turn_params(params or self.params)
        begun_s = time.monotonic()
        completion = await self._engine.sample(self.tape.ids, wanted, self._affinity)
        if self.limits.max_turns > 1:
            completion = fetched(completion)
            self._count_sampled(completion, time.monotonic() - begun_s)
        self.tape.append_sampled(completion, self._state)
        self.num_turns += 1
        self._last, self._last_params = completion, wanted
        if foreign := unknown_token(completion, self._codec):
            raise EpisodeFailure("unknown_token", foreign)
        if self.limits.max_turns == 1:  # a single answer, whose tokens may be in other processes
            return ParsedTurn("")
        ids = self._without_closing(completion)
        text = self._codec.decode_all(ids)
        turn = self._parser.parse(text, self.record.tools, taken=self._call_ids)
        self._call_ids += [call.id for call in turn.calls]
        self.record.messages.append(turn.message)
        return turn

    @property
    def is_cut(self) -> bool:
        """True if the last turn was cut off at a length limit, so that it is not complete."""
        return self._last is not None and self._last.finish_reason == "length"

    def add(self, messages: Sequence[Message], *, state: str | None = None) -> None:
        """Append messages of tools, environment or user to the conversation.

        Args:
            messages: at least one.
            state: of the environment before the next turn; None: what the messages say.

        Raises:
            EpisodeFailure: the chat template does not take them.
        """
        assert self._last is not None, "need a turn before the messages that follow it"
        turn: Message = next(m for m in reversed(self.record.messages) if m["role"] == "assistant")
        with as_failure():
            given = self._renderer.follow(turn, messages, sampled=self._last.token_ids)
        self.tape.append_given(given)
        self.record.messages += messages
        self._note_state(state, messages)
        self.count("tokens_given", len(given))

    def _note_state(self, state: str | None, messages: Sequence[Message]) -> None:
        """Note the state that the next turn starts from; single answers have none."""
        if self.limits.max_turns > 1:
            told = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
            self._state = state_number(told if state is None else state)

    def note_results(self, results: Sequence[ToolResult]) -> None:
        """Note rewards, failures and metrics of the calls of the last turn."""
        for result in results:
            if result.outcome != "ok":
                self.count(f"calls_{result.outcome}")
            self._note(result.reward, result.metrics)

    def note_step(self, step: StepResult) -> None:
        """Note reward and metrics of an environment's answer to the last turn."""
        self._note(step.reward, step.metrics)

    def _note(self, reward: float | None, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.count(name, value)
        if reward is not None:
            rewards = self.record.turn_rewards
            rewards += [0.0] * (self.num_turns - len(rewards))
            rewards[-1] += reward

    def count(self, name: str, value: float = 1) -> None:
        """Add to a count of the episode."""
        self._counts[name] = self._counts.get(name, 0.0) + value

    def count_calls(self, number: int) -> None:
        """Count calls of tools before they are made.

        Raises:
            EpisodeEnd: there are too many.
        """
        if self.limits.max_calls is not None and self._num_calls + number > self.limits.max_calls:
            raise EpisodeEnd("max_calls")
        self._num_calls += number
        self._num_bad_calls = 0
        self.count("calls", number)

    def count_bad_call(self) -> None:
        """Count a call that cannot be parsed.

        Raises:
            EpisodeEnd: there are too many, one after the other.
        """
        self._num_bad_calls += 1
        self.count("bad_calls")
        if self._num_bad_calls >= self.limits.max_bad_calls:
            raise EpisodeEnd("bad_calls")

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Take the seconds that tools and environments need, while the engine waits for the episode."""
        begun_s = time.monotonic()
        try:
            yield
        finally:
            self.count("environment_s", time.monotonic() - begun_s)

    def trajectory(self) -> Trajectory:
        """The episode as it is now."""
        segments = [tape.segment() for tape in self._tapes if tape.num_turns]
        last = segments[-1] if segments else Segment([], [], [], None, [])
        trajectory = Trajectory(
            self.start.prompt,
            last.prompt_ids,
            last.response_ids,
            last.response_mask,
            last.rollout_logprobs,
            last.versions,
            group=0,
            truncated=self.is_cut,
            states=last.states,
        )
        trajectory.earlier = segments[:-1]
        if self._last is not None:
            trajectory.text = self._text(self._last)
        if self.limits.max_turns > 1:
            self._counts["turns"] = self.num_turns
            self._counts["tokens_sampled"] = sum(sum(s.response_mask) for s in segments)
            self._counts["segments"] = len(segments)
            if self.record.turn_rewards:
                self.record.turn_rewards += [0.0] * (self.num_turns - len(self.record.turn_rewards))
            self.record.counts = self._counts
            trajectory.episode = self.record
        return trajectory

    def _count_sampled(self, completion: Completion, seconds: float) -> None:
        """Count the seconds of a turn in the engine, and the tokens of the history that it computed."""
        self.count("sampling_s", seconds)
        if completion.num_reused is not None:
            self.count("prompt_tokens_computed", len(self.tape.ids) - completion.num_reused)
            self.count("prompt_tokens_reused", completion.num_reused)

    def _turn_params(self, params: SamplingParams) -> SamplingParams:
        ids, limits = self.tape.ids, self.limits
        room = params.max_tokens
        if limits.max_tokens is not None:
            room = min(room, limits.max_tokens - (len(ids) - len(self.tape.prompt_ids)))
        if limits.context is not None and limits.max_turns > 1:
            room = min(room, limits.context - len(ids))
        if room < 1:
            raise EpisodeEnd("max_tokens")
        number = self.params.sample_index + self.num_turns * TURN_STRIDE
        return replace(params, n=1, seed=self.params.seed, sample_index=number, max_tokens=room)

    def _without_closing(self, completion: Completion) -> list[int]:
        ids = list(completion.token_ids)
        while ids and ids[-1] in self._codec.stop_ids:
            ids.pop()
        return ids

    def _text(self, completion: Completion) -> str:
        if completion.text is not None:
            return completion.text
        return self._codec.decode_answer(completion.token_ids, self._last_params.stop)


@contextmanager
def as_failure() -> Iterator[None]:
    """Make the refusal of a chat template an outcome: a policy may write what no template takes."""
    try:
        yield
    except ValueError as error:
        raise EpisodeFailure("episode_not_rendered", str(error)) from error


def joined_content(first: str | list[Any], second: str | list[Any]) -> str | list[Any]:
    """Contents of two messages as one: a text, or parts if one of them has parts."""
    if isinstance(first, str) and isinstance(second, str):
        return first + second
    both = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in (first, second)]
    return [part for parts in both for part in parts]


def fetched(completion: Completion) -> Completion:
    """A completion with its tokens in this process, fetched in one piece each."""
    logprobs = completion.logprobs
    return replace(
        completion,
        token_ids=list(completion.token_ids[:]),
        logprobs=None if logprobs is None else list(logprobs[:]),
    )


def unknown_token(completion: Completion, codec: TextCodec) -> str:
    """Message about an id in an answer that is no token; "" if there is none.

    Answers whose ids are in other processes come from the policy itself, which samples none.
    """
    ids, known = completion.token_ids, codec.num_ids
    if not isinstance(ids, (list, tuple)) or max(ids, default=0) < known:
        return ""
    return (
        f"the engine sampled the id {max(ids)}, a row of the model that is no token, since the tokenizer "
        f"has {known} ids; lower sampling.temperature or set sampling.top_p, or save the model with as "
        "many rows as its tokenizer has ids"
    )
