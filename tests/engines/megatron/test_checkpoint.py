"""Stretches of local tensors as parts of whole ones, and what is said of checkpoints that cannot be read."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from verl.engines.megatron.checkpoint import Strip, read_progress, strips
from verl.weight_sync.layout import TensorShard, local_slices, num_elements, shape_of


def test_any_stretches_of_local_tensors_are_parts_of_the_whole_ones():
    whole = {
        "a": torch.arange(20).view(4, 5),
        "b": torch.arange(100, 145).view(3, 3, 5),
        "c": torch.arange(200, 207),
    }
    # Rows 1 to 3 of `a`, then the second of three matrices `b`, in one matrix that ends with a row of
    # padding.
    pieces = [
        TensorShard("a", ((1, 4), (0, 5)), "ab", (0, 0)),
        TensorShard("b", ((1, 2), (0, 3), (0, 5)), "ab", (3, 0)),
        TensorShard("c", ((0, 7),), "c", (0,)),
    ]
    homes = {"ab": torch.full((7, 5), -1), "c": torch.zeros(7, dtype=torch.int64)}
    for piece in pieces:
        place = homes[piece.local_name][local_slices(piece.bounds, piece.offset)]
        place.copy_(whole[piece.name][tuple(slice(*bound) for bound in piece.bounds)].reshape(place.shape))
    for start, stop in product(range(36), repeat=2):
        found = strips(
            pieces,
            {name: tuple(home.shape) for name, home in homes.items()},
            {"ab": (start, stop), "c": (2, 5)},
        )
        values = torch.cat([flat(strip, homes) for strip in found] or [torch.empty(0, dtype=torch.int64)])
        expected = torch.cat(
            [whole[strip.name][tuple(slice(*b) for b in strip.bounds)].flatten() for strip in found]
        )
        assert torch.equal(values, expected)
        stretch = homes["ab"].flatten()[start : max(start, stop)]
        assert sorted(values.tolist()) == sorted(stretch[stretch >= 0].tolist() + [202, 203, 204])


def flat(strip: Strip, homes: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values of a strip, where it says that they lie."""
    values = homes[strip.local_name].flatten()[strip.start : strip.start + num_elements(strip.bounds)]
    return values.view(shape_of(strip.bounds)).flatten()


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
