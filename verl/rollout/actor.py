"""The policy as a worker that also answers prompts, and the engine that lets a group of such workers answer them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verl.algorithms.compose import Algorithm
from verl.controller.dispatch import THREE_D_ALL_MICRO_DP, register
from verl.controller.group import WorkerGroup
from verl.data.batch import Batch, Ragged
from verl.engines.base import TrainEngine
from verl.engines.workers import PolicyWorker
from verl.rollout.embedded import EmbeddedEngine
from verl.utils.rollout import Completion, FinishReason, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec

# Of the answers to one prompt: why each ended, and its text.
Answers = list[tuple[FinishReason, str]]


class ActorWorker(PolicyWorker):
    """A policy that generates with the weights that it trains.

    Args:
        engine: of a `PolicyModel`.
        algorithm: what to minimise.
        codec: tokenizer of the policy.
        max_slots: answers generated at the same time.
        temperature: see `PolicyWorker`.
        epochs: see `PolicyWorker`.
        chunk: see `PolicyWorker`.
    """

    def __init__(
        self, engine: TrainEngine, algorithm: Algorithm, codec: TextCodec, *, max_slots: int, temperature: float, epochs: int, chunk: int
    ) -> None:
        super().__init__(engine, algorithm, temperature=temperature, epochs=epochs, chunk=chunk)
        self._codec = codec
        self._generator = EmbeddedEngine(self.model, codec, max_slots=max_slots)

    @register(THREE_D_ALL_MICRO_DP)
    def generate(self, prompts: list[Sequence[int]], params: list[SamplingParams], version: int) -> tuple[list[Answers], Batch]:
        """Answers this rank's prompts; `version` is that of the weights.

        Returns:
            For each prompt why each of its answers ended and its text, and the tokens of all of them as a batch, answer by
            answer: `response_ids` and `rollout_logprobs`.
        """
        self._generator.publish(version)
        with self.engine.whole_weights():
            groups = self._generator.generate(prompts, params) if prompts else []
        completions = [completion for group in groups for completion in group]
        tokens = Batch(
            {
                "response_ids": Ragged.from_rows([c.token_ids for c in completions], torch.int64),
                "rollout_logprobs": Ragged.from_rows([c.logprobs or [] for c in completions], torch.float32),
            }
        )
        texts = [
            [(c.finish_reason, self._codec.answer_text(c.token_ids, wanted.stop)) for c in group]
            for group, wanted in zip(groups, params, strict=True)
        ]
        return texts, tokens


class ActorEngine(RolloutEngine):
    """Lets the ranks of the policy answer, each its share of the prompts: no copy of the weights, no sync.

    Where the ranks are other processes, the tokens stay with them: the completions know their lengths, and fetch what is read.
    """

    def __init__(self, actor: WorkerGroup) -> None:
        self._actor = actor

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            ValueError: an empty prompt, or prompt and answer longer than the model's context.
            RuntimeError: the model's logits are not finite.
        """
        if len(prompts) != len(params):
            raise ValueError(f"need sampling parameters for each prompt, got {len(prompts)} prompts and {len(params)} parameters")
        groups, tokens = self._actor.call(ActorWorker.generate, list(prompts), list(params), self.version).result()
        rows = zip(tokens.rows("response_ids"), tokens.rows("rollout_logprobs"), strict=True)
        return [[Completion(*next(rows), reason, self.version, text) for reason, text in group] for group in groups]
