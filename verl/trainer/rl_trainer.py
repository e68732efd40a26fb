"""Reinforcement learning from rewards: the step that PPO, GRPO, DAPO and their kin share, and two ways to
hold the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from verl.agents.collector import DataCollector, PromptLike, RolloutBatch
from verl.algorithms.objective import Algorithm, write_advantages
from verl.config.data import WeightedChoice
from verl.config.roles import RoleConfig
from verl.config.run import TrainerConfig
from verl.controller.worker_group import Future, MergedMetrics, WorkerGroup
from verl.data.batch import Batch, Trajectory
from verl.data.columns import written_by
from verl.data.dataset import LoadReport, PromptLoader
from verl.data.packing import BatchPlan, balance, compute_cost
from verl.data.tasks import TASKS
from verl.engines.roles.base import Learner, RoleWorker
from verl.engines.roles.columns import MODEL_COLUMNS, critic_reads, policy_reads
from verl.engines.roles.loss_weights import skip_zero_advantages, write_loss_weights
from verl.engines.streaming import StreamedUpdate
from verl.monitoring.watchdog import Dependency
from verl.planner.step_time import ModelShape, StepWork, step_limit
from verl.rewards.functions import RewardFunctions, build_rewards
from verl.rewards.shaping import bound_length_penalty
from verl.trainer.base import BaseTrainer, Metrics
from verl.trainer.batch_producer import BatchProducer
from verl.trainer.build.role_groups import ColumnWriter, RoleGroups
from verl.trainer.build.rollout_factory import (
    build_rollout,
    check_logprobs,
    check_mismatch,
    initial_checkpoint,
    pool_of,
    wrap_user_rollout,
)
from verl.trainer.checkpoint_store import Save
from verl.trainer.evaluation import evaluate
from verl.trainer.kl_coef import first_kl_coef, next_kl_coef
from verl.trainer.sample_table import sample_row
from verl.trainer.single_model_trainer import policy_source
from verl.trainer.streamed_step import CRITIC, POLICY, StreamedStep, check_streamed
from verl.utils.device import MachineSpeed, measure_speed
from verl.utils.rollout import BaseRolloutWorker
from verl.utils.sampling_types import Prompt, RolloutEngine
from verl.utils.tokens import TextCodec

RewardFn = Callable[..., Any]


@dataclass(frozen=True)
class RoleCall:
    """A call of a role in a step: its name in the metrics, and what starts it."""

    name: str
    start: Callable[[Batch], Future[Any]]


class Trainer(BaseTrainer):
    """Trains a policy on rewards, with the algorithm that the configuration composes.

    Either `fit()` runs everything, or the loop is yours: `data = trainer.collect_data(prompts)`, then
    `metrics = trainer.update_policy(data)`.

    Args:
        config: of the run, from `make_trainer_config` or `load_config`.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        critic_model: start of the value model, if there is one, likewise; none: `config.critic.path`, else a
            copy of the policy.
        reward_fn: a function, or several, added to those of `config.rewards.functions`; see
            `verl.rewards.functions`.
        use_vllm: generate with vLLM instead of `config.rollout.engine`.
        rollout: an engine or a worker of your own instead.
        codec: tokenizer of the policy; none: the one saved with it.
        console: for people; none: standard output.

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
        rollout: RolloutEngine | BaseRolloutWorker | None = None,
        codec: TextCodec | None = None,
        console: Console | None = None,
    ) -> None:
        if use_vllm:
            config = config.model_copy(
                update={"rollout": config.rollout.model_copy(update={"engine": "vllm"})}
            )
        self.algorithm = Algorithm.bind(config.algorithm)
        self._length_penalty = bound_length_penalty(config.algorithm.length_penalty)
        is_local = config.placement.name == "local"
        super().__init__(config, device=config.device if is_local else "cpu", console=console)
        self._reward_fn = reward_fn
        self.kl_coef = first_kl_coef(config)
        self.last: list[Trajectory] = []
        self._collection: BatchProducer | None = None
        source = policy_source(config, actor_model)
        self._owns_rollout = rollout is None
        path = config.policy.path or (source if isinstance(source, str) else str(source.config.name_or_path))
        self.codec = codec or TextCodec.load(
            path, stop_ids=config.sampling.stop_ids, system_prompt=config.data.system_prompt
        )
        start = initial_checkpoint(
            config, source, self.codec
        )  # before low-rank additions are put into a loaded model
        self.team = RoleGroups(
            config, self.algorithm, source, critic_model, codec=self.codec, timeline=self.timeline
        )
        try:
            check_streamed(
                self.algorithm, config, [group for group in (self.team.critic, self.team.policy) if group]
            )
            self.rollout = (
                wrap_user_rollout(rollout, self.algorithm, self.codec)
                if rollout is not None
                else self._chosen_rollout(start)
            )
        except BaseException:
            self.team.close()
            raise

    def _chosen_rollout(self, start: str) -> RolloutEngine:
        return build_rollout(
            self.config,
            self.team.policy,
            start,
            self.codec,
            model_config=self.model_config,
            note=self.notes.append,
        )

    def step(self) -> Metrics:
        """Prompts in, a better policy out."""
        return self.update_policy(self.collection.take(self._streamed))

    def collect_data(
        self, prompts: Sequence[PromptLike], refill: Callable[[int], list[Prompt]] | None = None
    ) -> RolloutBatch:
        """Answers and rewards prompts (texts, chat messages or `Prompt`s), `samples_per_prompt` times each."""
        return self.collector.collect(prompts, samples=self.config.samples_per_prompt, refill=refill)

    def update_policy(self, data: RolloutBatch) -> Metrics:
        """Learns from collected data; returns `reward` and all other metrics, see docs/metrics.md."""
        rows, self.last = data.rows, data.trajectories
        metrics = data.metrics | (data.finish() if data.finish else self._learn(rows))
        self._publish()
        if self.algorithm.kl:
            metrics["kl_coef"] = self.kl_coef
        self.kl_coef = next_kl_coef(
            self.config, self.kl_coef, metrics, version=self.version, num_trajectories=rows.num_rows
        )
        self.notes += check_mismatch(metrics, self.config.rollout)
        return metrics | self.rollout.take_metrics()

    def _learn(self, rows: Batch) -> Metrics:
        """All updates of a step."""
        self.rollout.sleep()
        self._write_columns(rows)
        metrics = write_advantages(
            rows, self.algorithm, self.kl_coef, version=self.version, seed=self.config.seed
        )
        for learned in self._together(self.learners, rows):
            metrics |= learned
        return metrics

    def _write_columns(self, rows: Batch) -> None:
        check_logprobs(rows, self.algorithm)
        for columns in self._together(self.writers, rows):
            rows.update(columns)

    @property
    def _streamed(self) -> StreamedStep | None:
        """A step that learns from groups as they come, if that is wanted."""
        if self.config.pipeline.batches != "streamed":
            return None
        updates = {}
        if self.team.critic:
            updates[CRITIC] = StreamedUpdate(
                self.team.critic,
                partial(self._plan, self.team.critic, role=self.config.critic),
                reads=self._critic_columns,
            )
        if not self._critic_is_alone:
            updates[POLICY] = StreamedUpdate(
                self.team.policy,
                partial(self._plan, self.team.policy, role=self.config.policy),
                reads=self._policy_columns,
                kl_coef=self.kl_coef,
                skips_zero_advantages=self.algorithm.skip_zero_advantages,
            )
        sizes = {
            "num_groups": self.config.prompts_per_step,
            "version": self.version,
            "seed": self.config.seed,
        }
        return StreamedStep(self.algorithm, self._write_columns, updates, kl_coef=self.kl_coef, **sizes)

    def _publish(self) -> None:
        """The policy has learned: what generates follows it."""
        if self._collection:
            self._collection.settle()
        self.version += 1
        with self.waits.track("publishing", self._without_weights):
            self.rollout.publish(self.version)
        if self._collection:
            self._collection.published(self.version)

    def _without_weights(self) -> str:
        """Who does not have the newest weights, for people."""
        pool = pool_of(self.rollout)
        without = (
            [m.name for m in pool.replicas if m.state in ("stale", "serving") and m.version != self.version]
            if pool
            else []
        )
        return f"version {self.version} in {', '.join(without) or 'what generates'}"

    @property
    def writers(self) -> list[RoleCall]:
        """Those whose column a chosen function reads."""
        return [RoleCall(w.column, partial(self._write, w)) for w in self.team.writers]

    @property
    def learners(self) -> list[RoleCall]:
        """The critic, if there is one, and the policy, once the critic has had its first steps alone."""
        critic = [RoleCall("update_critic", self._update_critic)] if self.team.critic else []
        return critic if self._critic_is_alone else [*critic, RoleCall("update_policy", self._update_policy)]

    @property
    def _critic_is_alone(self) -> bool:
        """Whether the critic has its first steps."""
        return self.team.critic is not None and self.version < self.config.critic.warmup_steps

    def _together(self, calls: Sequence[RoleCall], rows: Batch) -> list[Any]:
        """The results of calls that are all started before the first is waited for: roles on pools of their
        own run at the same time.
        """
        started, results = [], []
        for call in calls:
            with self.clock.phase(call.name), self.waits.track("update", call.name):
                started.append(call.start(rows))
        for call, future in zip(calls, started, strict=True):
            with self.clock.phase(call.name), self.waits.track("update", call.name):
                results.append(future.result())
        return results

    def _write(self, writer: ColumnWriter, rows: Batch) -> Future[Batch]:
        plan = self._plan(writer.group, rows, writer.config)
        return writer.group.call(writer.method, rows.keep(MODEL_COLUMNS), plan)

    def _update_critic(self, rows: Batch) -> Future[Metrics]:
        critic = self.team.critic
        assert critic is not None
        plan = self._plan(critic, rows, self.config.critic)
        write_loss_weights(rows, plan, self.algorithm)
        return critic.call(Learner.update, rows.keep(self._critic_columns), plan, 0.0)

    def _update_policy(self, rows: Batch) -> Future[Metrics]:
        plan = self._plan(self.team.policy, rows, self.config.policy)
        write_loss_weights(rows, plan, self.algorithm)
        plan, metrics = (
            skip_zero_advantages(rows, plan) if self.algorithm.skip_zero_advantages else (plan, {})
        )
        read = rows.keep(self._policy_columns)
        return MergedMetrics(self.team.policy.call(Learner.update, read, plan, self.kl_coef), metrics)

    @property
    def _critic_columns(self) -> set[str]:
        return {*MODEL_COLUMNS, *critic_reads(self.algorithm)}

    @property
    def _policy_columns(self) -> set[str]:
        return {*MODEL_COLUMNS, *policy_reads(self.algorithm)}

    @cached_property
    def collector(self) -> DataCollector:
        """Turns prompts into rewarded groups."""
        return DataCollector(
            self.rollout,
            self.codec,
            self.rewards,
            self.config,
            greedy_baseline="greedy_rewards" in self.algorithm.reads,
            by_parts="reward_parts" in self.algorithm.reads,
            length_penalty=self._length_penalty,
            clock=self.clock,
        )

    @property
    def collection(self) -> BatchProducer:
        """What a step learns from, ahead of it."""
        if self._collection is None:
            assert self.loader is not None, "need load_train_data before the first step"
            self._collection = BatchProducer(
                self.collector,
                self.loader,
                self.config,
                pool=pool_of(self.rollout),
                waits=self.waits,
                folder=self.run_folder,
                note=self.notes.append,
            )
            self._collection.pipeline.version = self.version
        return self._collection

    @cached_property
    def rewards(self) -> RewardFunctions | None:
        """The reward functions: those given, those configured, or the task's own; None if there are none, and
        nothing needs a reward.
        """
        config, source = self.config.rewards, self.config.data.train or self.config.data.test or ""
        task = TASKS.get(source.removeprefix("task:")) if source.startswith("task:") else None
        if self._reward_fn is None and not config.functions and task:
            config = config.model_copy(update={"functions": (WeightedChoice(name=task.reward),)})
        if self._reward_fn is None and not config.functions and not self._needs_rewards:
            return None
        return build_rewards(config, self._reward_fn, placed=self.team.placed_rewards)

    @property
    def _needs_rewards(self) -> bool:
        a = self.config.algorithm
        shaped = self._length_penalty is not None or a.overlong_buffer_tokens > 0
        return bool(
            self.algorithm.reads & {*written_by("rewards"), "token_rewards"}
            or shaped
            or a.dynamic_sampling
            or a.likelihood_coef
        )

    def load_train_data(self) -> LoadReport:
        """See `BaseTrainer.load_train_data`; also reads the test prompts and the reward functions, to fail
        early.
        """
        prompts, report = self.read_prompts(self.config.data.train, "train")
        if self._collection:  # of other prompts
            self._collection.close()
            self._collection = None
        self.loader = PromptLoader(prompts, seed=self.config.seed, shuffle=self.config.data.shuffle)
        if self.eval_every:
            self.test_prompts  # noqa: B018  # read now, so that a mistake is found before the first step
        if self.rewards:
            self.rewards.check_data(prompts)
        return report

    @cached_property
    def test_prompts(self) -> list[Prompt]:
        """The held-out prompts."""
        return self.read_prompts(self.config.data.test, "test")[0][: self.config.evaluation.prompts]

    @property
    @override
    def eval_every(self) -> int:
        return self.config.evaluation.every_steps

    @property
    @override
    def eval_at_start(self) -> bool:
        return self.eval_every > 0 and self.config.evaluation.at_start

    def evaluate(self) -> Metrics:
        """mean@k and pass@k of the policy as it is on the held-out prompts, with the same random numbers each
        time.
        """
        return evaluate(self.collector, self.test_prompts, self.config)

    @override
    def samples(self) -> list[dict[str, Any]]:
        return [sample_row(t) for t in self.last[: self.config.tracking.num_samples]]

    @override
    def state(self) -> dict[str, Any]:
        collection = self.collection.state()
        own = {"loader": collection.pop("loader"), "collection": collection}
        return super().state() | own | {"dispatched": self.collector.dispatched, "kl_coef": self.kl_coef}

    @override
    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        self.collector.dispatched = state["dispatched"]
        self.kl_coef = state["kl_coef"]
        self.rollout.publish(self.version)
        self.collection.load_state(state["collection"], self.version)

    def step_limit(self, seconds: float) -> Metrics:
        """`limit_share`: the least time that this machine needs for such a step, over the time that it took;
        of dense models alone.
        """
        if self._shape is None or self.config.placement.name != "local":
            return {}
        rows = Batch.from_trajectories(self.last)
        work = StepWork(
            rows.ragged("prompt_ids").lengths,
            rows.response_lengths,
            num_prompts=len(set(rows["group_ids"].tolist())),
            updates=self.config.algorithm.epochs * self.config.algorithm.minibatches,
            max_slots=self.config.rollout.max_slots,
            bytes_per_weight=4 if self.config.policy.precision == "fp32" else 2,
            epochs=self.config.algorithm.epochs,
        )
        return {"limit_share": step_limit(self._shape, work, self._speed).total_s / seconds}

    @cached_property
    def _shape(self) -> ModelShape | None:
        """None for a model that the formulas of the limit do not cover: it trains all the same."""
        try:
            return ModelShape.from_hf_config(self.model_config)
        except ValueError:
            return None

    @cached_property
    def _speed(self) -> MachineSpeed:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return measure_speed(self.device, dtypes[self.config.policy.precision])

    @property
    @override
    def model_config(self) -> PretrainedConfig:
        return self.team.model_config

    @property
    @override
    def saves(self) -> Mapping[str, Save]:
        return self.team.saves

    @override
    def load_models(self, folder: Path) -> None:
        self.rollout.sleep()  # what generates has weights from before
        self.team.load(folder)

    @override
    def export(self, folder: Path) -> None:
        self.team.policy.call(RoleWorker.export, folder).result()

    @property
    @override
    def stall_limit_s(self) -> float:
        return self.config.pipeline.stall_limit_s

    @override
    def parts(self) -> list[Dependency]:
        pool = pool_of(self.rollout)
        return (
            [Dependency(f"engine {replica.name}", replica.state, replica.cause) for replica in pool.replicas]
            if pool
            else []
        )

    @override
    def memory(self) -> Metrics:
        return self.team.memory()

    @override
    def close(self) -> None:
        with ExitStack() as ends:
            ends.callback(self.team.close)
            if self._owns_rollout:
                ends.callback(self.rollout.close)
            if self._collection:
                ends.callback(self._collection.close)

    def _plan(self, group: WorkerGroup, rows: Batch, role: RoleConfig) -> BatchPlan:
        """Which rank of a role takes which rows, in micro-batches that fit it."""
        # Siblings that a loss or a mean compares must meet in one update, also where failed answers shift the
        # rows.
        whole_groups = "group_ids" in {
            *self.algorithm.policy_loss.columns,
            *self.algorithm.aggregation.columns,
        }
        group_ids = rows["group_ids"] if whole_groups else None
        most = rows.num_rows if group_ids is None else len(group_ids.unique())
        return balance(
            rows.num_tokens,
            num_ranks=group.layouts["train"].num_parts,
            micro_batch_tokens=role.micro_batch_tokens,
            micro_batch_rows=role.micro_batch_rows,
            num_minibatches=min(self.config.algorithm.minibatches, most),
            cost=compute_cost(rows.num_tokens, self.model_config.get_text_config().hidden_size),
            group_ids=group_ids,
        )

    def check_context(self, prompt_tokens: int) -> None:
        """See `BaseTrainer.check_context`: answers must find their end within the policy's context."""
        context, answer_tokens = (
            self.model_config.get_text_config().max_position_embeddings,
            self.config.sampling.max_tokens,
        )
        if prompt_tokens + answer_tokens > context:
            raise ValueError(
                f"need prompt and answer within the policy's context of {context} tokens, got prompts of up to {prompt_tokens} and "
                f"sampling.max_tokens {answer_tokens}; lower sampling.max_tokens or data.max_prompt_tokens"
            )
