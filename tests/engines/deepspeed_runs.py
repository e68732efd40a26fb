"""Programs of the ranks in the tests of the DeepSpeed example: the updates of one process, on own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from examples.deepspeed_engine import deepspeed_engine
from tests.engines.sharded_runs import CPU, algorithm_of, answered, role_config, steps, worker_on
from tests.tiny import tiny_codec
from tests.training import rows_to_learn
from verl.config.fields import Choice
from verl.config.placement import ParallelConfig
from verl.controller.dispatch import split_by_plan
from verl.data.packing import balance
from verl.engines.minibatches import write_loss_weights
from verl.engines.roles.reference_policy import ReferenceWorker
from verl.rollout.actor_worker import ActorWorker
from verl.rollout.embedded.hybrid_engine import HybridEngine
from verl.weight_sync.reshard_exchange import local_view

# Else DeepSpeed keeps tensors as small as those of the tests whole on each rank.
DIVIDED = {"stage3_param_persistence_threshold": 0}


def engine_on(source: str, case: dict[str, Any], total_updates: int | None = 100) -> Any:
    parallel = ParallelConfig(
        engine=Choice(name="examples.deepspeed_engine:deepspeed_engine", **case.get("options", DIVIDED))
    )
    return deepspeed_engine(
        source,
        case.get("kind", "policy"),
        role_config(case),
        parallel,
        device=CPU,
        total_updates=total_updates,
    )


def run_cases(source: str, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: run_case(source, case) for name, case in cases.items()}


def run_case(source: str, case: dict[str, Any]) -> dict[str, Any]:
    """Five steps, then weights, and logprobs of the rows of this rank."""
    engine = engine_on(source, case)
    worker, rank = worker_on(engine, case), dist.get_rank()
    history = steps(worker, 2, case, rank)
    batch = rows_to_learn(with_padding=True)
    own, plan = split_by_plan((batch, balance(batch.num_tokens, num_ranks=2, micro_batch_tokens=8)), 2)[rank]
    written = worker.write(own, plan)
    rows = {int(row): written.ragged(written.names[0]).row(i) for i, row in enumerate(own.row_ids)}
    weights = dict(engine.full_tensors())
    tensors = engine.local_tensors()
    for shard in engine.local_shards():
        part = local_view(tensors[shard.local_name], shard.bounds, shard.offset)
        torch.testing.assert_close(
            part, weights[shard.name][tuple(slice(*bound) for bound in shard.bounds)], rtol=0, atol=0
        )
    held = sum(tensor.numel() for tensor in tensors.values())
    return {"history": history, "written": rows, "weights": weights, "shapes": engine.shapes(), "held": held}


def generate_and_go_on(source: str, folder: str, prompts: list[list[int]]) -> dict[str, Any]:
    """Steps with answers between them, one skipped; a checkpoint, an export, answers of a resharded copy."""
    engine, rank = engine_on(source, {}), dist.get_rank()
    actor = ActorWorker(
        engine, algorithm_of({}), tiny_codec(), max_slots=8, temperature=1.0, epochs=1, chunk=100
    )
    out: dict[str, Any] = {"before": steps(actor, 2, {}, rank, updates=1)}
    # One rank has more to answer than the other.
    out["answers"] = answered(actor, prompts[: 2 * rank + 1])
    out["bad"] = bad_step(actor, rank)
    wait = engine.save(Path(folder) / "checkpoint")
    engine.export(Path(folder) / "exported")
    out["weights"] = dict(engine.full_tensors())
    out["after"] = steps(actor, 2, {}, rank, updates=1)
    wait()
    hybrid = HybridEngine(engine, tensor=2, precision="fp32")
    switched = ActorWorker(
        engine,
        algorithm_of({}),
        tiny_codec(),
        max_slots=8,
        temperature=1.0,
        epochs=1,
        chunk=100,
        hybrid=hybrid,
    )
    out["switched"] = answered(switched, prompts)
    out["reference"] = reference(source, rank)
    return out


def reference(source: str, rank: int) -> dict[int, torch.Tensor]:
    """Logprobs of the rows of a rank by a model that is not trained."""
    frozen, batch = engine_on(source, {}, total_updates=None), rows_to_learn(with_padding=True)
    own, plan = split_by_plan((batch, balance(batch.num_tokens, num_ranks=2, micro_batch_tokens=8)), 2)[rank]
    written = ReferenceWorker(frozen, temperature=1.0, chunk=3).write(own, plan)
    return {int(row): written.ragged("ref_logprobs").row(i) for i, row in enumerate(own.row_ids)}


def bad_step(worker: Any, rank: int) -> dict[str, float]:
    batch = rows_to_learn(with_padding=True)
    batch.write("advantages", torch.where(torch.arange(6)[:, None] == 3, torch.nan, batch["advantages"]))
    plan = balance(batch.num_tokens, num_ranks=2, micro_batch_tokens=8)
    write_loss_weights(batch, plan, algorithm_of({}))
    return worker.update(*split_by_plan((batch, plan), 2)[rank], 0.0)


def load_at(source: str, folder: str) -> list[dict[str, float]]:
    """The step after the checkpoint, of an engine that keeps small tensors whole."""
    engine = engine_on(source, {"options": {}})
    engine.load(Path(folder) / "checkpoint")
    with engine.unsharded_weights():
        pass
    return steps(worker_on(engine, {}), dist.get_world_size(), {}, dist.get_rank(), updates=1)
