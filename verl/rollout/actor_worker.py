"""The policy as a worker that also answers prompts, and the engine that lets a group of such workers answer
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from verl.algorithms.objective import Algorithm
from verl.controller.dispatch import SAME_ON_ALL, THREE_D_ALL_MICRO_DP, register
from verl.controller.worker_group import WorkerError, WorkerGroup
from verl.data.batch import Batch, Ragged
from verl.engines.base import TrainEngine
from verl.engines.hf.hf_io import lora_adapter_files
from verl.engines.hf.lora import has_lora
from verl.engines.roles.base import FULLEST
from verl.engines.roles.policy import PolicyWorker
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.embedded.hybrid_engine import HybridEngine
from verl.rollout.engine import ColocatedEngine
from verl.rollout.pool.p2p import PolicyWeightSender
from verl.utils.device import synchronize
from verl.utils.sampling_types import Completion, FinishReason, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec
from verl.weight_sync.cuda_ipc import export_handle
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.layout import Bounds, full_bounds
from verl.weight_sync.shard_tracking import shard_key, slices_of
from verl.weight_sync.shared_memory import dtype_of, map_file, num_bytes_of, unpack
from verl.weight_sync.types import TensorInfo

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
        self._shared: list[Tensor] = []

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
        self._embedded.publish(version)
        with self.engine.unsharded_weights() if self._hybrid is None else self._hybrid.ready(version):
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
        for name, tensor in self.engine.whole_tensors():
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

    @register(FULLEST)
    def take_switches(self) -> dict[str, float]:
        """What the switches to the generation layout took since this was last asked, on the rank to which
        they cost most.
        """
        return {} if self._hybrid is None else self._hybrid.take_switches()

    @register(SAME_ON_ALL)
    def trains_lora_only(self) -> bool:
        """Whether low-rank additions are trained, and nothing else."""
        return has_lora(self.model.transformer)

    @register(SAME_ON_ALL)
    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor of the policy, as in a Hugging Face folder."""
        return list(self.engine.shapes().items())

    @register(SAME_ON_ALL)
    def write_weights(
        self, infos: Sequence[TensorInfo], path: str, slices: Mapping[str, Sequence[Bounds]]
    ) -> tuple[dict[str, int], Tensor | None]:
        """Writes tensors of the policy end to end into a file that is mapped; all ranks gather, the first one
        writes.

        Returns:
            For each tensor and for its `slices` their digests as they were before they were written, by
            `shard_key`; and the bytes, if there is no such file where the rank is.
        """
        target = self._target(infos, path) if self.dispatch_ranks["ranks"].data_rank == 0 else None
        digests = self._fill(target, infos, slices)
        return digests, None if target is None or Path(path).exists() else target

    @register(SAME_ON_ALL)
    def share_weights(
        self, infos: Sequence[TensorInfo], slices: Mapping[str, Sequence[Bounds]]
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """As `write_weights`, into memory of the first rank's GPU, which stays until `drop_shared`; the
        handle of it, and the digests.

        Raises:
            ValueError: the policy is not on a GPU.
        """
        device = self.engine.model.device
        if device.type != "cuda":
            raise ValueError(
                f"need the policy on a GPU for rollout.weights_via=ipc, it is on {device}; take auto"
            )
        if self.dispatch_ranks["ranks"].data_rank != 0:
            return self._fill(None, infos, slices), {}
        target = torch.empty(num_bytes_of(infos), dtype=torch.uint8, device=device)
        digests = self._fill(target, infos, slices)
        self._shared.append(target)
        synchronize(device)
        return digests, export_handle(target)

    @register(SAME_ON_ALL)
    def drop_shared(self) -> None:
        """Gives the memory of `share_weights` back as soon as no engine reads it."""
        self._shared.clear()

    def _fill(
        self, target: Tensor | None, infos: Sequence[TensorInfo], slices: Mapping[str, Sequence[Bounds]]
    ) -> dict[str, int]:
        """All ranks gather, and one has a target for the tensors, end to end; their digests there."""
        wanted = {info.name: info for info in infos}
        digests: dict[str, int] = {}
        slots = {info.name: place for info, place in unpack(target, infos)} if target is not None else {}
        for name, tensor in self.engine.whole_tensors(wanted):
            if target is None:
                continue
            served = tensor.to(dtype_of(wanted[name]))
            for bounds in {full_bounds(wanted[name].shape), *slices[name]}:
                digests[shard_key(name, bounds, shape=wanted[name].shape)] = digest(served[slices_of(bounds)])
            slots[name].copy_(served)
        return digests

    def _target(self, infos: Sequence[TensorInfo], path: str) -> Tensor:
        num_bytes = num_bytes_of(infos)
        exists = Path(path).exists()
        return (
            map_file(Path(path), num_bytes, for_writing=True)
            if exists
            else torch.empty(num_bytes, dtype=torch.uint8)
        )

    @register(SAME_ON_ALL)
    def additions(self) -> dict[str, bytes]:
        """The files of the low-rank additions in PEFT format, by name."""
        return lora_adapter_files(self.model.transformer)


class PolicyEngine(RolloutEngine):
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
        """See `RolloutEngine.close`; ranks that have failed are gone."""
        with suppress(WorkerError):
            self._actor.call(ActorWorker.end).result()

    @override
    def take_metrics(self) -> dict[str, float]:
        return self._actor.call(ActorWorker.take_switches).result()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

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
