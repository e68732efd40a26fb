"""Reinforcement learning from rewards: the step that PPO, GRPO, DAPO and their kin share, and two ways to hold the loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from transformers import PreTrainedModel

from verl.agents.collector import Collected, DataCollector, PromptLike, as_prompt, collection_metrics
from verl.algorithms.compose import Algorithm, write_advantages
from verl.algorithms.kl import adapted_coef, scheduled_coef
from verl.config import make_trainer_config
from verl.controller.simulator import ModelShape, StepWork, step_limit
from verl.data.batch import Batch, Trajectory
from verl.data.dataset import LoadReport, PromptLoader
from verl.data.packing import Plan, balance
from verl.data.tasks import TASKS
from verl.engines.local import LocalEngine, check_vocabulary, frozen_copy
from verl.engines.models import PolicyModel, load_language_model, value_model
from verl.engines.workers import CriticWorker, PolicyWorker, ProcessRewardWorker, ReferenceWorker, TeacherWorker
from verl.rewards.functions import RewardFunctions, build_rewards
from verl.rewards.shaping import bound_length_penalty
from verl.rollout.embedded import EmbeddedEngine
from verl.rollout.text import TextWorkerEngine
from verl.settings import CriticConfig, KLAdaptive, KLSchedule, RoleConfig, TrainerConfig, WeightedChoice
from verl.trainer.base import BaseTrainer, Metrics
from verl.trainer.evaluation import evaluate
from verl.utils.device import MachineSpeed, measure_speed
from verl.utils.rollout import BaseRolloutWorker, Prompt, RolloutEngine
from verl.utils.tokens import TextCodec

RewardFn = Callable[..., Any]
_REWARD_COLUMNS = {"rewards", "token_rewards", "reward_parts", "greedy_rewards"}
_TEACHER_TOP = {"teacher_top_logprobs", "top_logprobs"}
T = TypeVar("T")


class Trainer(BaseTrainer):
    """Trains a policy on rewards, with the algorithm that the configuration composes.

    Either `fit()` runs everything, or the loop is yours: `data = trainer.collect_data(prompts)`, then
    `metrics = trainer.update_policy(data)`.

    Args:
        config: of the run, from `make_trainer_config` or `load_config`.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        critic_model: start of the value model, if there is one, likewise; none: `config.critic.path`, else a copy of the policy.
        reward_fn: a function, or several, added to those of `config.rewards.functions`; see `verl.rewards.functions`.
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
        self.algorithm = Algorithm.bind(config.algorithm)
        self._length_penalty = bound_length_penalty(config.algorithm.length_penalty)
        super().__init__(config, actor_model, codec=codec, console=console)
        self._build_roles(critic_model)
        self.rollout = self._build_rollout("vllm" if use_vllm else config.rollout.engine, rollout)
        self._reward_fn = reward_fn
        self.last: list[Trajectory] = []

    def step(self) -> Metrics:
        """Prompts in, a better policy out."""
        assert self.loader is not None
        return self.update_policy(self.collect_data(self.loader.take(self.config.prompts_per_step), refill=self.loader.take))

    def collect_data(self, prompts: Sequence[PromptLike], refill: Callable[[int], list[Prompt]] | None = None) -> Collected:
        """Answers and rewards prompts (texts, chat messages or `Prompt`s), `samples_per_prompt` times each."""
        return self.collector.collect(prompts, samples=self.config.samples_per_prompt, refill=refill)

    def update_policy(self, data: Collected) -> Metrics:
        """Learns from collected data; returns `reward` and all other metrics, see docs/metrics.md."""
        rows, self.last = data.rows, data.trajectories
        for write in self.writers:
            write(rows)
        metrics = data.metrics | write_advantages(rows, self.algorithm, self.policy.kl_coef, version=self.version, seed=self.config.seed)
        for learn in self.learners:
            metrics |= learn(rows)
        self.version += 1
        self.rollout.publish(self.version)
        if self.algorithm.kl:
            metrics["kl_coef"] = self.policy.kl_coef
        self.policy.kl_coef = self._next_kl_coef(metrics, rows.num_rows)
        return metrics

    @property
    def writers(self) -> list[Callable[[Batch], None]]:
        """Those whose column a chosen function reads."""
        policy, critic = self.config.policy, self.config.critic
        own = {"trainer_logprobs", "sum_squared_probs"} & self.algorithm.reads
        writers = [self._planned("trainer_logprobs", self.policy.write, policy)] if own else []
        if self.reference:
            writers.append(self._planned("ref_logprobs", self.reference.write, policy))
        if self.teacher:
            writers.append(self._planned("teacher_logprobs", self.teacher.write, policy))
        if self.critic:
            name = "values" if isinstance(self.critic, CriticWorker) else "prm_logprobs"
            writers.append(self._planned(name, self.critic.write, critic))
        return writers

    @property
    def learners(self) -> list[Callable[[Batch], Metrics]]:
        """The critic, if there is one, then the policy, once the critic has had its first steps alone."""
        config = self.config
        critic = [self._planned("update_critic", self.critic.update, config.critic)] if self.critic else []
        waits = self.critic is not None and self.version < config.critic.warmup_steps
        return critic if waits else [*critic, self._planned("update_policy", self.policy.update, config.policy)]

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

    @cached_property
    def rewards(self) -> RewardFunctions | None:
        """The reward functions: those given, those configured, or the task's own; None if there are none, and nothing needs a reward."""
        config, source = self.config.rewards, self.config.data.train or self.config.data.test or ""
        task = TASKS.get(source.removeprefix("task:")) if source.startswith("task:") else None
        if self._reward_fn is None and not config.functions and task:
            config = config.model_copy(update={"functions": (WeightedChoice(name=task.reward),)})
        if self._reward_fn is None and not config.functions and not self._needs_rewards:
            return None
        return build_rewards(config, self._reward_fn)

    @property
    def _needs_rewards(self) -> bool:
        a = self.config.algorithm
        shaped = self._length_penalty is not None or a.overlong_buffer_tokens > 0
        return bool(self.algorithm.reads & _REWARD_COLUMNS or shaped or a.dynamic_sampling or a.likelihood_coef)

    def load_train_data(self) -> LoadReport:
        """See `BaseTrainer.load_train_data`; also reads the test prompts and the reward functions, to fail early."""
        prompts, report = self.read_prompts(self.config.data.train, "train")
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
    def eval_every(self) -> int:
        """See `BaseTrainer.eval_every`."""
        return self.config.evaluation.every_steps

    @property
    def eval_at_start(self) -> bool:
        """See `BaseTrainer.eval_at_start`."""
        return self.eval_every > 0 and self.config.evaluation.at_start

    def evaluate(self) -> Metrics:
        """mean@k and pass@k of the policy as it is on the held-out prompts, with the same random numbers each time."""
        return evaluate(self.collector, self.test_prompts, self.config)

    def samples(self) -> list[dict[str, Any]]:
        """See `BaseTrainer.samples`."""
        return [sample_row(t) for t in self.last[: self.config.tracking.num_samples]]

    def state(self) -> dict[str, Any]:
        """See `BaseTrainer.state`."""
        return super().state() | {"dispatched": self.collector.dispatched, "kl_coef": self.policy.kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `BaseTrainer.load_state`."""
        super().load_state(state)
        self.collector.dispatched = state["dispatched"]
        self.policy.kl_coef = state["kl_coef"]
        self.rollout.publish(self.version)

    def step_limit(self, seconds: float) -> Metrics:
        """`limit_share`: the least time that this machine needs for such a step, over the time that it took; of dense models alone."""
        if self._shape is None:
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
            return ModelShape.from_hf_config(self.policy.model.transformer.config)
        except ValueError:
            return None

    @cached_property
    def _speed(self) -> MachineSpeed:
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return measure_speed(self.device, dtypes[self.config.policy.precision])

    def _build_roles(self, critic_model: PreTrainedModel | str | None) -> None:
        """The policy, and the critic and the reference if some chosen function reads their columns."""
        config, algorithm = self.config, self.algorithm
        temperature, chunk = config.sampling.temperature, config.policy.logits_chunk_tokens
        self.policy = PolicyWorker(self.policy_engine, algorithm, temperature=temperature, epochs=config.algorithm.epochs, chunk=chunk)
        self.policy.kl_coef = first_kl_coef(config)
        self.reference: ReferenceWorker | None = None
        self.teacher: TeacherWorker | None = None
        self.critic: CriticWorker | ProcessRewardWorker | None = None
        if "ref_logprobs" in algorithm.reads:
            engine = frozen_copy(self.policy.model, config.reference, config.policy, setting="reference")
            self.reference = ReferenceWorker(engine, temperature=temperature, chunk=chunk)
        if {"teacher_logprobs", *_TEACHER_TOP} & algorithm.reads:
            self.teacher = self._build_teacher()
        if {"values", "prm_logprobs"} & algorithm.reads:
            self.critic = self._build_critic(config.critic, critic_model)

    def _build_teacher(self) -> TeacherWorker:
        config, wanted = self.config, self.config.teacher
        if wanted.path is None:
            raise ValueError("need teacher.path: the folder or hub name of the model to distil from")
        top_k = wanted.top_k if _TEACHER_TOP & self.algorithm.reads else 0
        vocabulary = self.policy.model.transformer.config.get_text_config().vocab_size
        if top_k > vocabulary:
            raise ValueError(f"need teacher.top_k within the vocabulary of {vocabulary} tokens, got {top_k}; lower it")
        engine = frozen_copy(self.policy.model, wanted.path, config.policy, setting="teacher.path")
        return TeacherWorker(engine, temperature=config.sampling.temperature, chunk=config.policy.logits_chunk_tokens, top_k=top_k)

    def _build_critic(self, config: CriticConfig, given: PreTrainedModel | str | None) -> CriticWorker | ProcessRewardWorker:
        source = given or config.path or self.policy.model.transformer
        if isinstance(source, str):
            source = load_language_model(source)
        elif source is self.policy.model.transformer:
            source = copy.deepcopy(source)  # two optimizers on one storage would undo each other's steps
        epochs, is_prm = self.config.algorithm.epochs, "prm_logprobs" in self.algorithm.reads
        model = PolicyModel(source.float(), config.precision) if is_prm else value_model(source.float(), config.precision)
        model.to(self.device).check_forward()
        engine = LocalEngine(model, config, device=self.device, total_updates=self._total_updates())
        self.engines["critic"] = engine
        if is_prm:
            check_vocabulary(source, self.policy.model, "critic.path")
            temperature, chunk = self.config.sampling.temperature, config.logits_chunk_tokens
            return ProcessRewardWorker(engine, self.algorithm, temperature=temperature, epochs=epochs, chunk=chunk)
        return CriticWorker(engine, self.algorithm, vf_coef=config.vf_coef, epochs=epochs)

    def _build_rollout(self, name: str, given: RolloutEngine | BaseRolloutWorker | None) -> RolloutEngine:
        if isinstance(given, BaseRolloutWorker):
            if "rollout_logprobs" in self.algorithm.reads:
                remedy = "; set algorithm.correction=recompute and a policy loss that does not read them"
                raise ValueError(f"a worker that answers in text gives no logprobs, but a chosen function reads rollout_logprobs{remedy}")
            if "greedy_rewards" in self.algorithm.reads:
                raise ValueError(
                    "a worker that answers in text is not told a temperature, so it has no greedy answers; take the recipe rloo"
                )
            return TextWorkerEngine(given, self.codec)
        if given is not None:
            return given
        if name != "embedded":
            raise ValueError(f"need a rollout engine that is here, got {name!r}; this version has: embedded (and `rollout=` for your own)")
        return EmbeddedEngine(self.policy.model, self.codec, max_slots=self.config.rollout.max_slots)

    def _planned(self, name: str, call: Callable[[Batch, Plan], T], role: RoleConfig) -> Callable[[Batch], T]:
        """A call of a role with the micro-batches that fit it, timed under its name."""

        # Siblings that a loss or a mean compares must meet in one update, also where failed answers shift the rows.
        whole_groups = "group_ids" in {*self.algorithm.policy_loss.columns, *self.algorithm.aggregation.columns}

        def run(rows: Batch) -> T:
            group_ids = rows["group_ids"] if whole_groups else None
            most = rows.num_rows if group_ids is None else len(group_ids.unique())
            plan = balance(
                rows.num_tokens,
                num_ranks=1,
                micro_batch_tokens=role.micro_batch_tokens,
                micro_batch_rows=role.micro_batch_rows,
                num_minibatches=min(self.config.algorithm.minibatches, most),
                group_ids=group_ids,
            )
            with self.clock.phase(name):
                return call(rows, plan)

        return run

    def _next_kl_coef(self, metrics: Metrics, num_trajectories: int) -> float:
        coef = self.config.algorithm.kl.coef
        if isinstance(coef, KLSchedule):
            return scheduled_coef(self.version, start=coef.start, end=coef.end, steps=coef.steps)
        if isinstance(coef, KLAdaptive) and "kl" in metrics:
            return adapted_coef(
                self.policy.kl_coef, metrics["kl"], target=coef.target, horizon=coef.horizon, num_trajectories=num_trajectories
            )
        return self.policy.kl_coef

    def check_context(self, prompt_tokens: int) -> None:
        """See `BaseTrainer.check_context`: answers must find their end within the policy's context."""
        context, answer_tokens = (
            self.policy.model.transformer.config.get_text_config().max_position_embeddings,
            self.config.sampling.max_tokens,
        )
        if prompt_tokens + answer_tokens > context:
            raise ValueError(
                f"need prompt and answer within the policy's context of {context} tokens, got prompts of up to {prompt_tokens} and "
                f"sampling.max_tokens {answer_tokens}; lower sampling.max_tokens or data.max_prompt_tokens"
            )

    def _total_updates(self) -> int:
        return self.config.steps * self.config.algorithm.epochs * self.config.algorithm.minibatches

    def _stop_ids(self) -> tuple[int, ...]:
        return self.config.sampling.stop_ids


class PPOTrainer:
    """PPO on records of prompt, response and reward, wherever the responses came from.

    Args:
        model_name: folder or hub name of the policy.
        optimizer: adamw.
        lr: learning rate of the policy.
        kl_coef: weight of the KL to the starting policy, in the reward.
        clip_range: of the probability ratio.
        options: further keywords of `make_trainer_config`.
    """

    def __init__(
        self, model_name: str, optimizer: str = "adamw", lr: float = 1e-6, kl_coef: float = 0.1, clip_range: float = 0.2, **options: Any
    ) -> None:
        overrides = [f"policy.optimizer.name={optimizer}", "algorithm.correction=recompute", *options.pop("overrides", ())]
        config = make_trainer_config(
            "ppo", model_name=model_name, lr=lr, kl_coef=kl_coef, clip_eps=clip_range, overrides=overrides, **options
        )
        algorithm = config.algorithm
        if algorithm.overlong_buffer_tokens or algorithm.mask_truncated or algorithm.dynamic_sampling:
            raise ValueError(
                "need records that are learned from as they are, got algorithm.overlong_buffer_tokens, mask_truncated or dynamic_sampling, "
                "which act where answers are sampled; shape the rewards of the records, or use Trainer"
            )
        self.trainer = Trainer(config)

    def update(self, batch: Sequence[Mapping[str, Any]]) -> Metrics:
        """One step on records with `prompt` (text or chat messages), `response` (text) and `reward` (number).

        Raises:
            ValueError: no record, one without these keys, or a reward that is not finite.
        """
        if not batch:
            raise ValueError("need at least one record with prompt, response and reward, got none")
        trajectories = [self._trajectory(record, i) for i, record in enumerate(batch)]
        return self.trainer.update_policy(
            Collected(trajectories, Batch.from_trajectories(trajectories), collection_metrics([[t] for t in trajectories]))
        )

    def save_model(self, folder: str | Path) -> None:
        """Writes the policy in Hugging Face format."""
        self.trainer.save_model(Path(folder))

    def _trajectory(self, record: Mapping[str, Any], index: int) -> Trajectory:
        missing = [key for key in ("prompt", "response", "reward") if key not in record]
        if missing:
            raise ValueError(f"need prompt, response and reward in each record, but record {index} has no {', '.join(missing)}")
        reward = float(record["reward"])
        if not math.isfinite(reward):
            raise ValueError(f"need a finite reward in each record, got {reward} in record {index}; leave such records out")
        prompt, codec = as_prompt(record["prompt"], index), self.trainer.codec
        ids = codec.encode_answer(record["response"])
        return Trajectory(
            prompt,
            codec.encode_prompt(prompt),
            ids,
            [True] * len(ids),
            None,
            [self.trainer.version] * len(ids),
            index,
            text=record["response"],
            reward=reward,
        )


def first_kl_coef(config: TrainerConfig) -> float:
    """The coefficient of the first step."""
    coef = config.algorithm.kl.coef
    if isinstance(coef, KLSchedule):
        return coef.start
    return coef.initial if isinstance(coef, KLAdaptive) else coef


def sample_row(trajectory: Trajectory) -> dict[str, Any]:
    """One answer for a table: prompt, response, reference, reward, scores."""
    t = trajectory
    prompt = t.prompt.content if isinstance(t.prompt.content, str) else t.prompt.content[-1].get("content", "")
    logprobs = t.rollout_logprobs or []
    return {
        "prompt": prompt,
        "response": t.text,
        "reference": t.prompt.answer,
        "reward": t.reward,
        "scores": t.scores,
        "truncated": t.truncated,
        "tokens": len(t.response_ids),
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "group": t.group,
        "outcome": t.outcome,
    }
