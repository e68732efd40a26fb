"""Types of generation: prompts, sampling parameters, completions, and the contract of an engine."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from verl.config.data import WeightedChoice

T = TypeVar("T")
FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """Parameters with which one prompt is answered.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: the smallest set of tokens with at least this mass is kept, in (0, 1].
        top_k: number of most likely tokens kept; 0 keeps all.
        min_p: tokens less likely than min_p times the most likely one are dropped, in [0, 1].
        max_tokens: longest answer in tokens, the stop token included.
        n: answers per prompt.
        stop: texts that end an answer; the token that completes one is the last of the answer.
        stop_ids: token ids that end an answer, and are its last token.
        seed: answer i of a prompt is a function of (weights, prompt, seed, i) alone, whatever else is being
            generated.
        sample_index: number i of the first of the n answers.
        repetition_penalty: positive logits of tokens that the prompt or the answer has are divided by it,
            negative ones multiplied, before the temperature; above 0, 1 for none. CTRL,
            https://arxiv.org/abs/1909.05858, 4.1, on all tokens before, as in Transformers and vLLM.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    sample_index: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"need temperature >= 0, 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1, got {self}"
            )
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"need repetition_penalty > 0, got {self.repetition_penalty}")
        if self.max_tokens < 1 or self.n < 1:
            raise ValueError(
                f"need max_tokens >= 1 and n >= 1, got max_tokens={self.max_tokens} and n={self.n}"
            )

    @property
    def truncates(self) -> bool:
        """True if some tokens of the model's distribution can never be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def is_models_own(self) -> bool:
        """True if tokens are drawn from the model's distribution at temperature 1, unchanged."""
        return self.temperature == 1 and not self.truncates and self.repetition_penalty == 1

    def of_group(self, count: int) -> SamplingParams:
        """Parameters of `count` answers, of which this is the first."""
        return replace(self, n=count)


