"""The work of each rank in the tests of the Megatron-Core engine: the updates of one process, on its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.engines.sharded_runs import CPU, algorithm_of, role_config, steps, stream_case, worker_on
from tests.training import rows_to_learn
from verl.config.placement import ParallelConfig
from verl.controller.dispatch import split_by_plan
from verl.data.packing import balance
from verl.engines.base import NotFiniteError
from verl.engines.megatron.build import megatron_engine
from verl.engines.minibatches import write_loss_weights

UPDATES = 2


def engine_on(case: dict[str, Any], *, total_updates: int | None = 100) -> Any:
    parallel = ParallelConfig(
        **case.get("parallel", {}), engine={"name": "megatron", **case.get("options", {})}
    )
    return megatron_engine(
        case["source"],
        case.get("kind", "policy"),
        role_config(case),
        parallel,
        device=CPU,
        total_updates=total_updates,
    )


def trained(engine: Any, case: dict[str, Any], updates: int) -> list[dict[str, float]]:
    return steps(
        worker_on(engine, case),
        len(engine.gather_over_data(None)),
        case,
        engine.dispatch_ranks["train"].data_rank,
        updates,
    )


def written_by(engine: Any, case: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Columns that a worker writes for the rows of this rank, by row."""
    batch, num_data = rows_to_learn(with_padding=True), len(engine.gather_over_data(None))
    plan = balance(batch.num_tokens, num_ranks=num_data, micro_batch_tokens=8)
    own, own_plan = (
        split_by_plan((batch, plan), num_data)[engine.dispatch_ranks["train"].data_rank]
        if num_data > 1
        else (batch, plan)
    )
    written = worker_on(engine, case).write(own, own_plan)
    return {int(row): written.ragged(written.names[0]).row(i) for i, row in enumerate(own.row_ids)}


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Weights as read; then steps, an export, and the columns that the worker writes."""
    engine = engine_on(case)
    out: dict[str, Any] = {"data": len(engine.gather_over_data(None)), "shapes": engine.shapes()}
    out["read"] = {name: tensor.clone() for name, tensor in engine.full_tensors()}
    out["one"] = [name for name, _ in engine.full_tensors({"model.norm.weight", "norm.weight"})]
    out["history"] = trained(engine, case, UPDATES)
    engine.export(folder / case["name"])
    out["written"] = written_by(engine, case)
    return out


def run_all(groups: dict[str, list[dict[str, Any]]], folder: str) -> dict[str, Any]:
    """The results of all cases on one number of ranks, by kind and name of the case."""
    functions = {
        "run": run_case,
        "save": save_case,
        "load": load_case,
        "not_finite": not_finite,
        "together": together,
        "broken": broken,
        "stream": streamed,
    }
    return {
        f"{kind} {case['name']}": functions[kind](case, Path(folder))
        for kind, cases in groups.items()
        for case in cases
    }


def save_case(case: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """Two steps, then a checkpoint that is written during two more."""
    engine = engine_on(case)
    trained(engine, case, 2)
    folder = folder / case["saved"]
    folder.mkdir(exist_ok=True)
    dist.barrier()
    wait = engine.save(folder)
    history = trained(engine, case, 2)
    wait()
    dist.barrier()
    return history


def load_case(case: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """Steps after a checkpoint, loaded into an engine whose weights have changed meanwhile."""
    engine = engine_on(case)
    trained(engine, {**case, "minibatches": 1}, 1)
    engine.load(folder / case["saved"])
    return trained(engine, case, 2)


def broken(case: dict[str, Any], folder: Path) -> str:
    """The error of a checkpoint that lacks a file."""
    engine = engine_on(case)
    if dist.get_rank() == 0:
        (folder / case["saved"] / "rank-00001.safetensors").rename(folder / "lost")
    dist.barrier()
    try:
        engine.load(folder / case["saved"])
    except ValueError as error:
        return str(error)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            (folder / "lost").rename(folder / case["saved"] / "rank-00001.safetensors")
        dist.barrier()
    return "nothing"


def not_finite(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Updates with a loss that is not finite, a good one, bad ones until it raises; then a bad gradient."""
    engine = engine_on(case)
    losses = [
        update_with(engine, case, torch.nan if bad else 1.0) for bad in (True, True, False, True, True, True)
    ]
    engine = engine_on(case)
    before = [parameter.detach().clone() for parameter in engine.model.parameters()]
    for parameter in engine.model.parameters():
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    out = {"losses": losses, "gradient": update_with(engine, case, 1.0)}
    out["weights_stayed"] = all(
        torch.equal(one, other) for one, other in zip(before, engine.model.parameters(), strict=True)
    )
    return out


def update_with(engine: Any, case: dict[str, Any], advantage: float) -> dict[str, float] | str:
    """An update in which the tokens of row 3 have this advantage."""
    batch = rows_to_learn(with_padding=True)
    rank, num_data = engine.dispatch_ranks["train"].data_rank, len(engine.gather_over_data(None))
    batch.write("advantages", torch.where(torch.arange(6)[:, None] == 3, advantage, batch["advantages"]))
    plan = balance(batch.num_tokens, num_ranks=num_data, micro_batch_tokens=8)
    write_loss_weights(batch, plan, algorithm_of(case))
    try:
        return worker_on(engine, case).update(
            *(split_by_plan((batch, plan), num_data)[rank] if num_data > 1 else (batch, plan)), 0.0
        )
    except NotFiniteError as error:
        return str(error)


def streamed(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Steps in portions, and a whole one before and after them; then bad ones."""
    engine = engine_on(case)
    before = trained(engine, {**case, "minibatches": 1}, 1)
    return {"before": before, **stream_case(case, engine, UPDATES)}


def together(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A policy, a critic and a reference in different layouts on the same ranks, and what they leave."""
    before = {name: getattr(torch.cuda, name) for name in ("current_device", "Stream", "manual_seed")}
    state = torch.get_rng_state()
    critic_case = {"source": case["source"], "kind": "value", "parallel": {"pipeline": 2}}
    policy, critic = engine_on(case), engine_on(critic_case)
    reference = engine_on({"source": case["source"]}, total_updates=None)
    out: dict[str, Any] = {"policy": trained(policy, case, 1), "critic": trained(critic, critic_case, 1)}
    out["reference"] = written_by(reference, {})
    out["policy"] += trained(policy, case, 1)
    out["patched"] = [name for name, function in before.items() if getattr(torch.cuda, name) is not function]
    out["patched"] += sorted({"cuda", "type", "record_stream"} & vars(torch.Tensor).keys())
    out["same_random_state"] = torch.equal(state, torch.get_rng_state())
    return out


def on_gpu(source: str, port: int, precision: str) -> list[dict[str, float]]:
    """Steps on one GPU, in a world of its own."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    case = {"source": source, "precision": precision}
    parallel = ParallelConfig(engine={"name": "megatron"})
    engine = megatron_engine(source, "policy", role_config(case), parallel, device=device, total_updates=100)
    history = trained(engine, case, UPDATES)
    engine.export(Path(source) / "exported")
    dist.destroy_process_group()
    return history
