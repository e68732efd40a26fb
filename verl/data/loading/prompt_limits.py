"""Limits on the tokens of prompts: those that are dropped, and room for the answer."""

from __future__ import annotations

from dataclasses import dataclass

from verl.data.reading.row_cells import MalformedRow
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec


@dataclass(frozen=True)
class PromptLimits:
    """Limits on prompts.

    Attributes:
        codec: of the policy.
        max_prompt_tokens: longer prompts are dropped.
        context: tokens that the policy reads at most, prompt and answer together.
        answer_tokens: room for an answer to a prompt without `max_tokens` of its own; 0: none is needed.
    """

    codec: TextCodec
    max_prompt_tokens: int
    context: int
    answer_tokens: int

    def num_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt.

        Raises:
            ValueError: the chat template refuses it.
        """
        return len(self.codec.encode_prompt(prompt))

    def room_of(self, prompt: Prompt, num_tokens: int) -> int:
        """Tokens of a prompt and its longest answer."""
        return num_tokens + int(prompt.sampling.get("max_tokens", self.answer_tokens))

    def check_room(self, num_tokens: int, room: int) -> None:
        """Check that a prompt and its answer are within the context.

        Args:
            num_tokens: of the prompt.
            room: `room_of` it.

        Raises:
            ValueError: they are not.
        """
        if self.answer_tokens and room > self.context:
            raise ValueError(
                f"need prompt and answer within the policy's context of {self.context} tokens, got a prompt "
                f"of {num_tokens} and sampling.max_tokens {room - num_tokens}; lower sampling.max_tokens, "
                "that of the row or data.max_prompt_tokens"
            )

    def admits(self, prompt: Prompt) -> bool:
        """False for a prompt that is too long.

        Raises:
            MalformedRow: the chat template refuses it.
            ValueError: it leaves no room for an answer.
        """
        try:
            num_tokens = self.num_tokens(prompt)
        except ValueError as error:
            raise MalformedRow(str(error)) from error
        if num_tokens > self.max_prompt_tokens:
            return False
        self.check_room(num_tokens, self.room_of(prompt, num_tokens))
        return True