@dataclass
class Completion:
    """One answer, as it was sampled.

    Attributes:
        token_ids: sampled ids, the stop token included.
        logprobs: fp32, one per id, of the distribution that the id was drawn from (temperature and truncation
            applied; with temperature 0, as at temperature 1); None if the engine gave text only.
        finish_reason: stop, length (max_tokens reached) or abort.
        version: of the policy weights that sampled it; of its first token, if they changed on the way.
        text: the answer as text, where the engine gives it; else None.
        versions: of each token, where they may differ; None: all of `version`.
        num_reused: prompt tokens whose keys and values the engine had already, of an earlier turn or a
            sibling; None: the engine does not say.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float] | None
    finish_reason: FinishReason
    version: int = 0
    text: str | None = None
    versions: Sequence[int] | None = None
    num_reused: int | None = None


class SampleRequest(NamedTuple):
    """A request for one turn of an episode.

    Attributes:
        number: unique among the requests to a generator.
        prompt_ids: token ids of the history.
        params: how it is sampled; `n` is 1.
    """

    number: int
    prompt_ids: Sequence[int]
    params: SamplingParams

    def continues(self, group: Sequence[SampleRequest]) -> bool:
        """True if this is the answer to the same prompt that follows those of `group`."""
        first = group[0]
        expected = replace(first.params, sample_index=first.params.sample_index + len(group))
        return self.params == expected and self.prompt_ids == first.prompt_ids


def groups_of(requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
    """Requests in groups of consecutive answers to one prompt, whose prompt is computed once."""
    groups: list[list[SampleRequest]] = []
    for request in requests:
        if groups and request.continues(groups[-1]):
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


class SampleAnswer(NamedTuple):
    """The end of a turn.

    Attributes:
        number: of its request.
        completion: None: the request is refused.
        refusal: the reason for it.
    """

    number: int
    completion: Completion | None
    refusal: str = ""


@dataclass(eq=False)
class PrefixAffinity:
    """Requests that share a prefix: the answers of a group, the turns of an episode.

    Attributes:
        replica: engine of a pool that has the prefix in its cache; None: not chosen yet.
        group: of the group that an episode belongs to, whose engine its first turn prefers; None: there is
            none.
    """

    replica: Any = None
    group: PrefixAffinity | None = None

    @property
    def preferred(self) -> Any:
        """The engine that a request should go to; None: any."""
        return self.replica if self.replica is not None or self.group is None else self.group.replica

    def settle(self, replica: Any) -> None:
        """Note that a request goes to an engine, which then has what it shares with later ones."""
        self.replica = replica
        if self.group is not None and self.group.replica is None:
            self.group.replica = replica

    def leave(self, replica: Any) -> None:
        """Note that an engine has failed."""
        for affinity in (self, self.group):
            if affinity is not None and affinity.replica is replica:
                affinity.replica = None


class RolloutEngine(ABC):
    """The contract of generation: one answer to one prompt, asynchronously.

    All coroutines of an engine run in one event loop, which `run` enters.

    Attributes:
        version: of the policy weights that it samples with.
        in_turn: generation and training take turns, as they share a process or its devices.
    """

    version: int = 0
    in_turn: bool = False

    @abstractmethod
    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, affinity: PrefixAffinity | None = None
    ) -> Completion:
        """Sample answer number `params.sample_index` to a prompt; `params.n` is 1.

        Cancelling the call aborts the request.

        Raises:
            ValueError: an empty prompt, prompt and answer longer than the model's context, or a request
                that the engine refuses.
            RuntimeError: no engine can answer.
        """

    @abstractmethod
    async def sync_weights(self, version: int) -> None:
        """Take over the trainer's weights as a new version; returns when the engine samples with them."""

    @abstractmethod
    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the engine's event loop and wait for it; an interrupted wait cancels it."""

    @property
    def needs_weights(self) -> bool:
        """True if the engine follows the policy and must be given its weights before it can answer."""
        return False

    def episode(self) -> AbstractContextManager[None]:
        """Context of an episode of several turns, in the event loop; here nothing.

        An engine that knows of the episodes need not wait for those that are over.
        """
        return nullcontext()

    def sleep(self) -> None:
        """Release device memory until the next `sync_weights`, if training needs it; here nothing."""
        return

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call; here none."""
        return {}

    def close(self) -> None:
        """End everything that the engine has started; here nothing."""
        return


class BatchGenerator(ABC):
    """Generation of a whole batch in one blocking call; `verl.rollout.batching_engine` makes an engine of it.

    Attributes:
        version: of the policy weights that it samples with.
        can_advance: it has `advance`, so that turns of episodes join those in generation.
    """

    version: int = 0
    can_advance: bool = False

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """Answer every prompt: `params[i].n` completions per prompt, in order.

        Raises:
            ValueError: an empty prompt, prompt and answer longer than the model's context, or another number
                of parameters than prompts.
        """

    def advance(self, requests: Sequence[SampleRequest], dropped: Sequence[int]) -> list[SampleAnswer]:
        """Generate a few tokens of all requests that are not answered yet; return those that are now.

        An error ends all of them.

        Args:
            requests: new ones.
            dropped: numbers of requests whose answers nobody waits for any more.
        """
        raise NotImplementedError

    def sleep(self) -> None:
        """Release device memory until the next call, if training needs it; here nothing.

        What was kept of earlier prompts is dropped.
        """
        return

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call; here none."""
        return {}

    def close(self) -> None:
        """End everything that the generator has started; here nothing."""
        return


def check_lengths(prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
    """Check that there are sampling parameters for each prompt.

    Raises:
        ValueError: another number of parameters than prompts.
    """
    if len(prompts) != len(params):
        raise ValueError(
            f"need sampling parameters for each prompt, got {len(prompts)} prompts and "
            f"{len(params)} parameters"
        )


def check_requests(
    prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], *, context: int
) -> None:
    """Refuses what no engine can answer.

    Args:
        prompts: token ids.
        params: one for each prompt.
        context: of the model, in tokens.

    Raises:
        ValueError: an empty prompt, prompt and answer longer than the context, or another number of
            parameters.
    """
    check_lengths(prompts, params)
    for i, (prompt, wanted) in enumerate(zip(prompts, params, strict=True)):
        if not prompt or len(prompt) + wanted.max_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens and may get {wanted.max_tokens} more; need at least "
                f"one, and at most {context} in all, the model's context; lower sampling.max_tokens or "
                "data.max_prompt_tokens"
            )


@dataclass(frozen=True)
class Prompt:
    """One question of a data set.

    Attributes:
        content: text, or chat messages as `[{"role": ..., "content": ...}]`.
        answer: reference answer for the rewards, None if there is none.
        source: name of the data set that it is from, for metrics by source.
        index: its number in the data set.
        columns: all other columns of its row, handed to the reward functions by name.
        tools: schemas of the tools offered in this prompt; empty: those of `data.tools`.
        reward: the function that rewards its answers, in place of `rewards.functions`; None: those.
        sampling: sampling parameters of its answers, over those of the settings.
    """

    content: str | list[dict[str, Any]]
    answer: Any = None
    source: str = ""
    index: int = 0
    columns: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    reward: WeightedChoice | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
