"""The engine that answers the prompts of a run: the policy itself, a user's worker, or a pool of servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from verl.algorithms.objective import Algorithm
from verl.config.run import TrainerConfig
from verl.engines.hf.families import context_length
from verl.engines.hf.hf_io import model_folder
from verl.engines.roles.weight_sender import PolicyWeightSender
from verl.monitoring.tracking import Clock
from verl.monitoring.wait_tracker import WaitTracker
from verl.rollout.actor_worker import PolicyGenerator
from verl.rollout.batching_engine import BatchingEngine
from verl.rollout.pool.admin_api import AdminAPI
from verl.rollout.pool.threaded_pool import ThreadedInferencePool
from verl.rollout.pool.weight_publisher import WeightPublisher
from verl.rollout.server_registry import SERVERS, server_class, server_spec, server_specs
from verl.rollout.text_worker import TextWorkerGenerator
from verl.rollout.vllm.options import check_context
from verl.trainer.build.role_groups import RoleGroups
from verl.trainer.build.worker_factories import IN_PROCESS, Source, saved
from verl.utils.device import PRECISIONS
from verl.utils.rollout import BaseRolloutWorker
from verl.utils.sampling_types import BatchGenerator, RolloutEngine
from verl.utils.tokens import TextCodec


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
            "a worker that answers in text gives no logprobs, but a chosen function reads "
            f"rollout_logprobs{remedy}"
        )
    if "greedy_rewards" in algorithm.reads:
        raise ValueError(
            "a worker that answers in text is not told a temperature, so it has no greedy answers; take the "
            "recipe rloo"
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
    """Build the engine that the settings choose.

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
    name = config.rollout.engine
    if config.policy.lora.is_on and (config.rollout.has_servers or name in IN_PROCESS):
        _check_tied(groups, name)
    if name == "vllm":
        check_context(groups.model_config, config.rollout.engine_options.values)
    if config.rollout.has_servers:
        return _build_pool(groups, str(model_folder(source)), codec, config, note=note)
    if name not in ("embedded", *IN_PROCESS):
        known = ", ".join(dict.fromkeys(("embedded", *IN_PROCESS, *SERVERS)))
        raise ValueError(
            f"need rollout.engine as one of {known}, or package.module:Class with servers, got {name!r}"
        )
    generator = PolicyGenerator(groups.policy, can_advance=name == "embedded")
    return BatchingEngine(generator, clock=clock, waits=waits)


def _build_pool(
    groups: RoleGroups,
    source: str,
    codec: TextCodec,
    config: TrainerConfig,
    *,
    note: Callable[[str], None],
) -> RolloutEngine:
    rollout, lora = config.rollout, config.policy.lora
    make = server_class(rollout.engine)
    enables_lora = rollout.engine_options.values.get("enable_lora")
    sends_adapter = lora.is_on and groups.policy.call(PolicyWeightSender.trains_lora_only).result()
    if sends_adapter and rollout.engine in ("vllm", "sglang") and not enables_lora:
        raise ValueError(
            f"need rollout.engine_options.enable_lora true, and max_lora_rank of at least the adapter's, for "
            f"servers of {rollout.engine} that follow policy.lora"
        )
    dtype = str(PRECISIONS[config.policy.precision]).removeprefix("torch.")
    text, folder = groups.model_config.get_text_config(), Path(config.output_dir)
    weights = WeightPublisher(
        groups.policy,
        dtype,
        folder / "weights",
        uses_p2p=rollout.weights_via == "direct",
        uses_cuda_ipc=rollout.weights_via == "ipc",
    )
    pool = ThreadedInferencePool(
        server_specs(config, source, dtype),
        make,
        codec,
        weights if make.syncs_weights else None,
        vocabulary=text.vocab_size,
        context=context_length(groups.model_config),
        max_running=rollout.max_slots,
        sleeps=rollout.servers_sleep,
        on_update=rollout.on_update,
        note=note,
    )
    try:
        return AdminAPI(
            pool,
            folder,
            new_spec=lambda name, address: server_spec(config, source, dtype, name=name, address=address),
        )
    except BaseException:
        pool.close()
        raise


def _check_tied(groups: RoleGroups, engine: str) -> None:
    """Refuse adapters that untie the embeddings of a model, which the engines load as tied.

    Raises:
        ValueError: it is so.
    """
    if groups.policy.call(PolicyWeightSender.unties_embeddings).result():
        raise ValueError(
            f"need equal input and output embeddings for rollout.engine {engine}, which loads them as one, "
            "but an adapter changes one of the two; leave lm_head and embed_tokens out of "
            "policy.lora.targets and modules_to_save, or generate with rollout.engine=embedded"
        )


def pool_of(rollout: RolloutEngine) -> ThreadedInferencePool | None:
    """The pool of engines beside training, if there is one."""
    inner = rollout.pool if isinstance(rollout, AdminAPI) else rollout
    return inner if isinstance(inner, ThreadedInferencePool) else None


def initial_checkpoint(config: TrainerConfig, source: Source, codec: TextCodec) -> str:
    """Folder or hub name of the model that servers start from; a loaded model is saved first.

    Later a LoRA adapter may be put into it.
    """
    if isinstance(source, str) or not config.rollout.has_servers:
        return source if isinstance(source, str) else ""
    folder = Path(config.output_dir) / "start" / "engines"
    codec.tokenizer.save_pretrained(folder)
    return saved(source, folder)
