"""The policy as a worker that also answers prompts, and the engine that lets a group of such workers answer
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import SAME_ON_ALL, THREE_D_ALL_MICRO_DP, register
from verl.controller.worker_group import WorkerError, WorkerGroup
from verl.data.batch import Batch, Ragged
from verl.engines.base import TrainEngine
from verl.engines.roles.policy import PolicyWorker
from verl.engines.roles.role_worker import MAX_OVER_RANKS
from verl.engines.roles.weight_sender import PolicyWeightSender
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.embedded.hybrid_engine import HybridEngine
from verl.rollout.engine import ColocatedEngine
from verl.utils.sampling_types import BatchGenerator, Completion, FinishReason, SamplingParams
from verl.utils.tokens import TextCodec
from verl.weight_sync.fingerprint import digest, fingerprint

# Of the answers to one prompt: why each ended, and its text.
Answers = list[tuple[FinishReason, str]]


class ActorWorker(PolicyWeightSender, PolicyWorker):
    """A policy that generates with the weights that it trains.

    Args:
        engine: of a `PolicyModel`.
        algorithm: what to minimise.
        codec: tokenizer of the policy.
        max_slots: answers generated at the same time.
        temperature: see `PolicyWorker`.
        epochs: see `PolicyWorker`.
        chunk: see `PolicyWorker`.
        generator: an engine with weights of its own; none: the policy itself generates.
        hybrid: the policy in a layout to generate in; none: in that of training.
    """

    def __init__(
        self,
        engine: TrainEngine,
        algorithm: Algorithm,
        codec: TextCodec,
        *,
        max_slots: int,
        temperature: float,
        epochs: int,
        chunk: int,
        generator: ColocatedEngine | None = None,
        hybrid: HybridEngine | None = None,
    ) -> None:
        super().__init__(engine, algorithm, temperature=temperature, epochs=epochs, chunk=chunk)
        self._codec, self._hybrid = codec, hybrid
        if hybrid is not None:
            self.dispatch_ranks = {**self.dispatch_ranks, "generate": hybrid.dispatch_rank}
        self._embedded = EmbeddedEngine(
            self.model if hybrid is None else hybrid.model, codec, max_slots=max_slots
        )
        self._apart = generator
        self._has_weights = False

    @register(THREE_D_ALL_MICRO_DP)
    def generate(
        self, prompts: list[Sequence[int]], params: list[SamplingParams], version: int
    ) -> tuple[list[Answers], Batch]:
        """Answers this rank's prompts; `version` is that of the weights.

        Returns:
            For each prompt why each of its answers ended and its text, and the tokens of all of them as a
            batch, answer by
            answer: `response_ids` and `rollout_logprobs`.
        """
        groups = (
            self._by_policy(prompts, params, version)
            if self._apart is None
            else self._by(self._apart, prompts, params, version)
        )
        completions = [completion for group in groups for completion in group]
        tokens = Batch(
            {
                "response_ids": Ragged.from_rows([c.token_ids for c in completions], torch.int64),
                "rollout_logprobs": Ragged.from_rows([c.logprobs or [] for c in completions], torch.float32),
            }
        )
        texts = [
            [(c.finish_reason, self._codec.decode_answer(c.token_ids, wanted.stop)) for c in group]
            for group, wanted in zip(groups, params, strict=True)
        ]
        return texts, tokens

    def _by_policy(
        self, prompts: list[Sequence[int]], params: list[SamplingParams], version: int
    ) -> list[list[Completion]]:
        self._embedded.version = version
        with self.engine.unsharded_weights() if self._hybrid is None else self._hybrid.loaded(version):
            return self._embedded.generate(prompts, params) if prompts else []

    def _by(
        self,
        generator: ColocatedEngine,
        prompts: list[Sequence[int]],
        params: list[SamplingParams],
        version: int,
    ) -> list[list[Completion]]:
        """With an engine that takes the weights over when they have changed; tensor ranks leave the answers
        to their first.
        """
        if not self._has_weights or generator.version != version:
            digests: dict[str, int] = {}
            self._has_weights = False
            got = generator.load(self._noted_weights(digests), version)
            if got != fingerprint(digests):
                raise RuntimeError(
                    f"the engine has weights {got} of version {version}, it was given {fingerprint(digests)}; see the log"
                )
            self._has_weights = True
        if not self.dispatch_ranks["generate"].collects:
            return [[] for _ in prompts]
        return generator.generate(prompts, params) if prompts else []

    def _noted_weights(self, digests: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.engine.full_tensors():
            digests[name] = digest(tensor)
            yield name, tensor

    @register(SAME_ON_ALL)
    def end(self) -> None:
        """Ends an engine with weights of its own."""
        if self._apart is not None:
            self._apart.close()

    @register(SAME_ON_ALL)
    def sleep(self) -> None:
        """Gives back the device memory of weights that only generate."""
        if self._apart is not None and self._has_weights:
            self._apart.sleep()
            self._has_weights = False
        if self._hybrid is not None:
            self._hybrid.sleep()

    @register(MAX_OVER_RANKS)
    def take_switches(self) -> dict[str, float]:
        """What the switches to the generation layout took since this was last asked, on the rank to which
        they cost most.
        """
        return {} if self._hybrid is None else self._hybrid.take_metrics()


class PolicyGenerator(BatchGenerator):
    """Lets the ranks of the policy answer, each its share of the prompts: no copy of the weights, no sync.

    Where the ranks are other processes, the tokens stay with them: the completions know their lengths, and
    fetch what is read.
    """

    def __init__(self, actor: WorkerGroup) -> None:
        self._actor = actor

    @override
    def sleep(self) -> None:
        self._actor.call(ActorWorker.sleep).result()

    def close(self) -> None:
        """See `BatchGenerator.close`; ranks that have failed are gone."""
        with suppress(WorkerError):
            self._actor.call(ActorWorker.end).result()

    @override
    def take_metrics(self) -> dict[str, float]:
        return self._actor.call(ActorWorker.take_switches).result()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See `BatchGenerator.generate`.

        Raises:
            ValueError: an empty prompt, or prompt and answer longer than the model's context.
            RuntimeError: the model's logits are not finite.
        """
        if len(prompts) != len(params):
            raise ValueError(
                f"need sampling parameters for each prompt, got {len(prompts)} prompts and {len(params)} parameters"
            )
        groups, tokens = self._actor.call(
            ActorWorker.generate, list(prompts), list(params), self.version
        ).result()
        rows = zip(tokens.rows("response_ids"), tokens.rows("rollout_logprobs"), strict=True)
        return [
            [Completion(*next(rows), reason, self.version, text) for reason, text in group]
            for group in groups
        ]
