"""What a rank of each role is made of: its model, its engine, its worker; called where the rank is."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from verl.algorithms.compose import Algorithm
from verl.engines.base import ForwardEngine, TrainEngine
from verl.engines.fsdp import sharded_engine
from verl.engines.local import LocalEngine, LocalForwardEngine
from verl.engines.models import Backbone, PolicyModel, load_language_model, value_model
from verl.engines.workers import CriticWorker, Learner, ProcessRewardWorker, ReferenceWorker, TeacherWorker
from verl.rewards.model import RewardWorker
from verl.rollout.actor import ActorWorker
from verl.rollout.engine import OwnWeightsEngine
from verl.settings import ParallelConfig, RoleConfig, TrainerConfig
from verl.utils.device import PRECISIONS, pick_device
from verl.utils.tokens import TextCodec

# A folder or hub name; or, in this process, a loaded model.
Source = str | PreTrainedModel
Kind = Literal["policy", "value"]
# Engines in the processes of the policy that have weights of their own.
IN_PROCESS = {"vllm": "verl.rollout.vllm_local:VLLMEngine"}
_TEACHER_TOP = {"teacher_top_logprobs", "top_logprobs"}


def actor(codec: TextCodec, config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> ActorWorker:
    """The policy; a loaded model is trained in place.

    Args:
        codec: its tokenizer.
        config: of the run.
        source: of the weights.
        parallel: how they are spread over the ranks of the pool; None: this process alone.
    """
    engine = _trained(config, config.policy, source, parallel)
    return ActorWorker(
        engine,
        Algorithm.bind(config.algorithm),
        codec,
        max_slots=config.rollout.max_slots,
        temperature=config.sampling.temperature,
        epochs=config.algorithm.epochs,
        chunk=config.policy.logits_chunk_tokens,
        generator=_generator(config, source, codec),
    )


def _generator(config: TrainerConfig, source: Source, codec: TextCodec) -> OwnWeightsEngine | None:
    """An engine with weights of its own in the processes of the policy, if one is chosen."""
    rollout = config.rollout
    if rollout.engine not in IN_PROCESS or rollout.servers or rollout.addresses:
        return None
    module, _, name = IN_PROCESS[rollout.engine].partition(":")
    folder = source if isinstance(source, str) else source.config.name_or_path
    dtype = str(PRECISIONS[config.policy.precision]).removeprefix("torch.")
    try:
        made = vars(importlib.import_module(module))[name]
    except ImportError as error:
        raise ValueError(f"need {rollout.engine} in this environment, or rollout.servers and rollout.python of another: {error}") from error
    engine: OwnWeightsEngine = made(folder, codec, options=rollout.engine_options.values, dtype=dtype, max_slots=rollout.max_slots)
    return engine


def critic(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> Learner:
    """The learned judge of tokens: a value model, or a process reward model if the algorithm reads one; its own copy of a loaded model."""
    algorithm, role = Algorithm.bind(config.algorithm), config.critic
    is_prm = "prm_logprobs" in algorithm.reads
    engine = _trained(config, role, _own(source), parallel, kind="policy" if is_prm else "value")
    if not is_prm:
        return CriticWorker(engine, algorithm, vf_coef=role.vf_coef, epochs=config.algorithm.epochs)
    temperature, chunk = config.sampling.temperature, role.logits_chunk_tokens
    return ProcessRewardWorker(engine, algorithm, temperature=temperature, epochs=config.algorithm.epochs, chunk=chunk)


def reference(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> ReferenceWorker:
    """The policy that must not be left; its own copy of a loaded model."""
    engine = _read(config, _own(source), parallel)
    return ReferenceWorker(engine, temperature=config.sampling.temperature, chunk=config.policy.logits_chunk_tokens)


def teacher(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> TeacherWorker:
    """The model to distil from."""
    engine = _read(config, _own(source), parallel)
    chunk, temperature = config.policy.logits_chunk_tokens, config.sampling.temperature
    return TeacherWorker(engine, temperature=temperature, chunk=chunk, top_k=teacher_top_k(config))


def reward_model(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> RewardWorker:
    """The reward model that the reward function `model` asks, on ranks of its own."""
    assert parallel is not None, "in this process the reward function loads it itself"
    options = reward_model_options(config)
    role = RoleConfig(precision=options.get("precision", "fp32"))
    return RewardWorker(sharded_engine(_path(source), "reward", role, parallel, device=pick_device(config.device), total_updates=None))


def reward_model_options(config: TrainerConfig) -> dict[str, Any]:
    """Options of the reward function `model`; none if it is not chosen.

    Raises:
        ValueError: it is chosen twice, or without a path.
    """
    chosen = [choice.options for choice in config.rewards.functions if choice.name == "model"]
    if len(chosen) > 1 or any(not options.get("path") for options in chosen):
        raise ValueError("need one reward model with a path, {name: model, path: FOLDER}, to place it on devices; see rewards.functions")
    return chosen[0] if chosen else {}


def teacher_top_k(config: TrainerConfig) -> int:
    """Most likely tokens whose logprobs a chosen function reads."""
    return config.teacher.top_k if _TEACHER_TOP & Algorithm.bind(config.algorithm).reads else 0


def total_updates(config: TrainerConfig) -> int:
    """Optimizer updates of the whole run."""
    return config.steps * config.algorithm.epochs * config.algorithm.minibatches


def saved(model: PreTrainedModel, folder: Path) -> str:
    """The folder that a loaded model was written into, for ranks of other processes to read."""
    model.save_pretrained(folder)
    return str(folder)


def _own(source: Source) -> Source:
    # Two optimizers on one storage would undo each other's steps, and a reference would follow the policy.
    return source if isinstance(source, str) else copy.deepcopy(source)


def _trained(
    config: TrainerConfig, role: RoleConfig, source: Source, parallel: ParallelConfig | None, *, kind: Kind = "policy"
) -> TrainEngine:
    """The engine of a model that learns."""
    device, updates = pick_device(config.device), total_updates(config)
    if parallel is not None:
        engine = sharded_engine(_path(source), kind, role, parallel, device=device, total_updates=updates)
        assert isinstance(engine, TrainEngine)
        return engine
    return LocalEngine(_model(source, kind, role).to(device), role, device=device, total_updates=updates)


def _read(config: TrainerConfig, source: Source, parallel: ParallelConfig | None) -> ForwardEngine:
    """The engine of a language model that is only read, with the precision and packing of the policy."""
    device = pick_device(config.device)
    if parallel is not None:
        return sharded_engine(_path(source), "policy", config.policy, parallel, device=device, total_updates=None)
    return LocalForwardEngine(_model(source, "policy", config.policy).requires_grad_(False), config.policy, device=device)


def _model(source: Source, kind: Kind, role: RoleConfig) -> Backbone:
    transformer = load_language_model(source) if isinstance(source, str) else source.float()
    model = value_model(transformer, role.precision) if kind == "value" else PolicyModel(transformer, role.precision)
    model.check_forward()
    return model


def _path(source: Source) -> str:
    assert isinstance(source, str), "a loaded model is saved before it is spread over processes"
    return source
