"""One conversation of an episode while it runs: a segment with its messages and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from verl.agents.episodes.tape import Tape
from verl.data.trajectory import state_number
from verl.utils.chat.turn_rendering import Message, TurnRenderer
from verl.utils.sampling_types import Completion, SamplingParams
from verl.utils.tokens import TextCodec


class LiveConversation:
    """Messages of a segment, and their tokens on a tape.

    Args:
        prompt_ids: tokens before the first turn.
        messages: before the first turn.
        tools: schemas of the tools offered.
        renderer: of what follows a turn.

    Attributes:
        tape: the tokens.
        messages: so far, turns of the policy included.
        tools: as above.
        last: the last turn as it was sampled; None: there is none yet.
        params: with which it was sampled.
        state: number of the state before the next turn, see `verl.data.trajectory.state_number`.
        renderer: as above.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        *,
        renderer: TurnRenderer,
    ) -> None:
        self.tape = Tape(prompt_ids)
        self.messages, self.tools = list(messages), list(tools)
        self.last: Completion | None = None
        self.params: SamplingParams | None = None
        self.state = 0
        self.renderer = renderer

    @property
    def is_cut(self) -> bool:
        """True if the last turn was cut off at a length limit, so that it is not complete."""
        return self.last is not None and self.last.finish_reason == "length"

    def turn_ids(self, codec: TextCodec) -> list[int]:
        """Ids of the last turn without the tokens that end it."""
        assert self.last is not None, "need a turn"
        ids = list(self.last.token_ids)
        while ids and ids[-1] in codec.stop_ids:
            ids.pop()
        return ids

    def turn_text(self, codec: TextCodec) -> str:
        """Text of the last turn for readers; "" before the first."""
        if self.last is None or self.params is None:
            return ""
        if self.last.text is not None:
            return self.last.text
        return codec.decode_answer(self.last.token_ids, self.params.stop)

    def note_state(self, state: str | None, messages: Sequence[Message]) -> None:
        """Note the state that the next turn starts from; None: what the messages say."""
        told = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
        self.state = state_number(told if state is None else state)

    def add(self, messages: Sequence[Message]) -> int:
        """Append messages that follow the last turn; returns the number of their tokens.

        Raises:
            ValueError: the chat template does not take them.
        """
        assert self.last is not None, "need a turn before the messages that follow it"
        turn: Message = next(m for m in reversed(self.messages) if m["role"] == "assistant")
        given = self.renderer.follow(turn, messages, sampled=self.last.token_ids)
        self.tape.append_given(given)
        self.messages += messages
        return len(given)
