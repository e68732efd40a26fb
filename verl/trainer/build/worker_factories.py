"""Factories of the worker of each role: its model and its engine; they run in the process of the rank."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from verl.algorithms.objective import Algorithm
from verl.config.fields import Choice
from verl.config.placement import ParallelConfig
from verl.config.roles import LoraConfig, RoleConfig
from verl.config.run import TrainerConfig
from verl.controller.worker_group import LocalGroup, WorkerGroup
from verl.data.columns import COLUMNS
from verl.engines.base import ForwardEngine, TrainEngine
from verl.engines.hf.adapters import (
    adapter_at,
    add_adapter,
    is_same_model,
    merge_adapter,
    reference_on_base,
)
from verl.engines.hf.lora import CRITIC, POLICY, REFERENCE, has_lora
from verl.engines.hf.models import Backbone, PolicyModel, ValueModel
from verl.engines.hf.pretrained import (
    VALUE_HEAD,
    load_language_model,
    load_reward_model,
    load_value_head,
    quantization,
    save_transformer,
    value_model,
)
from verl.engines.local import LocalEngine, LocalForwardEngine
from verl.engines.roles.critic import CriticWorker
from verl.engines.roles.process_reward import ProcessRewardWorker
from verl.engines.roles.reference_policy import ReferenceWorker
from verl.engines.roles.role_worker import Learner, RoleWorker
from verl.engines.roles.teacher import TeacherWorker
from verl.rewards.model_scoring import RewardWorker
from verl.rollout.actor_worker import ActorWorker
from verl.rollout.embedded.hybrid_engine import HybridEngine, default_tensor_size, has_equal_layout
from verl.rollout.inference_server import ColocatedEngine
from verl.utils.device import PRECISIONS, pick_device
from verl.utils.hub import find_adapter, tokenizer_source
from verl.utils.tokens import TextCodec, load_tokenizer

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
    shares_base, adapter = reference_on_base(config.policy, config.reference)
    reads_reference = "ref_logprobs" in Algorithm.bind(config.algorithm).reads
    if parallel is None and adapter and shares_base and reads_reference:
        lora = LoraConfig(path=adapter)
        add_adapter(engine.model.transformer, lora, name=REFERENCE, trained=False)
    generator = _generator(config, source, codec)
    return ActorWorker(
        engine,
        Algorithm.bind(config.algorithm),
        codec,
        max_slots=config.rollout.max_slots,
        prefix_tokens=config.rollout.prefix_tokens,
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


def critic_shares_base(config: TrainerConfig, critic_source: Source | None) -> bool:
    """True if the critic is a second LoRA adapter on the frozen weights of the policy, in one process."""
    policy, critic = config.policy, config.critic
    is_same = critic.path is None or (policy.path is not None and is_same_model(critic.path, policy.path))
    has_own_head = critic.path is not None and (Path(critic.path) / VALUE_HEAD).exists()
    return (
        config.placement.name == "local"
        and policy.lora.is_on
        and critic.lora.is_on
        and critic_source is None
        and is_same
        and not has_own_head
        # One stack of layers has one way to compute.
        and policy.gradient_checkpointing == critic.gradient_checkpointing
        and policy.lora.quantize == critic.lora.quantize
    )


def build_critic_adapter(
    policy: WorkerGroup, config: TrainerConfig, source: Source, parallel: ParallelConfig | None
) -> Learner:
    """The critic as a second adapter on the transformer of the policy, which has been started."""
    assert parallel is None and isinstance(policy, LocalGroup) and isinstance(policy.worker, RoleWorker)
    return _critic(config, policy.worker.engine.model.transformer, None, adapter=CRITIC)


def build_critic(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> Learner:
    """The critic: a value model, or a process reward model if the algorithm reads one.

    It gets a copy of a loaded model.
    """
    return _critic(config, _own(source), parallel)


def _critic(
    config: TrainerConfig, source: Source, parallel: ParallelConfig | None, *, adapter: str = POLICY
) -> Learner:
    algorithm, role = Algorithm.bind(config.algorithm), config.critic
    is_prm = "prm_logprobs" in algorithm.reads
    engine = build_train_engine(
        config, role, source, parallel, kind="policy" if is_prm else "value", adapter=adapter
    )
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


def plain_folder(source: Source, folder: Path, *, is_reward_model: bool = False) -> str:
    """Folder or hub name of a model for ranks of other processes; one that is not whole there is written."""
    if not isinstance(source, str):
        return saved(source, folder)
    if find_adapter(source) is None:
        return source
    model = load_reward_model(source, new_head=False) if is_reward_model else load_language_model(source)
    load_tokenizer(tokenizer_source(source)).save_pretrained(folder)
    return saved(model, folder)


def plain_source(config: TrainerConfig, source: Source) -> Source:
    """The policy as other processes can load it: an adapter is merged into its base and written."""
    is_alone = config.placement.name == "local" and config.rollout.engine == "embedded"
    if not isinstance(source, str) or (is_alone and not config.rollout.has_servers):
        return source
    return plain_folder(source, Path(config.output_dir) / "start" / "policy")


def with_adapter(source: Source, adapter: str) -> PreTrainedModel:
    """A model with an adapter merged; of a loaded model a copy."""
    model = load_language_model(source) if isinstance(source, str) else copy.deepcopy(source)
    return merge_adapter(model, adapter_at(adapter))


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
    adapter: str = POLICY,
) -> TrainEngine:
    """The engine of a model that learns, with a LoRA adapter of that name if it has one."""
    device, updates = pick_device(config.device), total_updates(config)
    if parallel is not None:
        engine = shard_engine(config, source, parallel, kind=kind, role=role, updates=updates)
        assert isinstance(engine, TrainEngine), f"{parallel.engine.name} was to give a TrainEngine"
        return engine
    model = _model(source, kind, role, device, learns=True).to(device)
    return LocalEngine(model, role, device=device, total_updates=updates, adapter=adapter)


def build_forward_engine(
    config: TrainerConfig, source: Source, parallel: ParallelConfig | None
) -> ForwardEngine:
    """Engine of a language model that does not learn, with the precision and packing of the policy."""
    device = pick_device(config.device)
    if parallel is not None:
        return shard_engine(config, source, parallel, kind="policy", role=config.policy, updates=None)
    model = _model(source, "policy", config.policy, device).requires_grad_(False)
    return LocalForwardEngine(model, config.policy, device=device)


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


def _model(
    source: Source, kind: Kind, role: RoleConfig, device: torch.device, *, learns: bool = False
) -> Backbone:
    options = quantization(role.lora, role.precision, device) if learns else {}
    if isinstance(source, str):
        transformer = load_language_model(source, **options)
    else:
        # One that is shared with the policy may be quantized, and is fp32 elsewhere already.
        transformer = source if has_lora(source) else source.float()
    make: Callable[..., Backbone] = PolicyModel if kind == "policy" else value_model
    model = make(transformer, role.precision)
    if isinstance(model, ValueModel) and isinstance(source, str):
        load_value_head(model, source)
    model.check_forward()
    return model


def _path(source: Source) -> str:
    assert isinstance(source, str), "a loaded model is saved before it is spread over processes"
    return source
