"""Programs of each rank in the tests of the 3D-HybridEngine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.engines.sharded_runs import engine_on
from tests.tiny import tiny_codec
from verl.engines.hf.weights import local_shards, shard_slices
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.rollout.embedded.hybrid_engine import HybridEngine
from verl.utils.sampling_types import SamplingParams
from verl.weight_sync.layout import ShardLayout, num_elements


def switch(case: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Switch to the generation layout and back, twice; weights that differ, bytes, and answers."""
    engine = engine_on(case["source"], case)
    with torch.no_grad():  # LoRA adapters that change the weights
        for i, parameter in enumerate(engine.model.parameters()):
            parameter.add_(0.01 * (i % 7)) if case.get("lora") else None
    hybrid = HybridEngine(
        engine,
        tensor=case["tensor"],
        precision=case.get("precision", "fp32"),
        overlap=case["overlap"],
        bucket_bytes=case["bucket"],
    )
    whole = dict(engine.full_tensors())
    asleep = sum(storage.nbytes() for storage in hybrid._own_storages.values())
    answers: list[Any] = []
    rank, wrong = dist.get_rank(), []
    mine = (
        prompts[: hybrid.dispatch_rank.data_rank + 1]
        if not case.get("idle") or hybrid.dispatch_rank.data_rank == 0
        else []
    )
    generator = EmbeddedEngine(hybrid.model, tiny_codec(), max_slots=8)
    for _ in range(2):
        with hybrid.loaded(0):
            asked = [SamplingParams(max_tokens=5, seed=i) for i in range(len(mine))]
            answers = (
                [(g[0].token_ids, g[0].logprobs) for g in generator.generate(mine, asked)] if mine else []
            )
        wrong += [
            name
            for name, parameter in hybrid.model.transformer.named_parameters()
            if not torch.equal(
                hybrid._local_tensors[name],
                whole[name].to(hybrid._local_tensors[name].dtype)[shard_slices(parameter)],
            )
        ]
        hybrid.sleep()
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (engine.local_shards(), local_shards(hybrid.model.transformer)))
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    source, target = (ShardLayout(shapes, tuple(tuple(sides[i]) for sides in everyones)) for i in (0, 1))
    item = torch.finfo(hybrid.model.transformer.dtype).bits // 8
    return {
        "wrong": wrong,
        "asleep": asleep,
        "place": hybrid.dispatch_rank,
        "answers": answers,
        "switches": [(s.received_bytes, s.weight_bytes) for s in hybrid.switches],
        "target": target.num_elements(rank) * item,
        "lacking": lacking(source, target, rank) * item,
        "whole": sum(tensor.numel() for tensor in whole.values()) * item,
    }


def lacking(source: ShardLayout, target: ShardLayout, rank: int) -> int:
    """Elements that a rank needs and does not hold, counted one by one."""
    count = 0
    for name, shape in target.shapes.items():
        has, needs = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for layout, mask in ((source, has), (target, needs)):
            for piece in layout.shards[rank]:
                if piece.name == name and num_elements(piece.bounds):
                    mask[tuple(slice(*bound) for bound in piece.bounds)] = True
        count += int((needs & ~has).sum())
    return count


def switches(cases: list[dict[str, Any]], prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [switch(case, prompts) for case in cases]
