"""Contracts of generation engines: servers in other processes, and engines inside the policy's process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from verl.rollout.embedded.sampling import answer_seed
from verl.utils.sampling_types import BatchGenerator, FinishReason, SamplingParams
from verl.weight_sync.shard_tracking import ShardRanges
from verl.weight_sync.types import Transport, WeightChunk


class EngineError(RuntimeError):
    """An engine died, timed out or sent an invalid reply; its requests move to another engine."""


class RefusedError(ValueError):
    """An engine refuses a request that every other engine would refuse, too."""


@dataclass(frozen=True)
class ServerSpec:
    """One inference server to start or to join.

    Attributes:
        name: unique in a pool, for logs and messages.
        model: folder of the policy as it was at the start, with its tokenizer.
        options: of the engine itself, passed on unchanged.
        address: http://HOST:PORT of a server that is already running; None: the run starts one on the
            loopback interface.
        python: interpreter of the environment that has the engine installed; None: the current one.
        secret: API key of the server.
        log: file for the output of a server that the run starts.
        dtype: of the weights that it serves, as PyTorch names it.
        transport: how weights travel to it; None: the best transport that reaches it.
        timeout_s: longest time without any reply or token, once it has started.
        start_timeout_s: longest time to start.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None
    python: str | None = None
    secret: str = ""
    log: Path = Path("engine.log")
    dtype: str = "float32"
    transport: Transport | None = None
    timeout_s: float = 60.0
    start_timeout_s: float = 600.0


@dataclass(frozen=True)
class TokenChunk:
    """New tokens of a completion.

    Attributes:
        token_ids: sampled ids, the stop token included.
        logprobs: one per id, of the distribution that it was drawn from; None: unknown.
        finish_reason: why the completion ended; None: more tokens will come.
        version: of the weights that sampled these tokens, if the engine reports it.
        text: the whole completion, from an engine that returns text only; then there are no ids.
        num_reused: prompt tokens whose keys and values the engine had already; None: it does not say.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = ()
    finish_reason: FinishReason | None = None
    version: int | None = None
    text: str | None = None
    num_reused: int | None = None


def request_seed(params: SamplingParams) -> int:
    """Seed of one answer to a prompt, from 0 to 2^63 - 1, for engines that take a seed per request."""
    return answer_seed(params.seed, params.sample_index) & (2**63 - 1)


class ColocatedEngine(BatchGenerator):
    """An engine in the policy's own process that has a separate copy of the weights, in its own layout."""

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Load all weights of the policy; an engine that sleeps wakes up first.

        Args:
            tensors: by their names in a Hugging Face folder.
            version: of the policy.

        Returns:
            `fingerprint` of the tensors, computed as they were passed to the engine's model.
        """


class InferenceServer(ABC):
    """Client of an engine in another process, called from one event loop.

    Every method except `sample` returns within its time limit or raises.

    Attributes:
        spec: that it was made from.
        syncs_weights: it serves the policy's weights; otherwise it keeps its own.
        position_seeded: the random number of a token depends only on the seed and its position, so that
            another engine of this kind continues a completion exactly as this one would.
        transports: ways in which it takes weights, the best first.
        num_ranks: processes that load weights.
        read_ranges: parts of each tensor that each rank was seen to read in a complete update; the next
            update sends only these. None: unknown.
        records_reads: observe in the next update what the ranks read.
    """

    syncs_weights: bool = True
    position_seeded: bool = False
    transports: tuple[Transport, ...] = ()
    num_ranks: int = 1
    read_ranges: tuple[ShardRanges, ...] | None = None
    records_reads: bool = True

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec

    @property
    def transport(self) -> Transport:
        """Transport of the weights: that of the spec, else the first of `transports` that reaches it.

        Raises:
            ValueError: it does not take weights in this way.
        """
        host = urlsplit(self.spec.address or "").hostname
        is_local = self.spec.address is None or host == "localhost" or (host or "").startswith("127.")
        reachable = [each for each in self.transports if is_local or each not in ("shm", "ipc")]
        chosen = self.spec.transport or next(iter(reachable), None)
        if chosen not in reachable:
            raise ValueError(
                f"need a way for weights to engine {self.spec.name}, got {chosen}; "
                f"it takes {', '.join(reachable) or 'none'}"
            )
        return chosen

    @abstractmethod
    async def open(self) -> None:
        """Start the server, or join a running one; return when it answers requests.

        Raises:
            EngineError: it did not start; with the last lines of its log.
            ValueError: an invalid option, or a version of the engine that is too old.
        """

    @abstractmethod
    def sample(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenChunk]:
        """Stream one completion of a prompt; the last chunk has a finish reason.

        Leaving the iteration aborts the request in the engine.

        Args:
            prompt_ids: not empty.
            params: how to sample; `stop_ids` contain those of the tokenizer, and `n` is 1. Where the engine
                can be deterministic, equal weights, prompts, seeds and sample indices give equal completions.

        Raises:
            EngineError: also if nothing came for `spec.timeout_s`.
            RefusedError: for example a prompt that is too long.
        """

    @abstractmethod
    async def check(self) -> None:
        """Return if the engine is healthy.

        Raises:
            EngineError: it is not.
        """

    @abstractmethod
    async def close(self) -> None:
        """End what `open` started, in any state; a server that was joined keeps running. Never raises."""

    async def pause(self) -> None:
        """Stop between two tokens; running requests are kept and continue after `resume`."""
        raise NotImplementedError

    async def resume(self) -> None:
        """Continue; prefix caches of earlier weights are dropped."""
        raise NotImplementedError

    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        """Join a process group for weights; return when all ranks have joined.

        Args:
            address: of rank 0.
            port: of rank 0.
            first_rank: of this engine; its ranks are consecutive.
            num_ranks: of the group.
            backend: gloo or nccl.
        """
        raise NotImplementedError

    async def begin_update(self) -> None:
        """Prepare to load all weights."""
        raise NotImplementedError

    async def load(self, chunk: WeightChunk) -> None:
        """Load some of the weights."""
        raise NotImplementedError

    async def end_update(self, version: int) -> str:
        """Serve the new weights from now on.

        Returns:
            `fingerprint_of_ranks` of the digests of all tensors loaded since `begin_update`. A tensor counts
            when it is passed to the engine's model, in the dtype and shape that were sent; if a rank received
            only parts of it, each part counts under its `shard_key`.
        """
        raise NotImplementedError

    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        """Replace the LoRA adapter by one in PEFT format, for all requests from now on.

        Returns:
            `fingerprint` of the tensors in the file `adapter_model.safetensors`.
        """
        raise NotImplementedError

    async def sleep(self) -> None:
        """Free device memory, weights included, until `wake`; nothing is requested meanwhile."""
        raise NotImplementedError

    async def wake(self) -> None:
        """Allocate the memory again; the next update brings the weights."""
        raise NotImplementedError
