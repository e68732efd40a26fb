"""A tiny policy, saved for servers to start from, and pools of real servers that sync its weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_codec
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.roles import LoraConfig, OptimizerConfig, RoleConfig
from verl.controller.worker_group import LocalGroup, LocalPool
from verl.engines.hf.models import PolicyModel
from verl.engines.local import LocalEngine
from verl.rollout.actor_worker import ActorWorker
from verl.rollout.group_sampling import sample_groups
from verl.rollout.inference_server import ServerSpec
from verl.rollout.pool.supervisor import MakeEngine
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.rollout.server.embedded_server import EmbeddedServer
from verl.utils.sampling_types import Completion, RolloutEngine, SamplingParams

CPU = torch.device("cpu")


def saved(policy: PolicyModel, folder: Path) -> str:
    """Save a policy with the character tokenizer; return the folder."""
    policy.transformer.save_pretrained(folder)
    tiny_codec().tokenizer.save_pretrained(folder)
    return str(folder)


def group_of(policy: PolicyModel, *, lora_rank: int = 0, device: torch.device = CPU) -> LocalGroup:
    """The policy as a worker group of one rank, this process."""
    config = RoleConfig(optimizer=OptimizerConfig(lr=1e-2), lora=LoraConfig(rank=lora_rank))
    engine = LocalEngine(policy, config, device=device, total_updates=100)
    options: dict[str, Any] = {"max_slots": 8, "temperature": 1.0, "epochs": 1, "chunk": 100}
    return LocalPool().start(
        "policy", lambda: ActorWorker(engine, Algorithm.bind(AlgorithmConfig()), tiny_codec(), **options)
    )


def specs(model: str, folder: Path, count: int, **options: Any) -> list[ServerSpec]:
    """Specs of servers to start."""
    given = {"timeout_s": 20.0, **options}
    return [
        ServerSpec(f"engine-{i}", model, secret=f"secret-{i}", log=folder / f"engine-{i}.log", **given)
        for i in range(count)
    ]


def pool_of(
    group: LocalGroup | None,
    model: str,
    folder: Path,
    count: int,
    *,
    make: MakeEngine = EmbeddedServer,
    notes: list[str] | None = None,
    policy: PolicyModel | None = None,
    **options: Any,
) -> ThreadedInferencePool:
    """A pool of servers that sync the weights of a group; without a group they keep their own."""
    sizes = {
        "chunk_bytes": options.pop("chunk_bytes", 20_000),
        "uses_p2p": options.get("transport") == "direct",
        "uses_cuda_ipc": options.get("transport") == "ipc",
    }
    weights = WeightPublisher(group, "float32", folder / "weights", **sizes) if group else None
    policy = policy or group.worker.model
    return ThreadedInferencePool(
        specs(model, folder, count, **options),
        make,
        tiny_codec(),
        weights,
        vocabulary=policy.transformer.config.vocab_size,
        context=256,
        max_running=8,
        wait_s=60.0,
        note=(notes if notes is not None else []).append,
    )


@torch.no_grad()
def changed(policy: PolicyModel, seed: int) -> None:
    """Change every weight by random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.transformer.parameters():
        parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.device))


def own_logprobs(
    policy: PolicyModel, prompt: list[int], answer: list[int], temperature: float = 1.0
) -> list[float]:
    """Logprobs of an answer's tokens, by the model's own forward pass."""
    with torch.no_grad():
        logprobs = (
            policy.transformer(torch.tensor([[*prompt, *answer]])).logits[0].div(temperature).log_softmax(-1)
        )
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]


def generate(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[list[Completion]]:
    """Answers of an engine; syncs the weights first if necessary."""
    if engine.needs_weights:
        publish(engine, engine.version)
    return engine.run(sample_groups(engine, prompts, params))


def publish(engine: RolloutEngine, version: int) -> None:
    """Sync the weights of a version."""
    engine.run(engine.sync_weights(version))


def waited(condition: Callable[[], bool], limit_s: float = 30.0) -> bool:
    """Wait for a condition; False if it does not hold in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def in_background(pool: ThreadedInferencePool, *args: Any) -> tuple[threading.Thread, list[Any]]:
    """Call `generate` in a thread; also a list that will have its result or error."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(generate(pool, *args))
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, out


def started(pool: ThreadedInferencePool, least: int = 4) -> bool:
    """Wait until every engine has requests; False if one does not get any in time."""
    return waited(
        lambda: (
            sum(replica.incarnation.num_running for replica in pool.replicas) >= least
            and all(m.incarnation.num_running for m in pool.replicas)
        )
    )
