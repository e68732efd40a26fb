"""Factories of the worker of each role: its model and its engine; they run in the process of the rank."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from transformers import PreTrainedModel

from verl.algorithms.objective import Algorithm
from verl.config.fields import Choice
from verl.config.placement import ParallelConfig
from verl.config.roles import RoleConfig
from verl.config.run import TrainerConfig
from verl.data.columns import COLUMNS
from verl.engines.base import ForwardEngine, TrainEngine
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import load_language_model, save_transformer, value_model
from verl.engines.local import LocalEngine, LocalForwardEngine
from verl.engines.roles.critic import CriticWorker
from verl.engines.roles.process_reward import ProcessRewardWorker
from verl.engines.roles.reference_policy import ReferenceWorker
from verl.engines.roles.role_worker import Learner
from verl.engines.roles.teacher import TeacherWorker
from verl.rewards.model_scoring import RewardWorker
from verl.rollout.actor_worker import ActorWorker
from verl.rollout.embedded.hybrid_engine import HybridEngine, default_tensor_size, has_equal_layout
from verl.rollout.inference_server import ColocatedEngine
from verl.utils.device import PRECISIONS, pick_device
from verl.utils.tokens import TextCodec

# A folder or hub name; or, in this process, a loaded model.
Source = str | PreTrainedModel
Kind = Literal["policy", "value"]
# Engines in the processes of the policy with a separate copy of the weights.
IN_PROCESS = {"vllm": "verl.rollout.vllm.in_process:VLLMEngine"}
# Makers of engines that shard a model over ranks, by `placement.ROLE.engine`; imported where one is chosen.
ENGINES = {
    "fsdp": "verl.engines.fsdp:sharded_engine",
    "megatron": "verl.engines.megatron.build:megatron_engine",
}


def build_actor(
    codec: TextCodec, config: TrainerConfig, source: Source, parallel: ParallelConfig | None
) -> ActorWorker:
    """The policy; a loaded model is trained in place.

    Args:
        codec: its tokenizer.
        config: of the run.
        source: of the weights.
        parallel: how they are spread over the ranks of the pool; None: this process alone.
    """
    engine = build_train_engine(config, config.policy, source, apply_strategy_mapping(config, parallel))
    generator = _generator(config, source, codec)
    return ActorWorker(
        engine,
        Algorithm.bind(config.algorithm),
        codec,
        max_slots=config.rollout.max_slots,
        temperature=config.sampling.temperature,
        epochs=config.algorithm.epochs,
        chunk=config.policy.logits_chunk_tokens,
        generator=generator,
        hybrid=_hybrid(config, engine) if generator is None and not config.rollout.has_servers else None,
    )


def apply_strategy_mapping(config: TrainerConfig, parallel: ParallelConfig | None) -> ParallelConfig | None:
    """The sizes of the policy, with the engine of `strategy_mapping.training` if that is set."""
    repartition = config.hybrid_engine.actor_repartition
    training = repartition.strategy_mapping.training
    if parallel is None or not repartition.enabled or training in ("auto", parallel.engine.name):
        return parallel
    return parallel.model_copy(update={"engine": Choice(name=training)})


def _hybrid(config: TrainerConfig, engine: TrainEngine) -> HybridEngine | None:
    """The policy in a generation layout, if one is configured or the training layout can't generate."""
    wanted = config.hybrid_engine.actor_repartition
    if not wanted.enabled and engine.can_generate:
        return None
    if (num_ranks := dist.get_world_size() if dist.is_initialized() else 1) != engine.mesh.num_ranks:
        raise ValueError(
            f"need an engine whose `mesh` says how its {num_ranks} ranks hold the weights, got {engine.mesh} "
            f"of {type(engine).__name__}"
        )
    tensor = wanted.tensor or default_tensor_size(engine.config, engine.mesh)
    if num_ranks == 1 and tensor > 1:
        raise ValueError(
            f"need hybrid_engine.actor_repartition.tensor=1 on one device, got {tensor}; place the policy on "
            "several"
        )
    if has_equal_layout(engine, tensor):
        return None
    return HybridEngine(
        engine, tensor=tensor, precision=config.policy.precision, overlap=wanted.communication_overlap
    )


def _generator(config: TrainerConfig, source: Source, codec: TextCodec) -> ColocatedEngine | None:
    """The chosen engine in the processes of the policy with a separate copy of the weights, if any."""
    rollout = config.rollout
    if rollout.engine not in IN_PROCESS or config.rollout.has_servers:
        return None
    module, _, name = IN_PROCESS[rollout.engine].partition(":")
    folder = source if isinstance(source, str) else source.config.name_or_path
    dtype = str(PRECISIONS[config.policy.precision]).removeprefix("torch.")
    try:
        made = vars(importlib.import_module(module))[name]
    except ImportError as error:
        raise ValueError(
            f"need {rollout.engine} in this environment, or rollout.servers and rollout.python of another: "
            f"{error}"
        ) from error
    engine: ColocatedEngine = made(
        folder, codec, options=rollout.engine_options.values, dtype=dtype, max_slots=rollout.max_slots
    )
    return engine


