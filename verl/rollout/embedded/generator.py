"""Generation with the trainer's own parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from typing_extensions import override

from verl.engines.hf.models import PolicyModel
from verl.rollout.embedded.continuous_batch import ContinuousBatch, Row
from verl.rollout.embedded.prefix_cache import PrefixCache
from verl.utils.sampling_types import (
    BatchGenerator,
    Completion,
    SampleAnswer,
    SampleRequest,
    SamplingParams,
    check_requests,
    groups_of,
)
from verl.utils.tokens import TextCodec

# Tokens of each answer after which `advance` returns if an answer is complete, and at the latest.
_LEAST_STEPS, _MOST_STEPS = 4, 16


class EmbeddedEngine(BatchGenerator):
    """Answers prompts with the model that is being trained: same storage, no copy, no weight sync.

    Up to `max_slots` answers are generated at a time; when some finish, waiting ones take their slots. A
    group larger than `max_slots` is started in parts, and its prompt is computed once per part. The samples
    of an answer depend on its own seed alone (up to the rounding of differently shaped matrix products).

    Turns of episodes are answered by `advance`: a turn continues from the keys and values of the turns
    before, which are kept until the weights change.

    Args:
        model: the policy.
        codec: its tokenizer.
        max_slots: as above.
        prefix_tokens: limit on the tokens of rows that are kept for later turns; None: as many as the rows
            in generation take, 0: none.
    """

    can_advance = True

    def __init__(
        self,
        model: PolicyModel,
        codec: TextCodec,
        *,
        max_slots: int = 256,
        prefix_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.version = 0
        self._codec = codec
        self._max_slots = max_slots
        self._prefix_tokens = prefix_tokens
        self._turns: ContinuousBatch | None = None  # with the rows that it keeps
        self._turns_weights = (0, 0)  # that computed the kept rows, see `weights_id`
        # Numbers of the requests in generation, by prompt id and sample index in the batch.
        self._numbers: dict[tuple[int, int], int] = {}

    @override
    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        check_requests(prompts, params, context=self.model.context)
        slots = min(self._max_slots, sum(p.n for p in params))
        completions: list[list[Completion | None]] = [[None] * p.n for p in params]
        with self._generating():
            batch = ContinuousBatch(self.model, self._codec, slots=slots, first_slots=slots)
            for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
                batch.add(i, prompt, wanted, first_sample_index=wanted.sample_index)
            for row in batch.finished_rows():
                first = params[row.prompt_id].sample_index
                completions[row.prompt_id][row.sample_index - first] = self._completion(row)
        return [[c for c in group if c is not None] for group in completions]

    @override
    @torch.inference_mode()
    def advance(self, requests: Sequence[SampleRequest], dropped: Sequence[int]) -> list[SampleAnswer]:
        weights = self.version, weights_id(self.model)
        if self._turns_weights != weights:
            self.sleep()
        if self._turns is None:
            self._turns = ContinuousBatch(
                self.model,
                self._codec,
                slots=self._max_slots,
                first_slots=len(requests),
                prefixes=PrefixCache(self._prefix_tokens),
            )
            self._turns_weights = weights
        batch = self._turns
        try:
            with self._generating():
                self._drop(batch, dropped)
                answers = self._add(batch, requests)
                num_steps = 0
                while not batch.is_idle and num_steps < (_LEAST_STEPS if answers else _MOST_STEPS):
                    num_steps += 1
                    answers += [self._answer(row) for row in batch.step() if row.finish_reason is not None]
        except BaseException:  # also an interrupt, anywhere in a step
            self.sleep()
            raise
        return answers

    @override
    def sleep(self) -> None:
        self._turns, self._numbers = None, {}

    def _add(self, batch: ContinuousBatch, requests: Sequence[SampleRequest]) -> list[SampleAnswer]:
        """Queue requests, those for consecutive answers to one prompt together; answers of refused ones."""
        refused, fitting = list[SampleAnswer](), list[SampleRequest]()
        for request in requests:
            try:
                check_requests([request.prompt_ids], [request.params], context=self.model.context)
                fitting.append(request)
            except ValueError as error:
                refused.append(SampleAnswer(request.number, None, str(error)))
        for group in groups_of(fitting):
            prompt_id, first = group[0].number, group[0].params
            for i, request in enumerate(group):
                self._numbers[prompt_id, first.sample_index + i] = request.number
            wanted = first.of_group(len(group))
            batch.add(prompt_id, group[0].prompt_ids, wanted, first_sample_index=first.sample_index)
        return refused

    def _drop(self, batch: ContinuousBatch, dropped: Sequence[int]) -> None:
        """Abort requests that nobody waits for."""
        gone = set(dropped)
        for prompt_id, index in [key for key, number in self._numbers.items() if number in gone]:
            batch.abort(prompt_id, {index})
            del self._numbers[prompt_id, index]

    def _answer(self, row: Row) -> SampleAnswer:
        number = self._numbers.pop((row.prompt_id, row.sample_index))
        return SampleAnswer(number, self._completion(row))

    def _completion(self, row: Row) -> Completion:
        assert row.finish_reason is not None
        return Completion(
            row.tokens, row.logprobs, row.finish_reason, self.version, num_reused=row.num_reused
        )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Context in which the model samples."""
        was_training, num_ids = self.model.training, self.model.num_ids
        self.model.eval()
        self.model.num_ids = self._codec.num_ids  # rows of the head that are no tokens are never sampled
        try:
            with self.model.forward_mode():
                yield
        finally:
            self.model.train(was_training)
            self.model.num_ids = num_ids


def weights_id(model: PolicyModel) -> int:
    """Number that grows when parameters are changed in place, also under the same version.

    So a loop of the user's own, which trains the model between two calls, gets no keys and values of old
    weights.
    """
    return sum(p._version for p in model.parameters() if not p.is_inference())
