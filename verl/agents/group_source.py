"""Groups answered by an engine: the attempts of the pipeline, each a task of its event loop."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence

from verl.agents.group_sampler import GroupSampler
from verl.agents.groups import Group, GroupError
from verl.data.trajectory import Trajectory
from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.inference_server import EngineError, RefusedError
from verl.utils.event_loops import Gatherer, call_in_thread, gather_all, wait_for_thread
from verl.utils.sampling_types import SamplingParams

# Groups beside training that are rewarded at the same time.
_MAX_REWARDED = 16


class Source(ABC):
    """Answers groups and rewards the answers.

    Attributes:
        in_turn: whoever trains waits while groups are answered.
    """

    in_turn: bool

    @abstractmethod
    def start(self, group: Group) -> asyncio.Future[None]:
        """Begin to answer a group, or to reward one again that has answers.

        The future raises `GroupError` if the group can't be answered.
        """

    @abstractmethod
    def finish(self, group: Group) -> bool:
        """Complete the rewards of a group that is answered; True if the algorithm learns from it."""

    def check(self, answers: Sequence[Trajectory]) -> None:
        """Check the share of answers without a reward; here none is too large.

        Raises:
            RuntimeError: it is too large.
        """
        return


class GroupSource(Source):
    """Answers each group by the engine of a sampler.

    Args:
        sampler: samples and rewards groups.
        samples: answers per prompt.
        first_number: number of the first group in the run, on which the random numbers depend.
        in_turn: the engine takes turns with training. Its errors end the run, since no other engine could
            take over, and all groups of single answers are rewarded in one call. Else a group is retried
            after a pause.
        waits: takes the waits for answers and rewards.
        clock: takes the seconds of `reward`, in turn.
    """

    def __init__(
        self,
        sampler: GroupSampler,
        samples: int,
        *,
        in_turn: bool,
        first_number: int = 0,
        waits: WaitTracker,
        clock: Clock | None = None,
    ) -> None:
        self.in_turn, self._first_number = in_turn, first_number
        self._sampler, self._samples, self._waits, self._clock = sampler, samples, waits, clock or Clock()
        self._together = Gatherer(self._reward_together)
        self._rewarding = asyncio.Semaphore(_MAX_REWARDED)

    def start(self, group: Group) -> asyncio.Future[None]:
        """Begin to answer a group in a task."""
        return asyncio.ensure_future(self._answer(group))

    def finish(self, group: Group) -> bool:
        """Shape the rewards of a group; True if it has a signal."""
        self._sampler.finish(group.answers, group.baseline)
        return not self._sampler.has_no_signal(group.answers)

    def check(self, answers: Sequence[Trajectory]) -> None:
        """Check the share of answers without a reward."""
        self._sampler.check_failed(answers)

    async def _answer(self, group: Group) -> None:
        if self.in_turn:
            if not group.answers:
                await self._sample(group)
            elif group.repeated:
                await self._sample_again(group)
            if self._sampler.has_episodes:  # others go on while these are rewarded
                await self._reward(group)
            else:
                await self._together.ask(group)
            return
        if group.pause_s:
            await asyncio.sleep(group.pause_s)
        if not group.answers or group.repeated:
            with self._waits.track("generation", f"answers of group {group.number}"):
                await self._sample_beside_training(group)
            self._waits.mark_progress("generation")
        with self._waits.track("rewards", f"{self._sampler.reward_names} of group {group.number}"):
            await self._reward(group)
        self._waits.mark_progress("rewards")

    async def _sample_again(self, group: Group) -> None:
        """Play those episodes of a group again whose environment failed."""
        attempt = group.attempt + sum(group.tries.values())
        params = self._params(group, attempt)
        again = await self._sampler.sample(
            group.prompt,
            params,
            attempt=attempt,
            only=group.repeated,
            start_seed=self._params(group, group.attempt).seed,
        )
        for place, answer in zip(group.repeated, again, strict=True):
            answer.group = group.number
            group.answers[place] = answer
        group.repeated = []

    def _params(self, group: Group, attempt: int) -> SamplingParams:
        number = self._first_number + group.number
        params = self._sampler.params(self._samples, number=number, attempt=attempt)
        return self._sampler.row_params(group.prompt, params, trains=True)

    async def _sample(self, group: Group) -> None:
        params = self._params(group, group.attempt)
        greedy = self._sampler.greedy_params(params)
        asked = [params] if greedy is None else [params, greedy]
        if self.in_turn:  # one after the other: batches of one kind
            answered = [await self._sampler.sample(group.prompt, p) for p in asked]
        else:
            answered = await gather_all([self._sampler.sample(group.prompt, p) for p in asked])
        group.answers = answered[0]
        group.baseline = answered[1][0] if greedy is not None else None
        for answer in group.all_trajectories:
            answer.group = group.number  # rewards that compare siblings read it

    async def _sample_beside_training(self, group: Group) -> None:
        try:
            await (self._sample_again(group) if group.answers else self._sample(group))
        except RefusedError as error:
            raise GroupError("data", str(error)) from error
        except (EngineError, RuntimeError) as error:
            raise GroupError("infrastructure", str(error)) from error

    async def _reward(self, group: Group) -> None:
        """Reward a group in a thread, while the loop goes on."""
        async with self._rewarding:
            await call_in_thread(lambda: self._sampler.reward(group.all_trajectories), name="rewards")

    def _reward_together(self, groups: list[Group]) -> list[None]:
        """Reward the groups of a turn in one call, outside of the event loop, which waits."""
        answers = [t for group in groups for t in group.all_trajectories]
        with (
            self._clock.phase("reward"),
            self._waits.track("rewards", f"{self._sampler.reward_names} of {len(groups)} groups"),
        ):
            wait_for_thread(lambda: self._sampler.reward(answers), name="rewards")
        return [None] * len(groups)
