"""One episode while it runs: its tokens, its messages, its limits, and the engine that answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from verl.agents.environments.session import EpisodeFailure, EpisodeStart, StepResult, ToolResult
from verl.agents.episodes.conversation import LiveConversation
from verl.agents.episodes.tape import Tape
from verl.config.agent import Ending
from verl.data.trajectory import EpisodeRecord, Segment, Trajectory
from verl.rollout.group_sampling import Sampler
from verl.utils.chat.turn_rendering import Message, TurnRenderer, renderer_for
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
        is_single: an answer without further turns, whose tokens may be in other processes.
    """

    max_turns: int = 1
    max_calls: int | None = None
    max_tokens: int | None = None
    max_bad_calls: int = 3
    context: int | None = None
    is_single: bool = False


class LiveEpisode:
    """One episode while it runs.

    A driver calls `begin`, then `answer` and `add` in turn. A conversation that does not continue the one on
    the tape opens a new segment (`begin` again). A driver may also keep several conversations open, each a
    segment, and `sample` a turn of any.

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
        record: ending, rewards and counts so far; its messages are those of the last segment.
        num_turns: turns so far, of all segments, those being sampled included.
        codec, parser: as above.
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
        self.codec, self.parser = codec, parser
        self._engine, self._affinity = engine, affinity
        self._conversations: list[LiveConversation] = []
        self._num_calls = self._num_bad_calls = self._num_sampled = 0
        self._call_ids: list[str] = []
        self._counts: dict[str, float] = {}

    @property
    def conversation(self) -> LiveConversation:
        """The current segment: the one that was begun or sampled last."""
        return self._conversations[-1]

    @property
    def tape(self) -> Tape:
        """Tokens of the current segment."""
        return self.conversation.tape

    def first_messages(self, more: Sequence[Message] = ()) -> list[Message]:
        """Messages of the prompt, and those of the environment behind them.

        A user message behind the last user message of the prompt is appended to its text, as in TRL. To a
        prompt that is a text, messages of the environment are appended as they are.
        """
        prompt = self.start.prompt
        own = [] if is_text(prompt) else self.codec.messages(prompt)
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
        renderer: TurnRenderer | None = None,
    ) -> LiveConversation:
        """Begin a segment.

        Args:
            messages: the conversation before the next turn.
            tools: schemas of the tools offered.
            prompt_ids: its tokens, if they are known.
            state: of the environment before the next turn; None: what the messages say.
            renderer: of the messages; None: that of the row's prompt.

        Raises:
            EpisodeFailure: the chat template does not take the messages.
            ValueError: it writes calls in a form that is not known.
        """
        self.parser.check_tools(tools)
        renderer = renderer or renderer_for(self.codec, self.start.prompt, tools)
        with as_failure():
            ids = renderer.start(messages) if prompt_ids is None else prompt_ids
        conversation = LiveConversation(ids, messages, tools, renderer=renderer)
        if not self.limits.is_single:
            conversation.note_state(state, messages)
        self._conversations.append(conversation)
        self.record.messages, self.record.tools = conversation.messages, conversation.tools
        return conversation

    async def sample(
        self, conversation: LiveConversation, params: SamplingParams | None = None
    ) -> Completion:
        """Sample the tokens of the next turn of a conversation; `answer` also parses them.

        A call that is cancelled leaves the conversation as it was.

        Args:
            conversation: of this episode.
            params: in place of those of the episode; seed and sample index stay those of the episode.

        Raises:
            EpisodeEnd: a limit is reached, by this turn or before it.
            EpisodeFailure: the engine sampled an id that is no token.
        """
        if self.num_turns >= self.limits.max_turns:
            raise EpisodeEnd("max_turns")
        wanted = self._turn_params(conversation.tape, params or self.params)
        self.num_turns += 1
        self._num_sampled += 1  # turns at the same time have other random numbers
        begun_s = time.monotonic()
        try:
            completion = await self._engine.sample(conversation.tape.ids, wanted, self._affinity)
        except BaseException:  # also a cancellation
            self.num_turns -= 1
            raise
        if not self.limits.is_single:
            completion = fetched(completion)
            self.count("sampling_s", time.monotonic() - begun_s)
        if not self.limits.is_single and completion.num_reused is not None:
            self.count("prompt_tokens_computed", len(conversation.tape.ids) - completion.num_reused)
            self.count("prompt_tokens_reused", completion.num_reused)
        conversation.tape.append_sampled(completion, conversation.state)
        conversation.last, conversation.params = completion, wanted
        self._conversations.remove(conversation)
        self._conversations.append(conversation)
        if foreign := unknown_token(completion, self.codec):
            raise EpisodeFailure("unknown_token", foreign)
        return completion

    async def answer(self, params: SamplingParams | None = None) -> ParsedTurn:
        """Sample and parse the next turn of the current conversation; see `sample`.

        Raises:
            EpisodeEnd: a limit is reached, by this turn or before it.
            EpisodeFailure: the engine sampled an id that is no token.
        """
        conversation = self.conversation
        await self.sample(conversation, params)
        if self.limits.is_single:
            return ParsedTurn("")
        text = self.codec.decode_all(conversation.turn_ids(self.codec))
        turn = self.parsed(text, conversation.tools)
        conversation.messages.append(turn.message)
        return turn

    def parsed(self, text: str, tools: Sequence[dict[str, Any]]) -> ParsedTurn:
        """A turn from its text; calls without ids get new ones."""
        turn = self.parser.parse(text, tools, taken=self._call_ids)
        self._call_ids += [call.id for call in turn.calls]
        return turn

    @property
    def is_cut(self) -> bool:
        """True if the last turn was cut off at a length limit, so that it is not complete."""
        return bool(self._conversations) and self.conversation.is_cut

    def add(
        self,
        messages: Sequence[Message],
        *,
        state: str | None = None,
        conversation: LiveConversation | None = None,
    ) -> None:
        """Append messages of tools, environment or user to a conversation.

        Args:
            messages: at least one.
            state: of the environment before the next turn; None: what the messages say.
            conversation: of this episode; None: the current one.

        Raises:
            EpisodeFailure: the chat template does not take them.
        """
        conversation = conversation or self.conversation
        with as_failure():
            self.count("tokens_given", conversation.add(messages))
        conversation.note_state(state, messages)

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
        answered = [c for c in self._conversations if c.tape.num_turns]
        segments = [c.tape.segment() for c in answered]
        last = segments[-1] if segments else Segment([], [], [], None, [])
        trajectory = Trajectory(
            self.start.prompt,
            last.prompt_ids,
            last.response_ids,
            last.response_mask,
            last.rollout_logprobs,
            last.versions,
            group=0,
            truncated=bool(answered) and answered[-1].is_cut,
            states=last.states,
        )
        trajectory.earlier = segments[:-1]
        if answered:
            trajectory.text = answered[-1].turn_text(self.codec)
        if self.limits.is_single:
            return trajectory
        self._counts["turns"] = self.num_turns
        self._counts["tokens_sampled"] = sum(sum(s.response_mask) for s in segments)
        self._counts["segments"] = len(segments)
        if self.record.turn_rewards:
            self.record.turn_rewards += [0.0] * (self.num_turns - len(self.record.turn_rewards))
        self.record.counts = self._counts
        if shown := answered[-1:] or self._conversations[-1:]:
            self.record.messages, self.record.tools = shown[0].messages, shown[0].tools
        trajectory.episode = self.record
        return trajectory

    def _turn_params(self, tape: Tape, params: SamplingParams) -> SamplingParams:
        ids, limits = tape.ids, self.limits
        room = params.max_tokens
        if limits.max_tokens is not None:
            room = min(room, limits.max_tokens - (len(ids) - len(tape.prompt_ids)))
        if limits.context is not None and not limits.is_single:
            room = min(room, limits.context - len(ids))
        if room < 1:
            raise EpisodeEnd("max_tokens")
        number = self.params.sample_index + self._num_sampled * TURN_STRIDE
        return replace(params, n=1, seed=self.params.seed, sample_index=number, max_tokens=room)


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
