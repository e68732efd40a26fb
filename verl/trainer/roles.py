"""The calls of the roles in a step: columns before the update, then the critic, then the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from verl.algorithms.mismatch import OVER_FRESH_TOKENS, sampler_difference
from verl.algorithms.objective import Algorithm, write_advantages
from verl.config.roles import RoleConfig
from verl.config.run import TrainerConfig
from verl.controller.worker_group import Future, MergedMetrics, WorkerGroup
from verl.data.batch import Batch, shared_prompts
from verl.data.episode_rows import EpisodeRows
from verl.data.packing import BatchPlan, balance, compute_cost
from verl.engines.memory_limits import micro_batch_tokens
from verl.engines.minibatches import skip_zero_advantages, write_loss_weights
from verl.engines.roles.role_columns import MODEL_COLUMNS, critic_reads, policy_reads
from verl.engines.roles.role_worker import ColumnWorker, Learner
from verl.engines.streaming import StreamedBatch, StreamedUpdate, streaming_obstacle
from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.trainer.base import Metrics
from verl.trainer.build.role_groups import RoleGroups
from verl.utils.device import pick_device

# Starts a call of a role.
StartCall = Callable[[], Future[Any]]


class Roles:
    """Lets the roles of a run write columns and learn.

    Args:
        groups: worker group of each role.
        algorithm: what is minimised.
        config: of the run.
        clock: takes the seconds of each call.
        waits: takes the waits for each call.

    Raises:
        ValueError: `pipeline.batches` is streamed, but the algorithm needs all rows of a step at once, or an
            engine takes whole updates only.
    """

    def __init__(
        self,
        groups: RoleGroups,
        algorithm: Algorithm,
        config: TrainerConfig,
        *,
        clock: Clock,
        waits: WaitTracker,
    ) -> None:
        self._groups, self._algorithm, self._config = groups, algorithm, config
        self._clock, self._waits = clock, waits
        # Ranks of other processes may have GPUs that this process lacks.
        is_local = config.placement.name == "local"
        self._is_on_cpu = config.device == "cpu" or (is_local and pick_device(config.device).type == "cpu")
        self._critic_columns = {*MODEL_COLUMNS, *critic_reads(algorithm)}
        self._policy_columns = {*MODEL_COLUMNS, *policy_reads(algorithm)}
        # Of a step that is learned from while it is answered: its portions, and the update of each role.
        self._portions: StreamedBatch | None = None
        self._streamed: dict[str, StreamedUpdate] = {}
        if config.pipeline.batches == "streamed":
            self._check_streamed()

    def write_columns(self, rows: Batch, fresh: Batch | None = None) -> Metrics:
        """Add the columns that a chosen function reads: old and reference logprobs, values, teacher logprobs.

        Portions that were accumulated have them.

        Args:
            rows: of the step.
            fresh: other answers, sampled by the version that is trained now.

        Returns:
            The difference between sampler and trainer on `fresh`, if it is given.

        Raises:
            ValueError: answers have no logprobs, but a chosen function reads the sampler's.
        """
        measured = {} if fresh is None else self._sampler_difference(fresh)
        if self._portions is not None:
            return measured
        if "rollout_logprobs" in self._algorithm.reads and "rollout_logprobs" not in rows:
            raise ValueError(
                "need logprobs of the sampler for every answer, but some came as text alone; set "
                "algorithm.correction=recompute and a policy loss that does not read rollout_logprobs"
            )
        calls: dict[str, StartCall] = {}
        for writer in self._groups.writers:
            plan = self.plan(writer.group, rows, writer.config)
            calls[writer.column] = partial(writer.group.call, writer.method, rows.keep(MODEL_COLUMNS), plan)
        for columns in self._run_together(calls):
            rows.update(columns)
        return measured

    def update(self, rows: Batch, kl_coef: float, version: int) -> Metrics:
        """All updates of a step: the critic, then the policy, once the critic has had its warm-up steps.

        Args:
            rows: with advantages.
            kl_coef: weight of the KL in the loss.
            version: of the policy.
        """
        calls: dict[str, StartCall]
        if self._portions is not None:
            self._portions.check(rows)
            scales = {"critic": self._portions.critic_scale, "policy": self._portions.policy_scale}
            calls = {
                f"update_{role}": partial(update.finish, scales[role])
                for role, update in self._streamed.items()
            }
        else:
            calls = {}
            if self._groups.critic is not None:
                calls["update_critic"] = partial(self._update_critic, self._groups.critic, rows)
            if not self._is_critic_warmup(version):
                calls["update_policy"] = partial(self._update_policy, rows, kl_coef)
        self._portions = None
        metrics: Metrics = {}
        for learned in self._run_together(calls):
            metrics |= learned
        return metrics

    def accumulate(self, portions: Iterable[Batch], kl_coef: float, version: int) -> None:
        """Start forward and backward on portions of a step as they come, which `update` then finishes.

        Args:
            portions: rows of whole groups; columns and advantages are added. None: the step is not streamed.
            kl_coef: weight of the KL.
            version: of the policy.
        """
        self._portions = accumulated = None  # those of an interrupted step are given up
        for rows in portions:
            self.write_columns(rows)
            write_advantages(rows, self._algorithm, kl_coef, version=version, seed=self._config.seed)
            if accumulated is None:
                accumulated = StreamedBatch(self._algorithm, num_groups=self._config.prompts_per_step)
                self._streamed = self._streamed_updates(kl_coef, version)
            first_row = accumulated.add(rows)
            for update in self._streamed.values():
                update.add(rows, first_row)
        self._portions = accumulated

    def plan(self, group: WorkerGroup, rows: Batch, role: RoleConfig) -> BatchPlan:
        """Rows of each rank of a role, in micro-batches that fit it."""
        # Siblings that a loss or a mean compares must be in one update, also where failed answers shift rows.
        compared = {*self._algorithm.policy_loss.columns, *self._algorithm.aggregation.columns}
        group_ids = rows["group_ids"] if "group_ids" in compared else None
        if group_ids is None and not rows["episode_ends"].all():
            group_ids = EpisodeRows(rows, ()).episode_of  # segments share the weight of their episode
        most = rows.num_rows if group_ids is None else len(group_ids.unique())
        model = self._groups.model_config
        hidden_size = model.get_text_config().hidden_size
        return balance(
            rows.num_tokens,
            num_ranks=group.layouts["train"].num_parts,
            micro_batch_tokens=micro_batch_tokens(role, model, on_cpu=self._is_on_cpu),
            micro_batch_rows=role.micro_batch_rows,
            num_minibatches=min(self._config.algorithm.minibatches, most),
            cost=compute_cost(rows.num_tokens, hidden_size),
            group_ids=group_ids,
            prompts=shared_prompts(rows) if role.packing else None,
        )

    def _sampler_difference(self, fresh: Batch) -> Metrics:
        """`kl_sampler`, `sampler_gap` and `sampler_gap_max` of rows, by a forward pass of the policy."""
        policy, config = self._groups.policy, self._config.policy
        plan = self.plan(policy, fresh, config)
        call = partial(policy.call, ColumnWorker.write, fresh.keep(MODEL_COLUMNS), plan)
        (written,) = self._run_together({"sampler_difference": call})
        mask = fresh["mask"]
        found = sampler_difference(written["trainer_logprobs"], fresh["rollout_logprobs"], mask)
        count = max(1, int(mask.sum()))
        return {name: float(v) / (count if name in OVER_FRESH_TOKENS else 1) for name, v in found.items()}

    def _run_together(self, calls: Mapping[str, StartCall]) -> list[Any]:
        """Results of calls, all started before the first is awaited: roles on pools of their own overlap."""
        started, results = [], []
        for name, start in calls.items():
            with self._clock.phase(name), self._waits.track("update", name):
                started.append(start())
        for name, future in zip(calls, started, strict=True):
            with self._clock.phase(name), self._waits.track("update", name):
                results.append(future.result())
        return results

    def _is_critic_warmup(self, version: int) -> bool:
        return self._groups.critic is not None and version < self._config.critic.warmup_steps

    def _update_critic(self, critic: WorkerGroup, rows: Batch) -> Future[Metrics]:
        plan = self.plan(critic, rows, self._config.critic)
        write_loss_weights(rows, plan, self._algorithm)
        return critic.call(Learner.update, rows.keep(self._critic_columns), plan, 0.0)

    def _update_policy(self, rows: Batch, kl_coef: float) -> Future[Metrics]:
        plan = self.plan(self._groups.policy, rows, self._config.policy)
        write_loss_weights(rows, plan, self._algorithm)
        metrics: Metrics = {}
        if self._algorithm.skip_zero_advantages:
            plan, metrics = skip_zero_advantages(rows, plan)
        read = rows.keep(self._policy_columns)
        return MergedMetrics(self._groups.policy.call(Learner.update, read, plan, kl_coef), metrics)

    def _streamed_updates(self, kl_coef: float, version: int) -> dict[str, StreamedUpdate]:
        updates = {}
        critic, policy, config = self._groups.critic, self._groups.policy, self._config
        if critic is not None:
            plan = partial(self.plan, critic, role=config.critic)
            updates["critic"] = StreamedUpdate(critic, plan, reads=self._critic_columns)
        if not self._is_critic_warmup(version):
            updates["policy"] = StreamedUpdate(
                policy,
                partial(self.plan, policy, role=config.policy),
                reads=self._policy_columns,
                kl_coef=kl_coef,
                skips_zero_advantages=self._algorithm.skip_zero_advantages,
            )
        return updates

    def _check_streamed(self) -> None:
        learning = [group for group in (self._groups.critic, self._groups.policy) if group]
        reason = streaming_obstacle(self._algorithm, self._config.algorithm)
        if reason is None and not all(group.call(Learner.can_accumulate).result() for group in learning):
            reason = "an engine of placement takes whole updates only"
        if reason:
            raise ValueError(
                f"need a step that may come in portions for pipeline.batches=streamed, but {reason}; set "
                "arrival, or change it"
            )
