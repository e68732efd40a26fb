"""Programs of the ranks in the tests of the sharded engine: the updates of one process, on own rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_codec
from tests.training import rows_to_learn
from verl.algorithms.objective import Algorithm
from verl.config.algorithm import AlgorithmConfig
from verl.config.fields import Choice
from verl.config.placement import ParallelConfig
from verl.config.roles import LoraConfig, OptimizerConfig, RoleConfig
from verl.controller.dispatch import split_by_plan
from verl.data.batch import Batch
from verl.data.packing import BatchPlan, balance
from verl.engines.base import NotFiniteError
from verl.engines.fsdp import sharded_engine
from verl.engines.hf.hf_io import export_model
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import load_language_model, value_model
from verl.engines.hf.weights import shard_slices, to_local
from verl.engines.local import LocalEngine
from verl.engines.minibatches import write_loss_weights
from verl.engines.roles.critic import CriticWorker
from verl.engines.roles.policy import PolicyWorker
from verl.engines.streaming import StreamedBatch
from verl.rollout.actor_worker import ActorWorker
from verl.utils.sampling_types import SamplingParams

UPDATES = 5
# Of the six rows, whole prompts each; with four ranks some have no row of a portion.
PORTIONS = ([4, 5], [2, 0], [1, 3])
CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3, max_grad_norm=0.05)


def role_config(case: dict[str, Any]) -> RoleConfig:
    lora = (
        LoraConfig(rank=4, targets=("q_proj", "v_proj", "o_proj", "down_proj", "up_proj"))
        if case.get("lora")
        else LoraConfig()
    )
    return RoleConfig(
        optimizer=OPTIMIZER,
        lora=lora,
        gradient_checkpointing=case.get("recompute", False),
        precision=case.get("precision", "fp32"),
    )


def algorithm_of(case: dict[str, Any]) -> Algorithm:
    loss = case.get("loss", "ppo_clip")
    options = {"share": 0.2, "cov_low": 0.05} if loss == "clip_cov" else {}
    return Algorithm.bind(
        AlgorithmConfig(
            advantage=Choice(name="gae"),
            value_loss=Choice(name="value_mse"),
            policy_loss=Choice(name=loss, **options),
        )
    )


def worker_on(engine: Any, case: dict[str, Any]) -> Any:
    algorithm = algorithm_of(case)
    if case.get("kind") == "value":
        return CriticWorker(engine, algorithm, vf_coef=1.0, epochs=1)
    return PolicyWorker(engine, algorithm, temperature=1.0, epochs=1, chunk=case.get("chunk", 100))


def local_engine_on(source: str, case: dict[str, Any]) -> LocalEngine:
    transformer = load_language_model(source)
    model: Backbone = (
        value_model(transformer, "fp32") if case.get("kind") == "value" else PolicyModel(transformer, "fp32")
    )
    return LocalEngine(model, role_config(case), device=CPU, total_updates=100)


def engine_on(source: str, case: dict[str, Any]) -> Any:
    parallel = ParallelConfig(**case.get("parallel", {}))
    return sharded_engine(
        source, case.get("kind", "policy"), role_config(case), parallel, device=CPU, total_updates=100
    )


def steps(
    worker: Any, num_ranks: int, case: dict[str, Any], rank: int, updates: int = UPDATES
) -> list[dict[str, float]]:
    """Steps on uneven rows, each of two updates; rank -1 is a single process with all rows."""
    batch, history = rows_to_learn(with_padding=True), []
    for _ in range(updates):
        plan = balance(
            batch.num_tokens,
            num_ranks=num_ranks,
            micro_batch_tokens=8,
            num_minibatches=case.get("minibatches", 2),
        )
        write_loss_weights(batch, plan, algorithm_of(case))
        if rank < 0:
            plan = BatchPlan(
                [[[micro for share in minibatch for micro in share]] for minibatch in plan.minibatches]
            )
            own = (batch, plan)
        else:
            own = split_by_plan((batch, plan), num_ranks)[rank] if num_ranks > 1 else (batch, plan)
        history.append(worker.update(*own, 0.0))
    return history


def streamed_step(
    worker: Any, num_ranks: int, case: dict[str, Any], rank: int, batch: Batch
) -> dict[str, float]:
    """One update from three portions; between them a forward pass, and weights unsharded as to generate."""
    portions = StreamedBatch(algorithm_of(case), num_groups=3)
    for rows in PORTIONS:
        portion = batch.select(rows)
        first_row = portions.add(portion)
        plan = balance(portion.num_tokens, num_ranks=num_ranks, micro_batch_tokens=8)
        own = split_by_plan((portion, plan), num_ranks)[rank] if num_ranks > 1 else (portion, plan)
        worker.accumulate(*own, 0.0, first_row)
        worker.write(*own)
        with worker.engine.unsharded_weights():
            pass
    return worker.finish(portions.policy_scale)


def stream_case(case: dict[str, Any], engine: Any, updates: int) -> dict[str, Any]:
    """Steps in portions, then ones with a loss that is not finite in the second portion, until it raises."""
    worker, rank, num_data = (
        worker_on(engine, case),
        engine.dispatch_ranks["train"].data_rank,
        len(engine.gather_over_data(None)),
    )
    history = [
        streamed_step(worker, num_data, case, rank, rows_to_learn(with_padding=True)) for _ in range(updates)
    ]
    whole = {name: tensor.clone() for name, tensor in engine.full_tensors()}
    batch = rows_to_learn(with_padding=True)
    for name in ("advantages", "returns"):
        batch.write(name, torch.where(torch.arange(6)[:, None] == 0, torch.nan, batch[name]))
    try:
        bad = [streamed_step(worker, num_data, case, rank, batch) for _ in range(3)]
    except NotFiniteError as error:
        return {"history": history, "weights": whole, "data": num_data, "error": str(error)}
    return {"bad": bad}


def stream_cases(cases: list[dict[str, Any]], updates: int) -> dict[str, Any]:
    return {case["name"]: stream_case(case, engine_on(case["source"], case), updates) for case in cases}


def trained_weights(model: Backbone, folder: Path) -> dict[str, torch.Tensor]:
    """Every weight after training, through an export."""
    export_model(model, folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    whole = (
        dict(load_language_model(str(folder)).named_parameters())
        if not (folder / "value_head.safetensors").exists()
        else {}
    )
    return {name: parameter.detach() for name, parameter in whole.items()}


def run_case(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Five steps on a sharded engine; then logprobs of all rows, written by the ranks that have them."""
    engine = engine_on(case["source"], case)
    place = engine.dispatch_ranks["train"]
    worker = worker_on(engine, case)
    num_data = len(engine.gather_over_data(None))
    history = steps(worker, num_data, case, place.data_rank)
    out = {
        "history": history,
        "weights": trained_weights(engine.model, Path(folder) / case["name"]),
        "data": num_data,
    }
    batch = rows_to_learn(with_padding=True)
    plan = balance(batch.num_tokens, num_ranks=num_data, micro_batch_tokens=8)
    own, own_plan = split_by_plan((batch, plan), num_data)[place.data_rank] if num_data > 1 else (batch, plan)
    written = worker.write(own, own_plan)
    written.write("row_ids", own.row_ids)
    out["written"] = {
        int(row): written.ragged(written.names[0]).row(i) for i, row in enumerate(written["row_ids"])
    }
    if case.get("lora"):
        reference = worker.write_reference(own, own_plan)
        out["reference"] = {
            int(row): reference.ragged("ref_logprobs").row(i) for i, row in enumerate(own.row_ids)
        }
    return out


