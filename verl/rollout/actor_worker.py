"""The policy as a worker that also generates, and the generator over a group of such workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import (
    SAME_ON_ALL,
    THREE_D_ALL_MICRO_DP,
    DispatchMode,
    concat,
    register,
    split_lists,
)
from verl.controller.worker_group import WorkerError, WorkerGroup
from verl.data.batch import Batch, Ragged
from verl.engines.base import TrainEngine
from verl.engines.roles.policy import PolicyWorker
from verl.engines.roles.role_worker import MAX_OVER_RANKS
from verl.engines.roles.weight_sender import PolicyWeightSender
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.embedded.hybrid_engine import HybridEngine
from verl.rollout.inference_server import ColocatedEngine
from verl.rollout.turn_routing import TurnRouting
from verl.utils.sampling_types import (
    BatchGenerator,
    Completion,
    FinishReason,
    SampleAnswer,
    SampleRequest,
    SamplingParams,
    check_lengths,
)
from verl.utils.tokens import TextCodec
from verl.weight_sync.fingerprint import digest, fingerprint

# Finish reason and text of each answer to one prompt.
Answers = list[tuple[FinishReason, str]]
# Entry i of each argument for the i-th of the ranks that generate by themselves.
TURNS_BY_RANK = DispatchMode("generate", split_lists, concat)


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
        generator: an engine with a separate copy of the weights; None: the policy itself generates.
        hybrid: the policy in a generation layout; None: it generates in the training layout.
        prefix_tokens: see `EmbeddedEngine`.
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
        chunk: int | None,
        generator: ColocatedEngine | None = None,
        hybrid: HybridEngine | None = None,
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__(engine, algorithm, temperature=temperature, epochs=epochs, chunk=chunk)
        self._codec, self._hybrid = codec, hybrid
        if hybrid is not None:
            self.dispatch_ranks = {**self.dispatch_ranks, "generate": hybrid.dispatch_rank}
        sampled = self.model if hybrid is None else hybrid.model
        self._embedded = EmbeddedEngine(sampled, codec, max_slots=max_slots, prefix_tokens=prefix_tokens)
        self._colocated = generator
        self._has_weights = False

    @register(THREE_D_ALL_MICRO_DP)
    def generate(
        self, prompts: list[Sequence[int]], params: list[SamplingParams], version: int
    ) -> tuple[list[Answers], Batch]:
        """Answer this rank's prompts with the weights of `version`.

        Returns:
            Finish reasons and texts of the answers to each prompt, and a batch with a row per answer:
            `response_ids` and `rollout_logprobs`.
        """
        groups = (
            self._generate_by_policy(prompts, params, version)
            if self._colocated is None
            else self._generate_by(self._colocated, prompts, params, version)
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

    @register(TURNS_BY_RANK)
    def advance(self, requests: list[SampleRequest], dropped: list[int], version: int) -> list[SampleAnswer]:
        """Generate a few tokens of this rank's turns; see `BatchGenerator.advance`."""
        self._embedded.version = version
        with self._policy_weights(version):
            return self._embedded.advance(requests, dropped)

    def _generate_by_policy(
        self, prompts: list[Sequence[int]], params: list[SamplingParams], version: int
    ) -> list[list[Completion]]:
        self._embedded.version = version
        with self._policy_weights(version):
            return self._embedded.generate(prompts, params) if prompts else []

    def _policy_weights(self, version: int) -> AbstractContextManager[Any]:
        """Context in which the embedded engine has the weights of a version."""
        return self.engine.unsharded_weights() if self._hybrid is None else self._hybrid.loaded(version)

    def _generate_by(
        self,
        generator: ColocatedEngine,
        prompts: list[Sequence[int]],
        params: list[SamplingParams],
        version: int,
    ) -> list[list[Completion]]:
        """Answers of a colocated engine, which first loads weights that have changed.

        Of the ranks of a tensor-parallel group the first one returns the answers.
        """
        if not self._has_weights or generator.version != version:
            digests: dict[str, int] = {}
            self._has_weights = False
            got = generator.load(self._noted_weights(digests), version)
            if got != fingerprint(digests):
                raise RuntimeError(
                    f"the engine has weights {got} of version {version}, it was given "
                    f"{fingerprint(digests)}; see the log"
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
        """End the colocated engine."""
        if self._colocated is not None:
            self._colocated.close()

    @register(SAME_ON_ALL)
    def sleep(self) -> None:
        """Release the device memory of weights that only generate, and of rows kept for later turns."""
        self._embedded.sleep()
        if self._colocated is not None and self._has_weights:
            self._colocated.sleep()
            self._has_weights = False
        if self._hybrid is not None:
            self._hybrid.sleep()

    @register(MAX_OVER_RANKS)
    def take_switches(self) -> dict[str, float]:
        """Cost of the switches to the generation layout since the last call, the largest of all ranks."""
        return {} if self._hybrid is None else self._hybrid.take_metrics()


class PolicyGenerator(BatchGenerator):
    """Generation by the ranks of the policy, each for its share of the prompts; weights are not copied.

    Tokens stay with ranks that are other processes: a completion has their number, and fetches them when they
    are read. Those of turns come with them, since the next turn begins with them.

    Args:
        actor: the ranks.
        can_advance: the policy itself generates, and no colocated engine.
    """

    def __init__(self, actor: WorkerGroup, *, can_advance: bool = True) -> None:
        self._actor, self.can_advance = actor, can_advance
        self._routing: TurnRouting | None = None  # of turns since the last change of the weights

    @override
    def sleep(self) -> None:
        self._routing = None
        self._actor.call(ActorWorker.sleep).result()

    @override
    def advance(self, requests: Sequence[SampleRequest], dropped: Sequence[int]) -> list[SampleAnswer]:
        if self._routing is None:
            self._routing = TurnRouting(self._actor.layouts["generate"].num_parts)
        gone, new = self._routing.forget(dropped), self._routing.assign(requests)
        versions = [self.version] * len(new)
        advance: Any = ActorWorker.advance  # each rank gets its own entry of the lists
        answers: list[SampleAnswer] = self._actor.call(advance, new, gone, versions).result()
        self._routing.forget([answer.number for answer in answers])
        return answers

    @override
    def close(self) -> None:
        with suppress(WorkerError):  # ranks that have failed are gone
            self._actor.call(ActorWorker.end).result()

    @override
    def take_metrics(self) -> dict[str, float]:
        return self._actor.call(ActorWorker.take_switches).result()

    @override
    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        check_lengths(prompts, params)
        groups, tokens = self._actor.call(
            ActorWorker.generate, list(prompts), list(params), self.version
        ).result()
        rows = zip(tokens.rows("response_ids"), tokens.rows("rollout_logprobs"), strict=True)
        return [
            [Completion(*next(rows), reason, self.version, text) for reason, text in group]
            for group in groups
        ]