def build_critic(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> Learner:
    """The critic: a value model, or a process reward model if the algorithm reads one.

    It gets a copy of a loaded model.
    """
    algorithm, role = Algorithm.bind(config.algorithm), config.critic
    is_prm = "prm_logprobs" in algorithm.reads
    engine = build_train_engine(config, role, _own(source), parallel, kind="policy" if is_prm else "value")
    if not is_prm:
        return CriticWorker(engine, algorithm, vf_coef=role.vf_coef, epochs=config.algorithm.epochs)
    temperature, chunk = config.sampling.temperature, role.logits_chunk_tokens
    return ProcessRewardWorker(
        engine, algorithm, temperature=temperature, epochs=config.algorithm.epochs, chunk=chunk
    )


def build_reference(
    config: TrainerConfig, source: Source, parallel: ParallelConfig | None
) -> ReferenceWorker:
    """The reference policy of the KL; it gets a copy of a loaded model."""
    engine = build_forward_engine(config, _own(source), parallel)
    return ReferenceWorker(
        engine, temperature=config.sampling.temperature, chunk=config.policy.logits_chunk_tokens
    )


def build_teacher(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> TeacherWorker:
    """The model to distil from."""
    engine = build_forward_engine(config, _own(source), parallel)
    chunk, temperature = config.policy.logits_chunk_tokens, config.sampling.temperature
    return TeacherWorker(engine, temperature=temperature, chunk=chunk, top_k=teacher_top_k(config))


def build_reward_model(
    config: TrainerConfig, source: Source, parallel: ParallelConfig | None
) -> RewardWorker:
    """The reward model of the reward function `model`, on its own ranks."""
    assert parallel is not None, "in this process the reward function loads it itself"
    options = reward_model_options(config)
    role = RoleConfig(precision=options.get("precision", "fp32"))
    return RewardWorker(shard_engine(config, source, parallel, kind="reward", role=role, updates=None))


def reward_model_options(config: TrainerConfig) -> dict[str, Any]:
    """Options of the reward function `model`; empty if it is not chosen.

    Raises:
        ValueError: it is chosen twice, or without a path.
    """
    chosen = [choice.options for choice in config.rewards.functions if choice.name == "model"]
    if len(chosen) > 1 or any(not options.get("path") for options in chosen):
        raise ValueError(
            "need one reward model with a path, {name: model, path: FOLDER}, to place it on devices; see "
            "rewards.functions"
        )
    return chosen[0] if chosen else {}


def teacher_top_k(config: TrainerConfig) -> int:
    """Number of most likely tokens whose logprobs a chosen function reads."""
    reads_top = any("k" in COLUMNS[name].axes for name in Algorithm.bind(config.algorithm).reads)
    return config.teacher.top_k if reads_top else 0


def total_updates(config: TrainerConfig) -> int:
    """Optimizer updates of the whole run."""
    return config.steps * config.algorithm.epochs * config.algorithm.minibatches


def saved(model: PreTrainedModel, folder: Path) -> str:
    """Write a loaded model for ranks of other processes; returns its folder."""
    save_transformer(model, folder)
    return str(folder)


def _own(source: Source) -> Source:
    # Two optimizers on one storage would undo each other's steps, and a reference would follow the policy.
    return source if isinstance(source, str) else copy.deepcopy(source)


def build_train_engine(
    config: TrainerConfig,
    role: RoleConfig,
    source: Source,
    parallel: ParallelConfig | None,
    *,
    kind: Kind = "policy",
) -> TrainEngine:
    """The engine of a model that learns."""
    device, updates = pick_device(config.device), total_updates(config)
    if parallel is not None:
        engine = shard_engine(config, source, parallel, kind=kind, role=role, updates=updates)
        assert isinstance(engine, TrainEngine), f"{parallel.engine.name} was to give a TrainEngine"
        return engine
    return LocalEngine(_model(source, kind, role).to(device), role, device=device, total_updates=updates)


def build_forward_engine(
    config: TrainerConfig, source: Source, parallel: ParallelConfig | None
) -> ForwardEngine:
    """Engine of a language model that does not learn, with the precision and packing of the policy."""
    device = pick_device(config.device)
    if parallel is not None:
        return shard_engine(config, source, parallel, kind="policy", role=config.policy, updates=None)
    return LocalForwardEngine(
        _model(source, "policy", config.policy).requires_grad_(False), config.policy, device=device
    )


def shard_engine(
    config: TrainerConfig,
    source: Source,
    parallel: ParallelConfig,
    *,
    kind: str,
    role: RoleConfig,
    updates: int | None,
) -> ForwardEngine:
    """Engine of a model that is sharded over the ranks of its pool, by the chosen library."""
    engine: ForwardEngine = engine_maker(parallel.engine.name)(
        _path(source), kind, role, parallel, device=pick_device(config.device), total_updates=updates
    )
    return engine


def engine_maker(name: str) -> Callable[..., ForwardEngine]:
    """Maker of an engine, by its name in `ENGINES` or as "package.module:function".

    Its parameters are those of `verl.engines.fsdp.sharded_engine`.

    Raises:
        ValueError: there is none, or its library is not installed.
    """
    module, colon, attribute = ENGINES.get(name, name).partition(":")
    try:
        found = vars(importlib.import_module(module))[attribute] if colon else None
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"cannot load the engine {name} of placement: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"need an engine of {', '.join(ENGINES)}, or package.module:function, got {name!r}")
    return found


def _model(source: Source, kind: Kind, role: RoleConfig) -> Backbone:
    transformer = load_language_model(source) if isinstance(source, str) else source.float()
    model = (
        value_model(transformer, role.precision)
        if kind == "value"
        else PolicyModel(transformer, role.precision)
    )
    model.check_forward()
    return model


def _path(source: Source) -> str:
    assert isinstance(source, str), "a loaded model is saved before it is spread over processes"
    return source