def run_cases(cases: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    return {case["name"]: run_case(case, folder) for case in cases}


def generate(source: str, parallel: dict[str, int], prompts: list[list[int]]) -> list[Any]:
    """Answers of this rank, to more prompts the higher its number."""
    case = {"parallel": parallel}
    engine = engine_on(source, case)
    actor = ActorWorker(
        engine, algorithm_of(case), tiny_codec(), max_slots=8, temperature=1.0, epochs=1, chunk=100
    )
    rank = engine.dispatch_ranks["generate"].data_rank
    mine = prompts[: rank + 1]
    before = steps(
        actor, len(engine.gather_over_data(None)), case, engine.dispatch_ranks["train"].data_rank, updates=1
    )
    answers = answered(actor, mine)
    after = steps(
        actor, len(engine.gather_over_data(None)), case, engine.dispatch_ranks["train"].data_rank, updates=1
    )
    return answers, before, after


def answered(actor: ActorWorker, prompts: list[list[int]]) -> list[Any]:
    """Ids and logprobs of two answers to each prompt."""
    groups, tokens = actor.generate(
        prompts, [SamplingParams(max_tokens=6, n=2, seed=i) for i in range(len(prompts))], 1
    )
    rows = zip(tokens.rows("response_ids"), tokens.rows("rollout_logprobs"), strict=True)
    return [[next(rows) for _ in group] for group in groups]


def generate_alone(source: str, prompts: list[list[int]]) -> list[Any]:
    engine = local_engine_on(source, {})
    actor = ActorWorker(
        engine, algorithm_of({}), tiny_codec(), max_slots=8, temperature=1.0, epochs=1, chunk=100
    )
    before = steps(actor, 2, {}, -1, updates=1)
    answers = answered(actor, prompts)
    return answers, before, steps(actor, 2, {}, -1, updates=1)


def not_finite(source: str) -> list[dict[str, float]]:
    """A step in which one row, on one of the ranks, has no finite loss, and one after it."""
    engine = engine_on(source, {})
    worker, batch = worker_on(engine, {}), rows_to_learn(with_padding=True)
    rank, num_ranks = engine.dispatch_ranks["train"].data_rank, len(engine.gather_over_data(None))
    advantages, history = batch["advantages"], []
    for bad in (True, False):
        batch.write(
            "advantages", torch.where(torch.arange(6)[:, None] == 3, torch.nan if bad else 1.0, advantages)
        )
        plan = balance(batch.num_tokens, num_ranks=num_ranks, micro_batch_tokens=8)
        write_loss_weights(batch, plan, algorithm_of({}))
        history.append(worker.update(*split_by_plan((batch, plan), num_ranks)[rank], 0.0))
    return history


def save_at(source: str, case: dict[str, Any], folder: str) -> list[dict[str, float]]:
    """Two steps, a checkpoint that is written while a third is made."""
    engine = engine_on(source, case)
    worker = worker_on(engine, case)
    rank, num_data = engine.dispatch_ranks["train"].data_rank, len(engine.gather_over_data(None))
    steps(worker, num_data, case, rank, updates=2)
    wait = engine.save(Path(folder))
    history = steps(worker, num_data, case, rank, updates=2)
    wait()
    return history


def load_at(source: str, case: dict[str, Any], folder: str) -> list[dict[str, float]]:
    """The steps after the checkpoint."""
    engine = engine_on(source, case)
    engine.load(Path(folder))
    rank, num_data = engine.dispatch_ranks["train"].data_rank, len(engine.gather_over_data(None))
    return steps(worker_on(engine, case), num_data, case, rank, updates=2)


@torch.no_grad()
def run_adapters(source: str, kinds: dict[str, dict[str, Any]], folder: str) -> dict[str, torch.Tensor]:
    """Logits of a sharded model with each adapter, which is written whole and alone."""
    found = {}
    for name, lora in kinds.items():
        config = RoleConfig(lora=LoraConfig(**lora))
        engine = sharded_engine(source, "policy", config, ParallelConfig(), device=CPU, total_updates=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in engine.trained if "path" not in lora else ():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            to_local(parameter).add_(noise[shard_slices(parameter)])
        engine.export(Path(folder) / name / "model")
        engine.export_adapter(Path(folder) / name / "adapter", source)
        with engine.unsharded_weights():
            found[name] = engine.model.transformer(torch.tensor([[5, 6, 7, 8]])).logits.clone()
    return found
