"""The contract of an engine in another process: what the pool asks of it, and what it may answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from verl.rollout.embedded.sampling import answer_seed
from verl.utils.sampling_types import FinishReason, RolloutEngine, SamplingParams
from verl.weight_sync.shard_tracking import ShardRanges
from verl.weight_sync.types import Transport, WeightChunk


class EngineError(RuntimeError):
    """An engine died, does not answer, or answers what cannot be; its requests go to another one."""


class RefusedError(ValueError):
    """An engine understood a request and will never answer it: another engine would refuse it, too."""


@dataclass(frozen=True)
class ServerSpec:
    """One engine to start or to join.

    Attributes:
        name: for people, unique in a pool.
        model: folder of the policy as it was at the start, with its tokenizer.
        options: what the engine itself offers, passed on as it is.
        address: http://HOST:PORT of a server that runs already; None: the run starts one, on the loopback
            interface.
        python: interpreter of the environment that has the engine; None: this one.
        secret: that a server of this run asks for, and that is sent along.
        log: takes the output of a server that is started.
        dtype: of the weights that it serves, as PyTorch names it.
        via: how weights travel to it; None: the best way that it takes.
        timeout_s: longest time without a sign of life, once it has started.
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
    via: Transport | None = None
    timeout_s: float = 60.0
    start_timeout_s: float = 600.0


@dataclass(frozen=True)
class TokenChunk:
    """Some more tokens of an answer.

    Attributes:
        token_ids: sampled ids, the stop token included.
        logprobs: one per id, of the distribution that it was drawn from; None: not known.
        finish_reason: why the answer ended; None: more will come.
        version: of the weights that sampled these tokens, where the engine says it itself.
        text: the whole answer, from an engine that gives text only; then there are no ids.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = ()
    finish_reason: FinishReason | None = None
    version: int | None = None
    text: str | None = None


def seed_of(params: SamplingParams, number: int) -> int:
    """A seed from 0 up to 2^63 - 1 for one answer to a prompt, for engines that take one for each."""
    return answer_seed(params.seed, number) & (2**63 - 1)


class ColocatedEngine(RolloutEngine):
    """An engine in the policy's own process that has its weights apart from it, in its own layout."""

    @abstractmethod
    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Takes all weights of the policy, by their names in a Hugging Face folder, awake or asleep;
        afterwards it is awake.

        Returns:
            `fingerprint` of the tensors that it handed to its model, as they came.
        """


class InferenceServer(ABC):
    """An engine in another process, asked from one event loop; every method but `sample` returns within its
    time limit or raises.

    Attributes:
        spec: what it was made from.
        follows: whether its weights can be those of the policy; if not, it serves what it has.
        vias: ways in which it takes weights, the best first.
        num_ranks: processes that take weights, for a group.
        reads: what each rank was seen to read of the tensors of an update that it was given whole, for
            engines with several ranks; the next one has that alone. None: it is not known.
        records: whether it may be found out in the next update.
        seeds_by_place: whether the random number of a token hangs on the seed and its place in the row alone,
            so that another engine of this kind goes on with an answer as this one would have.
    """

    syncs_weights: bool = True
    position_seeded: bool = False
    transports: tuple[Transport, ...] = ()
    num_ranks: int = 1
    reads: tuple[ShardRanges, ...] | None = None
    records: bool = True

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec

    @property
    def via(self) -> Transport:
        """How weights travel to it: as it was told, else the first way of `transports` that reaches it.

        Raises:
            ValueError: it does not take them so.
        """
        host = urlsplit(self.spec.address or "").hostname
        is_local = self.spec.address is None or host == "localhost" or (host or "").startswith("127.")
        ways = [via for via in self.transports if is_local or via not in ("shm", "ipc")]
        chosen = self.spec.via or next(iter(ways), None)
        if chosen not in ways:
            raise ValueError(
                f"need a way for weights to engine {self.spec.name}, got {chosen}; it takes {', '.join(ways) or 'none'}"
            )
        return chosen

    @abstractmethod
    async def open(self) -> None:
        """Starts the server or joins the one that runs; returns when it answers requests.

        Raises:
            EngineError: it did not start, with the last lines of its log.
            ValueError: what was given cannot be used: an option that it does not know, a version that is too
                old.
        """

    @abstractmethod
    def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, number: int
    ) -> AsyncIterator[TokenChunk]:
        """One of the answers to a prompt, in chunks as they come; the last one has a finish reason.

        Leaving the iteration aborts the request in the engine.

        Args:
            prompt_ids: not empty.
            params: how to sample; stop ids of the tokenizer are among `params.stop_ids`. `params.n` does not
                count.
            number: of the answer, which with `params.seed` says which random numbers it is drawn with, see
                `seed_of`; equal weights, prompts, seeds and numbers give equal answers where the engine can
                do that.

        Raises:
            EngineError: see there; also if nothing came for `spec.timeout_s`.
            RefusedError: see there, such as a prompt that is too long.
        """

    @abstractmethod
    async def check(self) -> None:
        """Returns if the engine is well.

        Raises:
            EngineError: it is not.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends what `open` started, whatever state it is in; a server that was joined stays. Never raises."""

    async def pause(self) -> None:
        """Stops between two tokens; requests that run are kept and go on after `resume`."""
        raise NotImplementedError

    async def resume(self) -> None:
        """Goes on, with caches of old weights forgotten."""
        raise NotImplementedError

    async def join_group(
        self, *, address: str, port: int, first_rank: int, num_ranks: int, backend: str
    ) -> None:
        """Joins a process group for `group` as the ranks from `first_rank` on; rank 0 sends. Waits for the
        others.
        """
        raise NotImplementedError

    async def begin_update(self) -> None:
        """Gets ready to take all weights."""
        raise NotImplementedError

    async def load(self, part: WeightChunk) -> None:
        """Takes some of the weights."""
        raise NotImplementedError

    async def end_update(self, version: int) -> str:
        """Serves the new weights from now on, and says which they are: `fingerprint_of_ranks` of the digests
        of the tensors that it took.

        A tensor counts as taken when it was handed to the model, in the dtype and shape that were sent; those
        of earlier updates do not count. One of which a rank got parts counts by them, as
        `verl.weight_sync.shard_tracking.shard_key` names them.
        """
        raise NotImplementedError

    async def load_lora_adapter(self, folder: Path, version: int) -> str:
        """Takes low-rank additions in PEFT format in place of those before; returns the `fingerprint` of its
        tensors as they are in the file `adapter_model.safetensors`. Requests from now on are answered with
        them."""
        raise NotImplementedError

    async def sleep(self) -> None:
        """Gives device memory back, weights included, until `wake`; nothing is asked meanwhile."""
        raise NotImplementedError

    async def wake(self) -> None:
        """Takes the memory again; the weights come with the next update."""
        raise NotImplementedError
