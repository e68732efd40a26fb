"""Prompts in, rewarded trajectories out: the batch of a step, and answers to held-out prompts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from verl.agents.episodes.driver import EpisodeDriver
from verl.agents.episodes.turn_sampler import TurnSampler
from verl.agents.group_sampler import GroupSampler
from verl.agents.group_source import GroupSource
from verl.agents.groups import has_no_signal
from verl.agents.pipeline import Pipeline, TrainBatch
from verl.algorithms.registry import BoundFunction
from verl.config.data import DataSource
from verl.config.run import TrainerConfig
from verl.data.batch import Batch
from verl.data.dataset import load_prompts
from verl.data.reading.memory_rows import MEMORY, rows_in_memory
from verl.data.trajectory import EpisodeRecord, Trajectory
from verl.monitoring.ledger import Ledger
from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.rewards.functions import RewardFunctions
from verl.rollout.batching_engine import BatchingEngine
from verl.utils.event_loops import call_in_thread, gather_all
from verl.utils.sampling_types import BatchGenerator, Completion, Prompt, RolloutEngine, SamplingParams
from verl.utils.tokens import TextCodec

T = TypeVar("T")
# Answers of servers that are rewarded and handed over together.
_HANDED_OVER = 64


@dataclass
class RolloutBatch:
    """The answers of one step.

    Attributes:
        trajectories: answers with a reward, groups together.
        rows: the same as a batch.
        metrics: means over all answers that were generated.
        failed: answers without a reward.
        fresh: a few answers of the version that is trained, if the rows have none: sampler and trainer are
            compared on them; None: not needed, or there are none.
    """

    trajectories: list[Trajectory]
    rows: Batch
    metrics: dict[str, float]
    failed: list[Trajectory] = field(default_factory=list)
    fresh: Batch | None = None


class DataCollector:
    """Turns prompts into rewarded groups.

    Args:
        engine: answers prompts; a batch generator is called in a thread.
        codec: of the policy.
        rewards: scores answers; None: nothing reads a reward.
        config: sampling, algorithm, pipeline and seed are read.
        greedy_baseline: see `GroupSampler`.
        by_parts: see `GroupSampler`.
        length_penalty: see `GroupSampler`.
        driver: see `GroupSampler`.
        context: see `GroupSampler`.
        clock: takes the seconds of `reward`.
        waits: takes the waits for answers and rewards.

    Attributes:
        codec: of the policy.
        dispatched: prompts sent out so far, on which random numbers depend; checkpoints keep it.
    """

    def __init__(
        self,
        engine: RolloutEngine | BatchGenerator,
        codec: TextCodec,
        rewards: RewardFunctions | None,
        config: TrainerConfig,
        *,
        greedy_baseline: bool = False,
        by_parts: bool = False,
        length_penalty: BoundFunction | None = None,
        driver: EpisodeDriver | None = None,
        context: int | None = None,
        clock: Clock | None = None,
        waits: WaitTracker | None = None,
    ) -> None:
        self.dispatched = 0
        self.clock, self.waits = clock or Clock(), waits or WaitTracker()
        if isinstance(engine, BatchGenerator):
            engine = BatchingEngine(engine, in_thread=True, clock=self.clock, waits=self.waits)
        self.engine: RolloutEngine = engine
        self._config, self.codec = config, codec
        self._sampler = GroupSampler(
            engine,
            codec,
            rewards,
            config,
            greedy_baseline=greedy_baseline,
            by_parts=by_parts,
            length_penalty=length_penalty,
            driver=driver,
            context=context,
            turns=TurnSampler(engine, self.waits),
        )

    def collect(
        self,
        prompts: Any,
        *,
        samples: int,
        refill: Callable[[int], Any] | None = None,
    ) -> RolloutBatch:
        """Answer every prompt `samples` times and reward the answers.

        Args:
            prompts: texts, chat messages, `Prompt`s or rows with columns, in any form of `rows_in_memory`
                but a stream.
            samples: answers per prompt.
            refill: gives n more prompts; with it and `algorithm.dynamic_sampling`, groups of equal rewards
                are replaced, in at most `algorithm.max_resamples` rounds.

        Raises:
            TypeError: `prompts` has none of the known forms.
            ValueError: a row cannot be used.
            RuntimeError: no answer has a reward, or too many have none, or a prompt cannot be answered and
                there is no `refill`.
        """
        asked = prompts_of(prompts, self._config)
        given = iter(asked)

        def draw(count: int) -> list[Prompt]:
            drawn = list(islice(given, count))
            return prompts_of(refill(count), self._config) if not drawn and refill is not None else drawn

        return self.rollout_batch(
            self.synced_engine().run(self._collected(draw, len(asked), samples, resamples=refill is not None))
        )

    def rollout_batch(self, batch: TrainBatch) -> RolloutBatch:
        """Trajectories, rows and metrics of the groups of a step.

        Raises:
            RuntimeError: no answer has a reward.
        """
        for number, group in enumerate(batch.all_groups):
            for trajectory in group.answers:
                trajectory.group = number
        kept = [t for group in batch.groups if not group.drop_reason for t in group.answers]
        kept = [t for t in kept if t.outcome == "ok"]
        if not kept:
            raise RuntimeError(
                "no answer of this step has a reward, so there is nothing to learn from; see the outcomes in "
                "the "
                "samples"
            )
        answered = [group.answers for group in batch.all_groups if group.answers]
        metrics = collection_metrics(answered, by_parts=self._sampler.by_parts)
        metrics["resample_draws"] = float(batch.num_refills)
        failed = [t for group in answered for t in group if t.outcome != "ok"]
        return RolloutBatch(kept, Batch.from_trajectories(kept), metrics, failed)

    def complete(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int | None = None
    ) -> list[Completion]:
        """One completion for each prompt of token ids, such as the next turn of each conversation.

        Args:
            prompts: token ids.
            max_tokens: longest completion; None: `sampling.max_tokens`.
        """
        params = [
            self._sampler.params(1, number=number)
            for number in range(self.dispatched, self.dispatched + len(prompts))
        ]
        self.dispatched += len(prompts)
        if max_tokens is not None:
            params = [replace(one, max_tokens=max_tokens) for one in params]
        engine = self.synced_engine()
        asked = zip(prompts, params, strict=True)
        return engine.run(gather_all([engine.sample(ids, one) for ids, one in asked]))

    def batch_of(self, trajectories: Sequence[Trajectory]) -> RolloutBatch:
        """The batch of a step from trajectories of a loop outside; those with equal `group` are compared.

        Raises:
            ValueError: there is none, or one without a reward.
        """
        if not trajectories or any(t.reward is None and t.outcome == "ok" for t in trajectories):
            raise ValueError(
                "need trajectories with a reward each; set reward, or outcome where there can be none"
            )
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            trajectory.text = trajectory.text or self._sampler.text_of(trajectory)
            groups.setdefault(trajectory.group, []).append(trajectory)
        kept = [t for t in trajectories if t.outcome == "ok"]
        failed = [t for t in trajectories if t.outcome != "ok"]
        metrics = collection_metrics(list(groups.values()), by_parts=self._sampler.by_parts)
        return RolloutBatch(kept, Batch.from_trajectories(kept), metrics, failed)

    def answer(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[list[Trajectory]]:
        """One group of rewarded trajectories per prompt; parameters of its row go over `params`.

        Raises:
            ValueError: a row has parameters that the engine does not take.
            RuntimeError: too many answers have no reward.
        """
        own = [self._sampler.row_params(p, s, trains=False) for p, s in zip(prompts, params, strict=True)]
        sampled = zip(prompts, own, strict=True)
        groups = self.synced_engine().run(
            gather_all([self._sampler.answer(prompt, wanted) for prompt, wanted in sampled])
        )
        answers = list(chain.from_iterable(groups))
        with self.clock.phase("reward"):
            self._sampler.reward(answers)
        self._sampler.check_failed(answers)
        return groups

    def answer_each(
        self,
        portions: Sequence[Sequence[tuple[Prompt, SamplingParams]]],
        done: Callable[[Sequence[tuple[int, list[Trajectory]]]], None],
    ) -> None:
        """Answer prompts as `answer` does, and hand over rewarded groups as they are complete.

        An engine that takes turns answers one portion after the other, each by itself. Others get all prompts
        at once, and what is complete is handed over, whichever portion it is of.

        Args:
            portions: prompts with their parameters.
            done: gets the number of each prompt among all, and its group; called in another thread if the
                engine does not take turns.

        Raises:
            ValueError: a row has parameters that the engine does not take.
            RuntimeError: too many answers have no reward; their portion is not handed over.
        """
        asked = [
            [(prompt, self._sampler.row_params(prompt, params, trains=False)) for prompt, params in portion]
            for portion in portions
        ]
        failed: list[Trajectory] = []
        total = sum(params.n for portion in asked for _, params in portion)

        def complete(groups: Sequence[tuple[int, list[Trajectory]]]) -> None:
            answers = [t for _, group in groups for t in group]
            with self.clock.phase("reward"):
                self._sampler.reward(answers)
            failed.extend(t for t in answers if t.outcome != "ok")
            self._sampler.check_failed(failed, of=total)
            done(groups)

        engine = self.synced_engine()
        if not engine.in_turn:
            return engine.run(self._answer_beside([*chain.from_iterable(asked)], complete))
        first = 0
        for portion in asked:
            groups = engine.run(gather_all([self._sampler.answer(*one) for one in portion]))
            complete([*enumerate(groups, first)])
            first += len(portion)

    def check_data(self, prompts: Sequence[Prompt]) -> list[str]:
        """Check that rows have what their episodes need, and that the chat template can write these.

        Returns:
            Sentences on what the template would write otherwise.

        Raises:
            ValueError: a row has not, or the template cannot.
        """
        return self._sampler.check_data(prompts)

    def close(self) -> None:
        """End the tools, environments and programs of episodes; may be called again."""
        self._sampler.close()

    def source(self, samples: int, *, first_number: int = 0) -> GroupSource:
        """Source of groups of `samples` answers for a pipeline in the engine's loop; see `GroupSource`."""
        return GroupSource(
            self._sampler,
            samples,
            first_number=first_number,
            in_turn=self.engine.in_turn,
            waits=self.waits,
            clock=self.clock,
        )

    def synced_engine(self) -> RolloutEngine:
        """The engine, which gets the policy's weights here before its first answer and after a sleep."""
        if self.engine.needs_weights:
            self.engine.run(self.engine.sync_weights(self.engine.version))
        return self.engine

    async def _answer_beside(
        self,
        asked: Sequence[tuple[Prompt, SamplingParams]],
        complete: Callable[[Sequence[tuple[int, list[Trajectory]]]], None],
    ) -> None:
        """Answer all prompts at once; what is complete is rewarded in a thread while others are generated."""
        answered: asyncio.Queue[tuple[int, list[Trajectory]]] = asyncio.Queue()

        async def answer(number: int) -> None:
            answered.put_nowait((number, await self._sampler.answer(*asked[number])))

        async def gather() -> None:
            left = len(asked)
            while left:
                missing, ready = _HANDED_OVER, list[tuple[int, list[Trajectory]]]()
                while left and missing > 0:
                    ready.append(await answered.get())
                    left, missing = left - 1, missing - len(ready[-1][1])
                await call_in_thread(partial(complete, ready), name="rewards")

        await gather_all([gather(), *map(answer, range(len(asked)))])

    async def _collected(
        self, draw: Callable[[int], list[Prompt]], count: int, samples: int, *, resamples: bool
    ) -> TrainBatch:
        """A batch of `count` groups from a pipeline of its own, in order and without staleness."""
        algorithm, ledger = self._config.algorithm, Ledger()
        rules = {"max_staleness": 0, "oversample": 0, "batches": "deterministic"}
        pipeline = Pipeline(
            draw,
            self.source(samples, first_number=self.dispatched),
            ledger,
            self._config.pipeline.model_copy(update=rules),
            prompts_per_step=count,
            waits=self.waits,
            max_resamples=algorithm.max_resamples if algorithm.dynamic_sampling and resamples else 0,
            kept_share=algorithm.kept_groups_share,
        )
        try:
            batch = await pipeline.next_batch()
            failed = ledger.counts().failed
            num_lost = failed.get("data", 0) + failed.get("infrastructure", 0)
            if num_lost and not resamples:  # no other prompt takes their places
                raise RuntimeError(
                    f"need answers to all {count} prompts, got none to {num_lost}: {ledger.last_cause}; "
                    "leave such prompts out, or give refill"
                )
            return batch
        finally:
            self.dispatched += ledger.counts().dispatched
            pipeline.close()


