"""Reinforcement learning from rewards: the step that PPO, GRPO, DAPO and their kin share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel
from typing_extensions import override

from verl.agents.collector import DataCollector, RolloutBatch
from verl.agents.episodes.building import GivenAgent, build_driver, environment_rows
from verl.agents.row_sampling import check_row_sampling
from verl.algorithms.objective import Algorithm, write_advantages
from verl.config.data import DataSource, RewardsConfig, WeightedChoice
from verl.config.run import TrainerConfig
from verl.data.columns import written_by
from verl.data.dataset import LoadReport
from verl.data.loading.row_prompts import RowPrompts
from verl.data.loading.stream_loader import StreamLoader
from verl.data.reading.layouts import prompt_of
from verl.data.reading.row_stream import RowStream
from verl.data.reading.sources import reward_of_task, reward_of_tasks, sources_of, split_streams
from verl.data.trajectory import Trajectory
from verl.engines.hf.pretrained import model_config_of
from verl.monitoring.mismatch_limits import check_mismatch
from verl.monitoring.watchdog import Dependency
from verl.planner.step_limit import StepLimitMetric
from verl.rewards.functions import RewardFunctions, build_rewards
from verl.rewards.parameters import CallContext
from verl.rewards.reward_log import TrainerState
from verl.rewards.shaping import bound_length_penalty
from verl.trainer.base import Metrics, prompt_limits
from verl.trainer.batch_producer import BatchProducer
from verl.trainer.build.policy_start import policy_start
from verl.trainer.build.role_groups import RoleGroups
from verl.trainer.build.rollout_factory import (
    build_rollout,
    initial_checkpoint,
    pool_of,
    wrap_user_rollout,
)
from verl.trainer.build.worker_factories import plain_source
from verl.trainer.evaluation import evaluate, evaluation_schedule, evaluation_size, sample_row
from verl.trainer.evaluation.eval_sets import EvalSet, read_sets
from verl.trainer.kl_coef import KLController
from verl.trainer.roles import Roles
from verl.trainer.run.callbacks import Callback
from verl.trainer.run.run_loop import RunnableTrainer
from verl.utils.rollout import BaseRolloutWorker
from verl.utils.sampling_types import BatchGenerator, Prompt, RolloutEngine
from verl.utils.tokens import TextCodec

RewardFn = Callable[..., Any]


def rewards_with_task(config: TrainerConfig) -> RewardsConfig:
    """The reward functions of the settings; where they name none, that of the built-in task of the data."""
    reward = reward_of_tasks(sources_of(config.data.train or config.data.test))
    if config.rewards.functions or reward is None:
        return config.rewards
    return config.rewards.model_copy(update={"functions": (WeightedChoice(name=reward),)})


def with_task_rewards(config: TrainerConfig) -> TrainerConfig:
    """The settings with the reward of each task at its source, where they name none and the tasks differ."""
    settings = {"train": config.data.train, "test": config.data.test}
    tasks = [one for setting in settings.values() for one in sources_of(setting) if reward_of_task(one.path)]
    if config.rewards.functions or len({reward_of_task(one.path) for one in tasks}) < 2:
        return config

    def rewarded(source: DataSource) -> DataSource:
        name = reward_of_task(source.path)
        own = source.reward or (WeightedChoice(name=name) if name else None)
        return source.model_copy(update={"reward": own})

    data = {key: tuple(map(rewarded, sources_of(setting))) or None for key, setting in settings.items()}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


class Trainer(RunnableTrainer):
    """Trains a policy on rewards, with the algorithm that the configuration composes.

    Either `fit()` runs everything, or the loop is yours: `data = trainer.collect_data(prompts)`, then
    `metrics = trainer.update_policy(data)`; `with trainer.run() as run:` around it writes the files of a run.

    Args:
        config: of the run, from `make_trainer_config` or `load_config`.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        critic_model: start of the value model, if there is one, likewise; none: `config.critic.path`, else a
            copy of the policy.
        reward_fn: a function, or several, added to those of `config.rewards.functions`; see
            `verl.rewards.functions`.
        use_vllm: generate with vLLM instead of `config.rollout.engine`.
        rollout: an engine, a batch generator or a worker of your own instead.
        codec: tokenizer of the policy; none: the one saved with it.
        console: for output; none: standard output.
        callbacks: called at fixed points of the run, see `verl.Callback`.
        train_dataset: rows in memory in place of `data.train`: a `datasets.Dataset` or `IterableDataset`, a
            pandas DataFrame, a pyarrow Table, or a list of rows, texts, chats or `Prompt`s.
        test_dataset: the same for `data.test`.
        tools: functions that the policy may call, besides those of `agent.tools`.
        environment: class of the environment of the episodes, in place of `agent.environment`.
        program: async function that plays an episode with a client, in place of `agent.program`.

    Raises:
        ValueError: settings that do not fit together, or models or files that cannot be read.
    """

    config: TrainerConfig

    def __init__(
        self,
        config: TrainerConfig,
        actor_model: PreTrainedModel | str | None = None,
        critic_model: PreTrainedModel | str | None = None,
        reward_fn: RewardFn | Sequence[RewardFn] | None = None,
        *,
        use_vllm: bool = False,
        rollout: RolloutEngine | BatchGenerator | BaseRolloutWorker | None = None,
        codec: TextCodec | None = None,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
        train_dataset: Any = None,
        test_dataset: Any = None,
        tools: Sequence[Any] = (),
        environment: Any = None,
        program: Callable[..., Any] | None = None,
    ) -> None:
        self._agent = GivenAgent(tools, environment, program)
        if use_vllm:
            rollout_config = config.rollout.model_copy(update={"engine": "vllm"})
            config = config.model_copy(update={"rollout": rollout_config})
        config = config if reward_fn else with_task_rewards(config)
        self.algorithm = Algorithm.bind(config.algorithm)
        self._length_penalty = bound_length_penalty(config.algorithm.length_penalty)
        device = config.device if config.placement.name == "local" else "cpu"
        given: dict[str, Any] = {"train_dataset": train_dataset, "test_dataset": test_dataset}
        super().__init__(config, device=device, console=console, callbacks=callbacks, **given)
        config = self.config
        self.eval_every, self.eval_at_start = evaluation_schedule(config)
        self.compares_groups = "group_ids" in self.algorithm.reads and "values" not in self.algorithm.reads
        self.stall_limit_s = config.pipeline.stall_limit_s
        self.reserved_answer_tokens = max(config.sampling.max_tokens, config.evaluation.max_tokens or 0)
        self.own_rows = partial(environment_rows, config.agent, self._agent)
        self.kl = KLController(config)
        self._reward_fn, self._owns_rollout = reward_fn, rollout is None
        self._producer: BatchProducer | None = None
        self._step_limit: StepLimitMetric | None = None
        self.start = policy_start(config, actor_model, note=self.notes.append)
        tokenizer, stop_ids = self.start.tokenizer, config.sampling.stop_ids
        self.codec = codec or TextCodec.for_run(tokenizer, config.data, stop_ids=stop_ids)
        config = self.read_data_early(model_config_of(self.start.source))
        source = plain_source(config, self.start.source)
        with self.progress.phase(f"loading {source}" if isinstance(source, str) else ""):
            # Before a LoRA adapter is put into a loaded model.
            start = initial_checkpoint(config, source, self.codec)
            self.models = self.groups = RoleGroups(
                config, self.algorithm, source, critic_model, codec=self.codec, timeline=self.timeline
            )
            try:
                times: dict[str, Any] = {"clock": self.clock, "waits": self.waits}
                self.roles = Roles(self.groups, self.algorithm, config, **times)
                self.rollout = (
                    build_rollout(self.groups, start, self.codec, config, note=self.notes.append, **times)
                    if rollout is None
                    else wrap_user_rollout(rollout, self.algorithm, self.codec, **times)
                )
            except BaseException:
                self.groups.close()
                raise

    @override
    def step(self, batch: RolloutBatch | None = None) -> Metrics:
        """Prompts in, a better policy out; learns from `batch` instead of prompts, if it is given."""
        if batch is None:  # in turn with training, or ahead of it; portions only where groups are streamed
            self.roles.accumulate(self.producer.portions(), self.kl.coef, self.version)
            batch = self.producer.next_batch()
        rows, self.last, self.failed = batch.rows, batch.trajectories, batch.failed
        self.rollout.sleep()  # device memory that generation shares with training
        learned = self.roles.write_columns(rows, batch.fresh)  # logprobs, values, teacher: only what is read
        learned |= write_advantages(rows, self.algorithm, self.kl.coef, version=self.version, seed=self.seed)
        learned |= self.roles.update(rows, self.kl.coef, self.version)  # the critic, then the policy
        self.sync_weights()
        learned |= self.kl.update(learned, version=self.version, num_trajectories=len(self.last))
        self.notes += check_mismatch(learned, self.config.rollout)
        return batch.metrics | learned | self.rollout.take_metrics()

    def collect_data(self, prompts: Any, refill: Callable[[int], list[Prompt]] | None = None) -> RolloutBatch:
        """Answer and reward prompts, `samples_per_prompt` times each.

        Args:
            prompts: texts, chat messages, `Prompt`s or rows with columns, in any form of `train_dataset`.
            refill: see `DataCollector.collect`.
        """
        if self.rewards is None and "rewards" in self.algorithm.reads:
            raise ValueError(
                "need at least one reward function, got none; name one in rewards.functions or pass reward_fn"
            )
        return self.collector.collect(prompts, samples=self.config.samples_per_prompt, refill=refill)

    def update_policy(self, data: RolloutBatch | Sequence[Trajectory]) -> Metrics:
        """Learn from collected data or rewarded trajectories; returns `reward` and all other metrics."""
        self.roles.accumulate((), self.kl.coef, self.version)  # portions of an interrupted step are given up
        return self.step(data if isinstance(data, RolloutBatch) else self.collector.batch_of(data))

    def sync_weights(self) -> None:
        """Publish what the policy has learned as its next version, which answers from now on."""
        if self._producer:
            self._producer.drain_in_flight()
        self.version += 1
        with self.waits.track("publishing", lambda: describe_sync(self.rollout, self.version)):
            self.rollout.run(self.rollout.sync_weights(self.version))
        if self._producer:
            self._producer.advance(self.version)

    @cached_property
    def collector(self) -> DataCollector:
        """Turns prompts into rewarded groups."""
        note = self.notes.append
        return DataCollector(
            self.rollout,
            self.codec,
            self.rewards,
            self.config,
            greedy_baseline="greedy_rewards" in self.algorithm.reads,
            by_parts="reward_parts" in self.algorithm.reads,
            length_penalty=self._length_penalty,
            driver=build_driver(self.config.agent, self._agent, self.codec, note=note),
            context=self.context,
            clock=self.clock,
            waits=self.waits,
        )

    @property
    def producer(self) -> BatchProducer:
        """Produces the batch of the next step."""
        if self._producer is None:
            assert self.loader is not None, "need load_train_data before the first step"
            check = self.rewards.check_data if self.rewards else None
            self._producer = BatchProducer(
                self.collector, self.loader, self.config, folder=self.run_folder, check=check
            )
            self._producer.pipeline.version = self.version
        return self._producer

    @cached_property
    def rewards(self) -> RewardFunctions | None:
        """Reward functions: given, configured, or the task's own; None if nothing needs a reward."""
        is_given = self._reward_fn is not None
        config = self.config.rewards if is_given else rewards_with_task(self.config)
        if not is_given and not config.functions and self._agent.rewards(self.config.agent):
            config = config.model_copy(update={"functions": (WeightedChoice(name="environment"),)})
        is_given = is_given or bool(config.functions)
        a = self.config.algorithm
        is_shaped = self._length_penalty is not None or a.overlong_buffer_tokens > 0
        is_read = bool(self.algorithm.reads & {*written_by("rewards"), "token_rewards"})
        if not (is_given or is_read or is_shaped or a.dynamic_sampling or a.likelihood_coef):
            return None
        if not is_given and self.config.data.train is None and self.config.data.test is None:
            return None  # a loop of the user's own may reward its trajectories itself
        prompts = self.loader.prompts if self.loader else []
        if not is_given and not self.loader and self.config.data.test is not None:
            prompts = self.test_prompts  # their data sets may choose the functions
        return build_rewards(
            config,
            self._reward_fn,
            placed=self.groups.placed_rewards,
            context=CallContext(
                self.codec.prompt_text, partial(TrainerState.of, self), Path(self.config.output_dir)
            ),
            prompts=prompts,
            note=self.notes.append,
        )

    @override
    def read_data(self) -> None:
        train = self.source("train")
        known, streams = split_streams(train, "train")
        if known or not streams:
            prompts, report = self.read_prompts(known or train, "train")
            check_row_sampling(prompts, self.config, trains=True)
        else:
            prompts, report = [], LoadReport(", ".join(stream.label for stream in streams), 0)
        self.use_train_rows(
            prompts,
            report,
            per_step=self.config.prompts_per_step,
            setting="prompts_per_step",
            repeats=True,
            streams=[stream_loader(self, stream, number) for number, stream in enumerate(streams)],
        )
        if self.eval_every:
            self.held_out = evaluation_size(self.test_sets, self.config)

    @override
    def load_train_data(self) -> LoadReport:
        report = super().load_train_data()
        if self._producer:  # of another loader
            self._producer.close()
            self._producer = None
        if self.loader:
            self.notes += self.collector.check_data(self.loader.prompts)
        if self.rewards and self.loader:  # a mistake in them is found before the first step
            self.rewards.check_data(self.loader.prompts)
            self.rewards.check_data(self.test_prompts if self.eval_every else [])
        return report

    @cached_property
    def test_sets(self) -> list[EvalSet]:
        """The held-out prompts, by source."""
        read = partial(self.read_prompts, split="test")
        return read_sets(self.source("test"), self.config.evaluation, read, note=self.notes.append)

    @property
    def test_prompts(self) -> list[Prompt]:
        """The held-out prompts of all sources."""
        return [prompt for one in self.test_sets for prompt in one.prompts]

    def evaluate(self) -> Metrics:
        """Accuracies of the policy on the held-out prompts, with the same random numbers each time."""
        return evaluate(self.collector, self.test_sets, self.config)

    @override
    def samples(self) -> list[dict[str, Any]]:
        count = self.config.tracking.num_samples
        failed = self.failed[: (count + 3) // 4]  # their causes are worth reading, too
        return [sample_row(t, self.codec) for t in [*self.last[: count - len(failed)], *failed]]

    @override
    def state(self) -> dict[str, Any]:
        own: dict[str, Any] = {"collection": None}
        if self.loader:  # none in a loop over prompts of the user's own
            collection = self.producer.state()
            own = {"loader": collection.pop("loader"), "collection": collection}
        return super().state() | own | {"dispatched": self.collector.dispatched, "kl_coef": self.kl.coef}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.collector.dispatched = state["dispatched"]
        self.kl.coef = state["kl_coef"]
        self.rollout.run(self.rollout.sync_weights(self.version))
        if self.loader and state["collection"] is not None:
            self.producer.load_state(state["collection"], self.version)

    @override
    def step_limit(self, seconds: float) -> Metrics:
        if self._step_limit is None:
            self._step_limit = StepLimitMetric(self.config, self.models.model_config, self.device)
        return self._step_limit(self.last, seconds)

    @override
    def release_devices(self) -> None:
        self.rollout.sleep()

    @override
    def dependencies(self) -> list[Dependency]:
        pool = pool_of(self.rollout)
        return [Dependency(f"engine {r.name}", r.state, r.cause) for r in pool.replicas] if pool else []

    @override
    def close(self) -> None:
        with ExitStack() as ends:
            ends.callback(self.groups.close)
            if "rewards" in vars(self) and self.rewards:  # they were read
                ends.callback(self.rewards.close)
            if "collector" in vars(self):
                ends.callback(self.collector.close)
            if self._owns_rollout:
                ends.callback(self.rollout.close)
            if self._producer:
                ends.callback(self._producer.close)


def describe_sync(rollout: RolloutEngine, version: int) -> str:
    """The engines that do not have the weights of a version."""
    pool = pool_of(rollout)
    replicas = pool.replicas if pool else []
    behind = [r.name for r in replicas if r.state in ("stale", "serving") and r.version != version]
    return f"version {version} in {', '.join(behind) or 'the policy generator'}"


def stream_loader(trainer: Trainer, stream: RowStream, number: int) -> StreamLoader:
    """Loader of a stream of prompts, which checks each row as those that are read at the start."""
    config, limits = trainer.config, prompt_limits(trainer)

    def admits(prompt: Prompt) -> bool:
        check_row_sampling([prompt], config, trains=True)
        return limits.admits(prompt)

    parse = partial(prompt_of, config=config.data)
    make = RowPrompts(stream.source, config.data, parse, rewards=config.rewards)
    return StreamLoader(stream, make, admits, config.data, seed=config.seed + number)
