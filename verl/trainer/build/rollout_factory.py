"""Which engine answers the prompts of a run: the policy itself, a user's worker, or a pool of servers that
follow it.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from verl.algorithms.objective import Algorithm
from verl.config.rollout import RolloutConfig
from verl.config.run import TrainerConfig
from verl.engines.hf.hf_io import model_folder
from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.actor_worker import PolicyGenerator
from verl.rollout.batching_engine import BatchingEngine
from verl.rollout.engine import InferenceServer, ServerSpec
from verl.rollout.pool.admin_api import AdminAPI
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.rollout.text_worker import TextWorkerGenerator
from verl.trainer.build.role_groups import RoleGroups
from verl.trainer.build.worker_factories import IN_PROCESS, Source, saved
from verl.utils.device import PRECISIONS
from verl.utils.rollout import BaseRolloutWorker
from verl.utils.sampling_types import BatchGenerator, RolloutEngine
from verl.utils.tokens import TextCodec
from verl.weight_sync.types import Transport

# Engines in other processes, loaded where one is chosen.
SERVED = {
    "vllm": "verl.rollout.vllm.server:VLLMServer",
    "sglang": "verl.rollout.sglang.server:SGLangServer",
    "served": "verl.rollout.server.embedded_server:EmbeddedServer",
    "http": "verl.rollout.openai_engine:HTTPEngine",
}


def wrap_user_rollout(
    given: RolloutEngine | BatchGenerator | BaseRolloutWorker,
    algorithm: Algorithm,
    codec: TextCodec,
    *,
    clock: Clock,
    waits: WaitTracker,
) -> RolloutEngine:
    """A user's own engine, batch generator, or worker that answers in text, as an engine.

    Raises:
        ValueError: the algorithm reads what such a worker does not give.
    """
    if isinstance(given, RolloutEngine):
        return given
    if isinstance(given, BatchGenerator):
        return BatchingEngine(given, in_thread=True, clock=clock, waits=waits)
    if "rollout_logprobs" in algorithm.reads:
        remedy = "; set algorithm.correction=recompute and a policy loss that does not read them"
        raise ValueError(
            f"a worker that answers in text gives no logprobs, but a chosen function reads rollout_logprobs{remedy}"
        )
    if "greedy_rewards" in algorithm.reads:
        raise ValueError(
            "a worker that answers in text is not told a temperature, so it has no greedy answers; take the recipe rloo"
        )
    return BatchingEngine(TextWorkerGenerator(given, codec), in_thread=True, clock=clock, waits=waits)


def build_rollout(
    groups: RoleGroups,
    source: str,
    codec: TextCodec,
    config: TrainerConfig,
    *,
    note: Callable[[str], None],
    clock: Clock,
    waits: WaitTracker,
) -> RolloutEngine:
    """The engine that the settings choose.

    Args:
        groups: of the run; the policy's ranks generate, or send their weights.
        source: folder of the policy as it was at the start.
        codec: its tokenizer.
        config: of the run.
        note: takes human-readable lines on what happens to engines.
        clock: takes the seconds of generation, in turn with training.
        waits: takes the waits for it.

    Raises:
        ValueError: no such engine, or options that it does not have.
        EngineError: no server starts.
    """
    rollout, policy = config.rollout, groups.policy
    if not rollout.servers and not rollout.addresses:
        if rollout.engine not in ("embedded", *IN_PROCESS):
            known = ", ".join(dict.fromkeys(("embedded", *IN_PROCESS, *SERVED)))
            raise ValueError(
                f"need rollout.engine as one of {known}, or package.module:Class with servers, got {rollout.engine!r}"
            )
        return BatchingEngine(PolicyGenerator(policy), clock=clock, waits=waits)
    make, source = engine_class(rollout.engine), str(model_folder(source))
    if (
        config.policy.lora.rank
        and rollout.engine in ("vllm", "sglang")
        and not rollout.engine_options.values.get("enable_lora")
    ):
        raise ValueError(
            f"need rollout.engine_options.enable_lora true, and max_lora_rank of at least {config.policy.lora.rank}, for servers of "
            f"{rollout.engine} that follow policy.lora"
        )
    dtype = str(PRECISIONS[config.policy.precision]).removeprefix("torch.")
    text = groups.model_config.get_text_config()
    ways = {"uses_p2p": rollout.weights_via == "direct", "uses_cuda_ipc": rollout.weights_via == "ipc"}
    weights = WeightPublisher(policy, dtype, Path(config.output_dir) / "weights", **ways)
    pool = ThreadedInferencePool(
        engine_specs(config, source, dtype),
        make,
        codec,
        weights if make.syncs_weights else None,
        vocabulary=text.vocab_size,
        context=text.max_position_embeddings,
        max_running=rollout.max_slots,
        sleeps=rollout.servers_sleep,
        on_update=rollout.on_update,
        note=note,
    )
    try:
        return AdminAPI(
            pool,
            Path(config.output_dir),
            new_spec=lambda name, address: _spec(config, source, dtype, name, address),
        )
    except BaseException:
        pool.close()
        raise


def pool_of(rollout: RolloutEngine) -> ThreadedInferencePool | None:
    """The engines beside training, if there are such."""
    inner = rollout.pool if isinstance(rollout, AdminAPI) else rollout
    return inner if isinstance(inner, ThreadedInferencePool) else None


def engine_class(name: str) -> type[InferenceServer]:
    """The class of an engine by its name in `SERVED`, or as "package.module:Class".

    Raises:
        ValueError: there is none.
    """
    module, colon, attribute = SERVED.get(name, name).partition(":")
    try:
        found = vars(importlib.import_module(module))[attribute] if colon else None
    except (ImportError, KeyError) as error:
        raise ValueError(f"cannot load rollout.engine {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, InferenceServer)):
        raise ValueError(
            f"need rollout.engine as one of {', '.join(SERVED)}, or package.module:Class of a ServedEngine, got {name!r}"
        )
    return found


def engine_specs(config: TrainerConfig, source: str, dtype: str) -> list[ServerSpec]:
    """The engines that a run begins with."""
    rollout = config.rollout
    joined = [
        _spec(config, source, dtype, f"{rollout.engine}-at-{i}", address)
        for i, address in enumerate(rollout.addresses)
    ]
    return joined + [
        _spec(config, source, dtype, f"{rollout.engine}-{i}", None) for i in range(rollout.servers)
    ]


# What the settings of a run say in an engine's own words.
_OWN_OPTIONS: dict[str, Callable[[RolloutConfig], dict[str, Any]]] = {
    "served": lambda rollout: {"max_slots": rollout.max_slots}
}


def initial_checkpoint(config: TrainerConfig, source: Source, codec: TextCodec) -> str:
    """The model that servers start from: a folder or hub name; a loaded model is saved first, as they add
    low-rank additions to it.
    """
    if isinstance(source, str) or not (config.rollout.servers or config.rollout.addresses):
        return source if isinstance(source, str) else ""
    folder = Path(config.output_dir) / "start" / "engines"
    codec.tokenizer.save_pretrained(folder)
    return saved(source, folder)


def check_mismatch(metrics: Mapping[str, float], config: RolloutConfig) -> list[str]:
    """What to say of the difference between sampler and trainer in a step.

    Raises:
        RuntimeError: it is above `rollout.mismatch_stop`.
    """
    if "kl_sampler" not in metrics:
        return []
    kl = metrics["kl_sampler"]
    told = (
        f"sampler and trainer differ: KL {kl:.3g} nats per token, logprobs by {metrics.get('sampler_gap', kl):.3g} on average and at most "
        f"{metrics.get('sampler_gap_max', kl):.3g}; compare their weights, precision and sampling parameters, or take a correction such as "
        "token_tis"
    )
    if config.mismatch_stop is not None and not kl <= config.mismatch_stop:
        raise RuntimeError(f"{told}; the limit rollout.mismatch_stop is {config.mismatch_stop}")
    return [] if kl <= config.mismatch_warn else [told]


def _spec(config: TrainerConfig, source: str, dtype: str, name: str, address: str | None) -> ServerSpec:
    rollout = config.rollout
    via: dict[str, Transport] = {
        "shm": "shm",
        "group": "group",
        "disk": "disk",
        "direct": "direct",
        "ipc": "ipc",
    }
    return ServerSpec(
        name,
        source,
        {**_OWN_OPTIONS.get(rollout.engine, lambda _: {})(rollout), **rollout.engine_options.values},
        address,
        rollout.python,
        secrets.token_hex(32) if address is None else os.environ.get(rollout.secret_env, ""),
        Path(config.output_dir) / "logs" / f"{name}.log",
        dtype,
        via.get(rollout.weights_via),
        rollout.timeout_s,
    )
