"""Where the answers of a group come from: the policy itself, which answers all prompts in turn with training,
or engines beside it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from typing_extensions import override

from verl.agents.collector import DataCollector
from verl.config.pipeline import FailureClass
from verl.data.batch import Trajectory
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.engine import EngineError, RefusedError
from verl.rollout.pool.inference_pool import InferencePool
from verl.utils.sampling_types import Prompt, SamplingParams

# Rewards that are computed at the same time; each calls its functions on threads of its own.
_MAX_REWARDED = 16


@contextmanager
def outside_loops() -> Iterator[None]:
    """Inside, this thread is in no event loop, so that what it calls may run one; the one that it is in
    stands still.
    """
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)


class GroupError(Exception):
    """A group could not be answered.

    Args:
        failure: whose fault it is.
        cause: for people.
    """

    def __init__(self, failure: FailureClass, cause: str) -> None:
        super().__init__(cause)
        self.failure: FailureClass = failure
        self.cause = cause


@dataclass
class Group:
    """The answers to a prompt, from admission to training.

    Attributes:
        number: of the group over the whole run; the random numbers of its answers hang on it.
        prompt: the question.
        oldest: version of the policy that sampled its oldest token, or can have.
        draw: how often its answers were thrown away.
        tries: again after a failure of each class.
        answers: those that there are, rewarded or not.
        baseline: the most likely answer, if it is read.
        arrival: its place among the groups that are complete; None: it is in flight.
        is_dead: it teaches nothing, and no other prompt was found in its place.
        pause_s: before its next try.
    """

    number: int
    prompt: Prompt
    oldest: int
    draw: int = 0
    tries: dict[FailureClass, int] = field(default_factory=dict)
    answers: list[Trajectory] = field(default_factory=list)
    baseline: Trajectory | None = None
    arrival: int | None = None
    has_no_signal: bool = False
    pause_s: float = 0.0

    @property
    def everything(self) -> list[Trajectory]:
        """Its answers and the most likely one."""
        return [*self.answers, *([self.baseline] if self.baseline is not None else [])]


class Source(ABC):
    """Answers groups and rewards the answers.

    Attributes:
        is_in_turn: `start` returns when all are answered, and whoever trains waits for it.
    """

    is_in_turn: bool

    @abstractmethod
    def start(self, groups: Sequence[Group]) -> list[asyncio.Future[None]]:
        """Begins to answer groups, or to reward again what has answers; a future of each raises `GroupError`
        if it cannot be.
        """

    @abstractmethod
    def finish(self, group: Group) -> bool:
        """Completes the rewards of a group that is answered; whether it teaches something."""

    def check(self, answers: Sequence[Trajectory]) -> None:
        """Refuses answers of which too many have no reward; here none.

        Raises:
            RuntimeError: they have none.
        """
        return

    def close(self) -> None:
        """Ends what it has started; here nothing."""
        return


class CollectorSource(Source):
    """What both ways share.

    Args:
        collector: of the trainer.
        samples: answers per prompt.
        waits: takes what is waited for.
    """

    def __init__(self, collector: DataCollector, samples: int, waits: WaitTracker) -> None:
        self._collector, self._samples, self._waits = collector, samples, waits

    @override
    def finish(self, group: Group) -> bool:
        self._collector.finish(group.answers, group.baseline)
        return not self._collector.has_no_signal(group.answers)

    @override
    def check(self, answers: Sequence[Trajectory]) -> None:
        self._collector.check_failed(answers)


class InTurn(CollectorSource):
    """All prompts that are admitted, in one call of an engine that shares this process or its devices with
    training.
    """

    is_in_turn = True

    def start(self, groups: Sequence[Group]) -> list[asyncio.Future[None]]:
        """See `Source.start`; what the engine raises ends the run."""
        with outside_loops():
            self._answer(groups)
        loop = asyncio.get_running_loop()
        done = [loop.create_future() for _ in groups]
        for future in done:
            future.set_result(None)
        return done

    def _answer(self, groups: Sequence[Group]) -> None:
        collector = self._collector
        fresh = [group for group in groups if not group.answers]
        params = [collector.params(self._samples, number=group.number, draw=group.draw) for group in fresh]
        with self._waits.track("generation", f"answers to {len(fresh)} prompts"):
            self._sample(fresh, params)
        with (
            collector.clock.phase("reward"),
            self._waits.track("rewards", f"{collector.reward_names} of {len(groups)} groups"),
        ):
            collector.reward([t for group in groups for t in group.everything])

    def _sample(self, fresh: Sequence[Group], params: Sequence[SamplingParams]) -> None:
        collector, prompts = self._collector, [group.prompt for group in fresh]
        if fresh:
            for group, answers in zip(fresh, collector.sample(prompts, params), strict=True):
                group.answers = answers
        greedy = [g for p in params for g in collector.greedy_params(p)]
        for group, (baseline,) in (
            zip(fresh, collector.sample(prompts, greedy), strict=True) if greedy else ()
        ):
            group.baseline = baseline


class FromFleet(CollectorSource):
    """Each group by itself, from engines beside training, in their event loop.

    Args:
        collector: of the trainer.
        samples: answers per prompt.
        fleet: the engines.
        waits: takes what is waited for.
    """

    is_in_turn = False

    def __init__(
        self, collector: DataCollector, samples: int, fleet: InferencePool, waits: WaitTracker
    ) -> None:
        super().__init__(collector, samples, waits)
        self._fleet = fleet
        self._rewarders = ThreadPoolExecutor(_MAX_REWARDED, thread_name_prefix="rewards")

    @override
    def start(self, groups: Sequence[Group]) -> list[asyncio.Future[None]]:
        return [asyncio.ensure_future(self._answer(group)) for group in groups]

    async def _answer(self, group: Group) -> None:
        if group.pause_s:
            await asyncio.sleep(group.pause_s)
        if not group.answers:
            with self._waits.track("generation", f"answers of group {group.number}"):
                await self._sample(group)
            self._waits.mark_progress("generation")
        with self._waits.track("rewards", f"{self._collector.reward_names} of group {group.number}"):
            await self._reward(group)
        self._waits.mark_progress("rewards")

    async def _reward(self, group: Group) -> None:
        await asyncio.get_running_loop().run_in_executor(self._rewarders, self._reward_here, group.everything)

    def _reward_here(self, answers: Sequence[Trajectory]) -> None:
        try:
            self._collector.reward(answers)
        except (
            KeyboardInterrupt,
            SystemExit,
        ) as error:  # which would end the loop of the engines, and not the run
            raise RuntimeError(
                f"a reward function asked the program to end: {type(error).__name__} {error}"
            ) from error

    async def _sample(self, group: Group) -> None:
        collector = self._collector
        params = collector.params(self._samples, number=group.number, draw=group.draw)
        asked = [params, *collector.greedy_params(params)]
        tasks = [asyncio.ensure_future(collector.sample_from(self._fleet, group.prompt, p)) for p in asked]
        try:
            answers, *baselines = await asyncio.gather(*tasks)
        except RefusedError as error:
            raise GroupError("data", str(error)) from error
        except (EngineError, RuntimeError) as error:
            raise GroupError("infrastructure", str(error)) from error
        finally:
            for task in tasks:
                task.cancel()  # the other one of a request that failed
        group.answers, group.baseline = answers, baselines[0][0] if baselines else None

    @override
    def close(self) -> None:
        self._rewarders.shutdown(wait=False, cancel_futures=True)
