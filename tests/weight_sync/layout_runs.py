"""Functions that each rank runs in the tests of layouts: a real model is sharded, and lists its shards."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from verl.config.placement import ParallelConfig
from verl.engines.device_meshes import make_device_meshes
from verl.engines.hf.weights import local_shards
from verl.engines.tensor_parallel import parallelize
from verl.weight_sync.layout import TensorShard


def shards_of(config: dict[str, Any], parallels: list[dict[str, int]]) -> list[list[TensorShard]]:
    """Shards of this rank, of a model that is sharded in each of some parallel configurations."""
    found = []
    for parallel in parallels:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        meshes = make_device_meshes(ParallelConfig(**parallel), torch.device("cpu"))
        if meshes.tensor is not None:
            parallelize(model, meshes.tensor)
        for layer in model.model.layers:
            fully_shard(layer, mesh=meshes.data)
        fully_shard(model, mesh=meshes.data)
        found.append(local_shards(model))
    return found
