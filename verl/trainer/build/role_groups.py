"""The roles of a run: their existence, their worker groups, and calls of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from verl.algorithms.objective import Algorithm
from verl.config.roles import RoleConfig
from verl.config.run import TrainerConfig
from verl.controller.worker_group import Timeline, WorkerFactory, WorkerGroup
from verl.data.batch import Batch
from verl.data.columns import written_by
from verl.data.packing import BatchPlan
from verl.engines.hf.adapters import reference_on_base
from verl.engines.roles.policy import PolicyWorker
from verl.engines.roles.role_worker import ColumnWorker, Learner, RoleWorker
from verl.rewards.model_scoring import RewardScorer, reward_function_on
from verl.trainer.base import Metrics
from verl.trainer.build import worker_factories
from verl.trainer.build.placement import Placement
from verl.trainer.checkpoint_store import Save
from verl.utils.tokens import TextCodec


@dataclass(frozen=True)
class ColumnWriter:
    """The role that writes a column before the update: its group, method and micro-batches."""

    column: str
    group: WorkerGroup
    method: Callable[[Any, Batch, BatchPlan], Batch]
    config: RoleConfig


class RoleGroups:
    """The policy, and the critic, the reference and the teacher if a chosen function reads their columns.

    The reward model is one of them on pools of devices; in one process the reward function has it.

    Args:
        config: of the run.
        algorithm: decides which roles exist.
        source: policy weights; a loaded model is trained in place where that is possible.
        critic_source: critic weights; None: `critic.path`, else those of the policy.
        codec: tokenizer of the policy.
        timeline: takes the spans of all calls.

    Raises:
        ValueError: settings that do not fit together, or models or devices that are not there.
    """

    def __init__(
        self,
        config: TrainerConfig,
        algorithm: Algorithm,
        source: worker_factories.Source,
        critic_source: PreTrainedModel | str | None,
        *,
        codec: TextCodec,
        timeline: Timeline,
    ) -> None:
        self._config = config
        self._algorithm = algorithm
        wanted = self._wanted()
        if "teacher" in wanted and config.teacher.path is None:
            raise ValueError("need teacher.path: the folder or hub name of the model to distil from")
        self._placement = Placement(config.placement, wanted, Path(config.output_dir), timeline)
        sources = {
            "reference": config.reference or source,
            "critic": critic_source or config.critic.path or source,
            "policy": source,
            "teacher": config.teacher.path,
            "reward": worker_factories.reward_model_options(config).get("path")
            if self._places_rewards
            else None,
        }
        factories: dict[str, WorkerFactory] = {
            "reference": worker_factories.build_reference,
            "critic": worker_factories.build_critic,
            "policy": partial(worker_factories.build_actor, codec),
            "teacher": worker_factories.build_teacher,
            "reward": worker_factories.build_reward_model,
        }
        if "reference" in wanted and config.reference is None and config.policy.lora.path:
            sources["reference"] = worker_factories.with_adapter(source, config.policy.lora.path)
        groups: dict[str, WorkerGroup] = {}
        # Copies of a loaded policy are made before it becomes one that learns; a critic that is an adapter on
        # the policy's weights is made after it.
        shares_base = worker_factories.critic_shares_base(config, critic_source)
        order = [role for role in sources if role in wanted]
        order.sort(key=lambda role: role == "critic" and shares_base)
        try:
            for role in order:
                if role == "critic" and shares_base:
                    factories[role] = partial(worker_factories.build_critic_adapter, groups["policy"])
                groups[role] = self._start(role, factories[role], sources[role])
            self.policy = groups["policy"]
            self.reference, self.critic, self.teacher = (
                groups.get(role) for role in ("reference", "critic", "teacher")
            )
            self._check_vocabularies()
            self._limit_ids(codec.num_ids)
            self.placed_rewards = self._placed_rewards(groups.get("reward"))
        except BaseException:
            self.close()
            raise

    @cached_property
    def model_config(self) -> PretrainedConfig:
        """The configuration of the policy."""
        return self.policy.call(RoleWorker.model_config).result()

    @property
    def writers(self) -> list[ColumnWriter]:
        """Writers of the columns that a chosen function reads."""
        reads, policy, critic = self._algorithm.reads, self._config.policy, self._config.critic
        writers = []
        if reads & written_by("policy"):
            writers.append(ColumnWriter("trainer_logprobs", self.policy, ColumnWorker.write, policy))
        if self.reference:
            writers.append(ColumnWriter("ref_logprobs", self.reference, ColumnWorker.write, policy))
        elif "ref_logprobs" in reads:
            writers.append(ColumnWriter("ref_logprobs", self.policy, PolicyWorker.write_reference, policy))
        if self.teacher:
            writers.append(ColumnWriter("teacher_logprobs", self.teacher, ColumnWorker.write, policy))
        if self.critic:
            column = "values" if "values" in reads else "prm_logprobs"
            writers.append(ColumnWriter(column, self.critic, ColumnWorker.write, critic))
        return writers

    @property
    def saves(self) -> Mapping[str, Save]:
        """For each model that learns, the function that begins to write it."""
        return {name: partial(_save, group) for name, group in self._learning.items()}

    def not_finite(self) -> list[str]:
        """Models that learn whose weights or optimizer states are not all finite."""
        return [
            name
            for name, group in self._learning.items()
            if not group.call(Learner.has_finite_state).result()
        ]

    def checkpoint_bytes(self) -> int:
        """Bytes of the models in a checkpoint, about."""
        return sum(group.call(Learner.checkpoint_bytes).result() for group in self._learning.values())

    def model_bytes(self) -> int:
        """Bytes of the weights of the trained model."""
        return self.policy.call(RoleWorker.model_bytes).result()

    def load(self, folder: Path) -> None:
        """Read the models of a checkpoint."""
        for name, group in self._learning.items():
            group.call(Learner.load, folder / name).result()

    def export(self, folder: Path) -> None:
        """Write the policy in Hugging Face format, without its tokenizer."""
        self.policy.call(RoleWorker.export, folder).result()

    def export_adapter(self, folder: Path, base: str) -> None:
        """Write the policy's LoRA adapter alone in PEFT's layout."""
        self.policy.call(RoleWorker.export_adapter, folder, base).result()

    def memory(self) -> Metrics:
        """Bytes in use, at most and in all, of the fullest device of the policy."""
        return self.policy.call(RoleWorker.memory).result()

    def close(self) -> None:
        """End all workers."""
        self._placement.close()

    @property
    def _learning(self) -> dict[str, WorkerGroup]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})

    def _wanted(self) -> set[str]:
        reads, config = self._algorithm.reads, self._config
        # Without its adapter, or with another one, a policy on one device is its own reference.
        shares_base, adapter = reference_on_base(config.policy, config.reference)
        is_own_reference = shares_base and (adapter is None or not self._places_rewards)
        exists = {
            "policy": True,
            "reference": "ref_logprobs" in reads and not is_own_reference,
            "critic": bool(reads & written_by("critic", "process_reward_model")),
            "teacher": bool(reads & written_by("teacher")),
            "reward": self._places_rewards and bool(worker_factories.reward_model_options(config)),
        }
        return {role for role, needed in exists.items() if needed}

    @property
    def _places_rewards(self) -> bool:
        return self._config.placement.name != "local"

    def _placed_rewards(self, group: WorkerGroup | None) -> dict[str, Callable[..., Any]]:
        """Reward functions whose models run on ranks of their own."""
        if group is None:
            return {}
        options = worker_factories.reward_model_options(self._config)
        return {
            "model": reward_function_on(RewardScorer.of(group, options["path"], options.get("system_prompt")))
        }

    def _start(
        self, role: str, factory: WorkerFactory, source: worker_factories.Source | None
    ) -> WorkerGroup:
        parallel = self._placement.parallel(role)
        assert source is not None
        if parallel is not None:
            folder = Path(self._config.output_dir) / "start" / role
            source = worker_factories.plain_folder(source, folder, is_reward_model=role == "reward")
        return self._placement.start(role, factory, self._config, source, parallel)

    def _limit_ids(self, num_ids: int) -> None:
        """Give ids that are no tokens no probability, in training and in the engines that sample by it.

        vLLM and SGLang sample from all rows of the head, so there the policy is the distribution over all.
        """
        rows = self.model_config.get_text_config().vocab_size
        if self._config.rollout.engine not in ("embedded", "served") or num_ids >= rows:
            return
        for group in (self.policy, self.reference, self.critic, self.teacher):
            if group is not None:
                group.call(RoleWorker.limit_ids, num_ids).result()

    def _check_vocabularies(self) -> None:
        vocabulary, config = self.model_config.get_text_config().vocab_size, self._config
        is_prm = "prm_logprobs" in self._algorithm.reads
        others = {
            "reference": self.reference if config.reference else None,
            "critic.path": self.critic if is_prm else None,
            "teacher.path": self.teacher,
        }
        for setting, group in others.items():
            other = (
                group.call(RoleWorker.model_config).result().get_text_config().vocab_size
                if group
                else vocabulary
            )
            if other != vocabulary:
                raise ValueError(
                    f"need the policy's vocabulary of {vocabulary} tokens in {setting}, got {other}; take a "
                    "model of its family"
                )
        top_k = worker_factories.teacher_top_k(config)
        if self.teacher and top_k > vocabulary:
            raise ValueError(
                f"need teacher.top_k within the vocabulary of {vocabulary} tokens, got {top_k}; lower it"
            )


def _save(group: WorkerGroup, folder: Path) -> Callable[[], None]:
    """Begins to write the model of a group; returns what waits for it, between the calls of the steps that go
    on.
    """
    group.call(Learner.begin_save, folder).result()

    def wait() -> None:
        pause_s = 0.01
        # Asked now and then: to wait in the ranks would keep them from the next step.
        while not group.call(Learner.is_saved).result():
            time.sleep(pause_s)
            pause_s = min(1.0, 2 * pause_s)
        group.call(Learner.finish_save).result()

    return wait
