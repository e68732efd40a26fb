"""The append-only record of the tokens of a segment: sampled ones and given ones."""

from __future__ import annotations

from collections.abc import Sequence

from verl.data.trajectory import Segment
from verl.utils.sampling_types import Completion


class Tape:
    """Tokens of a segment in the order in which the model read or sampled them.

    Nothing on it is changed or tokenized again: masks, versions and turns follow from what was appended.

    Args:
        prompt_ids: tokens before the first answer.

    Attributes:
        prompt_ids: as above.
        num_turns: runs of sampled tokens so far.
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        self.prompt_ids = prompt_ids
        self.num_turns = 0
        self._parts: list[Completion | list[int]] = []
        self._states: list[int] = []
        self._ids: list[int] | None = None

    @property
    def ids(self) -> list[int]:
        """All tokens so far, which the next answer continues."""
        if not self._parts:
            return self.prompt_ids  # the same list for all answers to a prompt, which is computed once
        if self._ids is None:
            self._ids = list(self.prompt_ids)
            for part in self._parts:
                self._ids += part if isinstance(part, list) else part.token_ids
        return self._ids

    def append_sampled(self, completion: Completion, state: int = 0) -> None:
        """Append tokens that the policy sampled; they are trained on.

        Args:
            completion: one turn.
            state: number of the state before it, see `verl.data.trajectory.state_number`.
        """
        self._parts.append(completion)
        self._states.append(state)
        self.num_turns += 1
        if self._ids is not None:
            self._ids = [*self._ids, *completion.token_ids]

    def append_given(self, token_ids: Sequence[int]) -> None:
        """Append tokens of tools, environments and the chat template; they are not trained on."""
        if token_ids:
            self._ids = [*self.ids, *token_ids]
            self._parts.append(list(token_ids))

    def segment(self) -> Segment:
        """The tokens as they go into a batch; those of a single answer may be remote.

        Given tokens behind the last sampled one are left out: nothing was sampled from them.
        """
        last = max((i for i, part in enumerate(self._parts) if isinstance(part, Completion)), default=-1)
        parts = self._parts[: last + 1]
        if len(parts) == 1 and isinstance(answer := parts[0], Completion):
            count = len(answer.token_ids)
            of_each = list(answer.versions or [answer.version] * count)
            own = [self._states[0]] * count if self._states[0] else []
            return Segment(self.prompt_ids, answer.token_ids, [True] * count, answer.logprobs, of_each, own)
        ids: list[int] = []
        mask: list[bool] = []
        states: list[int] = []
        of_turns = iter(self._states)
        logprobs: list[float] = []
        versions: list[int] = []
        for part in parts:
            sampled = isinstance(part, Completion)
            own = list(part.token_ids) if isinstance(part, Completion) else part
            ids += own
            mask += [sampled] * len(own)
            states += [next(of_turns) if sampled else 0] * len(own)
            if isinstance(part, Completion):
                logprobs += part.logprobs or ()
                versions += part.versions or [part.version] * len(own)
            else:
                logprobs += [0.0] * len(own)
                versions += [versions[-1] if versions else 0] * len(own)
        is_known = len(logprobs) == len(ids)  # an engine that gives text alone has none
        return Segment(self.prompt_ids, ids, mask, logprobs if is_known else None, versions, states)