def prompts_of(data: Any, config: TrainerConfig) -> list[Prompt]:
    """Prompts of data in memory, which a program hands over; `Prompt`s stay as they are.

    Raises:
        TypeError: it has none of the forms of `rows_in_memory`, or is a stream.
        ValueError: a row cannot be used.
    """
    given = list(data) if isinstance(data, list | tuple) else []
    if given and all(isinstance(prompt, Prompt) for prompt in given):
        return given
    # Its rows belong to no source, as those of a file do.
    rows = rows_in_memory(data, "prompts", "train", source=DataSource(path=MEMORY, name=""))
    if rows.is_streamed:
        raise TypeError("need prompts of a step, got a stream; take some of it: list(stream.take(32))")
    # None may be left out: the caller counts on an answer to each.
    all_rows = config.data.model_copy(update={"on_malformed": "stop"})
    made, _ = load_prompts(rows, all_rows, split="train", rewards=config.rewards)
    return [
        own if isinstance(own, Prompt) else prompt for own, prompt in zip(given or made, made, strict=True)
    ]


def collection_metrics(groups: Sequence[Sequence[Trajectory]], *, by_parts: bool = False) -> dict[str, float]:
    """Means over all answers; reward and scores over those that have one."""
    answers = [t for group in groups for t in group]
    rewarded = [t for t in answers if t.reward is not None]
    metrics = {
        **({"reward": _mean([t.reward for t in rewarded if t.reward is not None])} if rewarded else {}),
        "response_tokens": _mean([t.num_response_tokens for t in answers]),
        "prompt_tokens": _mean([t.num_prompt_tokens for t in answers]),
        "tokens": float(sum(t.num_prompt_tokens + t.num_response_tokens for t in answers)),
        "truncated_share": _mean([t.truncated for t in answers]),
        "failed_share": _mean([t.outcome != "ok" for t in answers]),
    }
    if rewarded and any(len(g) > 1 for g in groups):  # a single answer has no siblings to differ from
        metrics["dead_groups_share"] = _mean([has_no_signal(g, by_parts=by_parts) for g in groups])
    for name in sorted({name for t in rewarded for name in t.scores}):
        key = name if name == "accuracy" else f"score/{name}"
        metrics[key] = _mean([t.scores[name] for t in rewarded if name in t.scores])
    for name in sorted({name for t in rewarded for name in t.logged}):
        metrics[f"logged/{name}"] = _mean([t.logged[name] for t in rewarded if name in t.logged])
    metrics |= episode_metrics([t.episode for t in answers if t.episode is not None])
    failures = Counter(t.outcome for t in answers if t.outcome != "ok")
    return metrics | {f"outcome/{outcome}": float(count) for outcome, count in failures.items()}


def episode_metrics(episodes: Sequence[EpisodeRecord]) -> dict[str, float]:
    """Means of the counts of episodes, `episode/NAME`, and the share of each ending."""
    names = sorted({name for episode in episodes for name in episode.counts})
    endings = Counter(episode.ending for episode in episodes)
    return {f"episode/{name}": _mean([e.counts.get(name, 0.0) for e in episodes]) for name in names} | {
        f"episode/ended_by_{ending}": count / len(episodes) for ending, count in endings.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
