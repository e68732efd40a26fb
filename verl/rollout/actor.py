"""The policy as a worker that also answers prompts, and the engine that lets a group of such workers answer them."""

from __future__ import annotations

from collections.abc import Sequence

from verl.algorithms.compose import Algorithm
from verl.controller.dispatch import THREE_D_ALL_MICRO_DP, register
from verl.controller.group import WorkerGroup
from verl.engines.base import TrainEngine
from verl.engines.workers import PolicyWorker
from verl.rollout.embedded import EmbeddedEngine
from verl.utils.rollout import Completion, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec


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
        self._generator = EmbeddedEngine(self.model, codec, max_slots=max_slots)

    @register(THREE_D_ALL_MICRO_DP)
    def generate(self, prompts: list[Sequence[int]], params: list[SamplingParams], version: int) -> list[list[Completion]]:
        """Answers this rank's prompts; `version` is that of the weights."""
        self._generator.publish(version)
        with self.engine.whole_weights():
            return self._generator.generate(prompts, params)


class ActorEngine(RolloutEngine):
    """Lets the ranks of the policy answer, each its share of the prompts: no copy of the weights, no sync."""

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
        return self._actor.call(ActorWorker.generate, list(prompts), list(params), self.version).result()
