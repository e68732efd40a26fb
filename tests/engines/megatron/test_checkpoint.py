"""Ranges of flattened local tensors as parts of whole ones, and checkpoints that are refused."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from verl.engines.megatron.checkpoint import FlatSlice, flat_slices, read_progress
from verl.weight_sync.layout import TensorShard, local_slices, num_elements


def test_any_ranges_of_local_tensors_are_parts_of_the_whole_ones():
    whole = {
        "a": torch.arange(20).view(4, 5),
        "b": torch.arange(100, 145).view(3, 3, 5),
        "c": torch.arange(200, 207),
    }
    # Rows 1 to 3 of `a`, then the second of three matrices `b`, in one matrix that ends with a row of
    # padding.
    shards = [
        TensorShard("a", ((1, 4), (0, 5)), "ab", (0, 0)),
        TensorShard("b", ((1, 2), (0, 3), (0, 5)), "ab", (3, 0)),
        TensorShard("c", ((0, 7),), "c", (0,)),
    ]
    local = {"ab": torch.full((7, 5), -1), "c": torch.zeros(7, dtype=torch.int64)}
    for shard in shards:
        target = local[shard.local_name][local_slices(shard.bounds, shard.offset)]
        values = whole[shard.name][tuple(slice(*bound) for bound in shard.bounds)]
        target.copy_(values.reshape(target.shape))
    for start, stop in product(range(36), repeat=2):
        found = flat_slices(
            shards,
            {name: tuple(tensor.shape) for name, tensor in local.items()},
            {"ab": (start, stop), "c": (2, 5)},
        )
        values = torch.cat([flat(part, local) for part in found] or [torch.empty(0, dtype=torch.int64)])
        expected = torch.cat(
            [whole[part.name][tuple(slice(*b) for b in part.bounds)].flatten() for part in found]
        )
        assert torch.equal(values, expected)
        owned = local["ab"].flatten()[start : max(start, stop)]
        assert sorted(values.tolist()) == sorted(owned[owned >= 0].tolist() + [202, 203, 204])


def flat(part: FlatSlice, local: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values of a part in its local tensor."""
    return local[part.local_name].flatten()[part.start : part.start + num_elements(part.bounds)]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (None, "is none of engine megatron, or broken"),
        ("{", "is none of engine megatron, or broken"),
        (
            {"kind": "qwen2 PolicyModel", "updates": 3},
            "is none of engine megatron, or broken .KeyError..shapes",
        ),
        (
            {"kind": "llama policy", "shapes": "1", "num_files": 2},
            "is of another model .kind llama policy, need qwen2 policy.",
        ),
        ({"kind": "qwen2 policy", "shapes": "2", "num_files": 2}, "is of another model .shapes 2, need 1."),
    ],
)
def test_progress_of_something_else_is_refused(saved, message, tmp_path):
    if saved is not None:
        (tmp_path / "progress.json").write_text(saved if isinstance(saved, str) else json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        read_progress(tmp_path, {"kind": "qwen2 policy", "shapes": "1"})
